"""Encoders of other kinds than the published: what of them is evaluated, and what is refused."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from test_dense import scenes
from test_evaluate import labelled, typed
from test_look import looks
from test_pretrain import TINY, run

from kamim.evaluate.encoder import load_encoder
from train.features import tokens
from train.recipes import changed

__all__ = ["labelled"]
CPU = torch.device("cpu")
POOLED = replace(TINY, options=TINY.options | {"class_token": False, "global_pool": "avg"})


@pytest.mark.parametrize(
    ("options", "final"),
    [
        ({}, "norm"),
        ({"class_token": False, "global_pool": "avg"}, "fc_norm"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "norm"),
        ({"class_token": True, "global_pool": "avg"}, "fc_norm"),
    ],
)
def test_tokens_of_the_last_block_have_the_final_norm(options, final, labelled, tmp_path):
    run(labelled, tmp_path / "run", replace(TINY, options=TINY.options | options), steps=1)
    encoder, images = load_encoder(str(tmp_path / "run"), CPU), torch.randn(3, 3, 96, 96)
    model, prefix = encoder.model, encoder.model.num_prefix_tokens
    expected = model.blocks(model.norm_pre(model._pos_embed(model.patch_embed(images))))
    for norm in (False, True):
        patches, cls = tokens(encoder, images, 2, norm)
        expected = getattr(model, final)(expected) if norm else expected
        torch.testing.assert_close(patches, expected[:, prefix:])
        torch.testing.assert_close(cls, expected[:, 0] if prefix else expected.mean(1))


@pytest.mark.parametrize("recipe", [POOLED, changed(POOLED, ["method=mae"])], ids=["simmim", "mae"])
def test_a_vit_without_a_class_token_is_looked_at_as_it_trains(recipe, labelled, tmp_path):
    run(labelled, tmp_path / "run", recipe, steps=1, probe_every=1)
    (row,) = looks(tmp_path / "run").values()
    assert {"probe_top1", "attention_nmi"} <= set(row)


@pytest.mark.parametrize(
    "words",
    [
        ["probe", "--every-block"],
        ["probe", "--pool", "cls", "--block", "2"],
        ["probe", "--protocol", "paper", "--epochs", "1", "--seeds", "1"],
        ["probe", "--protocol", "attentive", "--epochs", "1", "--seeds", "1"],
        ["finetune", "--epochs", "1", "--recipe", "simmim"],
        ["analyse", "--images", "4"],
        ["dense", "--by", "linear"],
    ],
    ids=" ".join,
)
def test_a_vit_without_a_class_token_is_evaluated(words, labelled, tmp_path):
    run(labelled, tmp_path / "run", POOLED, steps=1)
    command, *options = words
    sets = [labelled] if command == "analyse" else [labelled, labelled]
    if command == "dense":
        sets = [scenes(tmp_path / "scenes", 4, 1)] * 2
    out = tmp_path / "out"
    status, _, error = typed(command, tmp_path / "run", *sets, *options, "--out", out)
    assert status == 0, error
