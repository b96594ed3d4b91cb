"""Encoders of other kinds than the published: what of them is evaluated, and what is refused."""

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from safetensors.torch import save_file
from test_dense import scenes
from test_evaluate import labelled, typed
from test_look import looks
from test_pretrain import TINY, run
from timm.layers import PatchEmbed

from kamim.evaluate.encoder import load_encoder
from kamim.evaluate.features import cached, hash_of
from shards import ShardSet
from shards.errors import UserError
from train import checkpoint
from train.cuda import pin_attention
from train.export import export
from train.features import tokens
from train.models import MEAN, STD, make_model
from train.recipes import changed

__all__ = ["labelled"]
CPU = torch.device("cpu")
HALF = (0.5, 0.5, 0.5)
POOLED = replace(TINY, options=TINY.options | {"class_token": False, "global_pool": "avg"})
COMMANDS = [
    ["probe", "--every-block"],
    ["probe", "--pool", "cls", "--block", "2"],
    ["probe", "--protocol", "paper", "--epochs", "1", "--seeds", "1"],
    ["probe", "--protocol", "attentive", "--epochs", "1", "--seeds", "1"],
    ["finetune", "--epochs", "1", "--recipe", "kamim"],
    ["analyse", "--images", "4"],
    ["dense", "--by", "linear"],
]
SIMMIM = ["finetune", "--epochs", "1", "--recipe", "simmim"]


@pytest.mark.parametrize(
    ("options", "final"),
    [
        ({}, "norm"),
        ({"class_token": False, "global_pool": "avg"}, "fc_norm"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "norm"),
        ({"class_token": True, "global_pool": "avg"}, "fc_norm"),
        ({"class_token": False, "reg_tokens": 2, "global_pool": "avg"}, "fc_norm"),
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
        has = options.get("class_token", True)
        torch.testing.assert_close(cls, expected[:, 0] if has else expected[:, prefix:].mean(1))


@pytest.mark.parametrize("recipe", [POOLED, changed(POOLED, ["method=mae"])], ids=["simmim", "mae"])
def test_a_vit_without_a_class_token_is_looked_at_as_it_trains(recipe, labelled, tmp_path):
    run(labelled, tmp_path / "run", recipe, steps=1, probe_every=1)
    (row,) = looks(tmp_path / "run").values()
    assert {"probe_top1", "attention_nmi"} <= set(row)


def evaluate(words, encoder, labelled, folder):
    """Types a command of COMMANDS."""
    command, *options = words
    sets = [labelled] if command == "analyse" else [labelled, labelled]
    if command == "dense":
        sets = [scenes(folder / "scenes", 4, 1)] * 2
    status, _, error = typed(command, encoder, *sets, *options, "--out", folder / "out")
    assert status == 0, error


@pytest.mark.parametrize("words", [*COMMANDS, SIMMIM], ids=" ".join)
def test_a_vit_without_a_class_token_is_evaluated(words, labelled, tmp_path):
    run(labelled, tmp_path / "run", POOLED, steps=1)
    evaluate(words, tmp_path / "run", labelled, tmp_path)


def folder_of_timm(folder, labelled, normal):
    """A folder for timm of a run; its config.json gives `normal` in place of the run's own."""
    run(labelled, folder / "run", TINY, steps=1)
    export(checkpoint.newest(folder / "run" / "checkpoints"), folder / "timm", "timm")
    path = folder / "timm" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"] |= normal
    path.write_text(json.dumps(config))
    return folder / "timm"


def test_images_are_normalised_as_the_encoder_was_trained_to_have_them(labelled, tmp_path):
    ours = load_encoder(str(folder_of_timm(tmp_path, labelled, {})), CPU)
    assert (ours.mean, ours.std) == (MEAN, STD)
    half = folder_of_timm(tmp_path / "b", labelled, {"mean": HALF, "std": HALF})
    other = load_encoder(str(half), CPU)
    assert (other.mean, other.std) == (HALF, HALF)
    white = torch.full((1, 3, 2, 2), 255.0)
    torch.testing.assert_close(other.normalised(white), torch.ones(1, 3, 2, 2))
    assert typed("export-hf", half, tmp_path / "hf")[0] == 0
    theirs = load_encoder(str(tmp_path / "hf"), CPU)
    assert (theirs.mean, theirs.std) == (HALF, HALF)
    if find_spec("transformers"):
        from transformers import ViTImageProcessor

        processor = ViTImageProcessor.from_pretrained(tmp_path / "hf")
        assert (tuple(processor.image_mean), processor.size["height"]) == (HALF, 96)
    (tmp_path / "hf" / "preprocessor_config.json").unlink()  # the file says it, too
    assert load_encoder(str(tmp_path / "hf"), CPU).mean == HALF


def test_weights_of_timm_are_shown_images_as_timm_says(monkeypatch):
    name = "vit_small_patch16_224.augreg_in21k_ft_in1k"
    make = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained, **k: make(*a, **k, depth=1, embed_dim=48)
    )
    encoder = load_encoder(f"timm:{name}", CPU, 96)
    assert (encoder.mean, encoder.std) == (HALF, HALF)


def test_each_pixel_lies_in_a_patch_of_14_px(monkeypatch):
    make = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained, **k: make(*a, **k, depth=1, embed_dim=48)
    )
    encoder = load_encoder("timm:vit_small_patch14_dinov2", CPU, 192)
    assert (encoder.size, encoder.model.patch_embed.grid_size) == (196, (14, 14))


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_shows_images_as_the_encoder_takes_them(
    words, labelled, tmp_path, monkeypatch
):
    folder = folder_of_timm(tmp_path, labelled, {"mean": [0, 0, 0], "std": [1, 1, 1]})
    embed, shown = PatchEmbed.forward, []
    monkeypatch.setattr(
        PatchEmbed, "forward", lambda self, x: shown.append((x.min(), x.max())) or embed(self, x)
    )
    evaluate(words, folder, labelled, tmp_path)
    low, high = torch.tensor(shown).T
    assert low.min() >= 0
    assert 0.8 < high.max() < 1.001


def test_what_is_kept_of_other_colours_is_not_used_again(labelled, tmp_path):
    encoder, records = load_encoder("random:small", CPU), ShardSet(labelled)
    found = [
        cached(tmp_path, each, records, 1, "mean", CPU)[0]
        for each in (encoder, replace(encoder, mean=HALF, std=HALF))
    ]
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    ("layer", "name", "value"), [("attn", "num_heads", 1), ("norm1", "eps", 9)]
)
def test_settings_that_no_tensor_shows_tell_encoders_apart(layer, name, value):
    first, second = (load_encoder("random:small", CPU) for _ in range(2))
    assert hash_of(first) == hash_of(second)
    second.model.blocks[1].mlp.act = torch.nn.ReLU()
    assert hash_of(first) != hash_of(second)
    second = load_encoder("random:small", CPU)
    setattr(getattr(second.model.blocks[0], layer), name, value)
    assert hash_of(first) != hash_of(second)


@pytest.mark.parametrize(
    "normal",
    [
        {"mean": "123"},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"mean": [0.5, 0.5, 10**400]},
        {"std": [0.5, 0.5, 0]},
        {"std": [0.5, 0.5, True]},
        {"std": {"a": 1}},
    ],
    ids=str,
)
def test_unsound_means_and_deviations_are_one_line(normal, labelled, tmp_path):
    folder = folder_of_timm(tmp_path, labelled, normal)
    (name,) = normal
    with pytest.raises(UserError, match=rf"config\.json: {name} is .*, not 3 finite") as error:
        load_encoder(str(folder), CPU)
    assert "\n" not in str(error.value)
    assert typed("export-hf", "random:small", tmp_path / "hf")[0] == 0
    beside = tmp_path / "hf" / "preprocessor_config.json"
    beside.write_text(json.dumps({f"image_{name}": normal[name]}))
    with pytest.raises(UserError, match=rf"{beside.name}: image_{name} is .*, not 3 finite"):
        load_encoder(str(tmp_path / "hf"), CPU)
    beside.write_text("[1]")
    with pytest.raises(UserError, match=rf"{beside.name} holds no JSON object"):
        load_encoder(str(tmp_path / "hf"), CPU)


def test_what_is_said_of_pixels_is_read_and_kept(tmp_path):
    hf = tmp_path / "hf"
    assert typed("export-hf", "random:small", hf)[0] == 0
    for said, mean, deviation in (
        ({"image_mean": 0.5, "image_std": [0.5] * 3}, 0.5, 0.5),
        ({"do_normalize": False}, 0, 1),
        ({"do_rescale": False, "image_mean": 127.5, "image_std": 127.5}, 0.5, 0.5),
    ):
        (hf / "preprocessor_config.json").write_text(json.dumps(said))
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        assert typed("export-hf", hf, file)[0] == 0
        for place in (hf, file):
            found = load_encoder(str(place), CPU)
            assert found.mean == pytest.approx((mean,) * 3)
            assert found.std == pytest.approx((deviation,) * 3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit_tiny_r_s16_p8_224", {}, "a network runs before its patches"),
        ("vit_base_r50_s16_224", {"depth": 1}, "a network runs before its patches"),
        ("test_vit", {}, "keeps its patches in a grid"),
        ("vit_small_patch16_dinov3", {"depth": 1}, "keeps its patches in a grid"),
        ("eva02_tiny_patch14_224", {"depth": 1}, "its blocks take more than tokens"),
    ],
)
@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_a_vit_that_cannot_be_pretrained_is_one_line(name, options, words, method):
    size = 224 if "14" in name else 96
    recipe = replace(TINY, model=name, options=options, size=size, method=method)
    with torch.device("meta"), pytest.raises(UserError, match=f"^{name}:? {words}"):
        make_model(recipe)


@pytest.mark.parametrize("name", ["vit_small_patch16_18x2_224", "vit_base_patch16_xp_224"])
def test_a_vit_of_parallel_blocks_trains_and_is_looked_at(name, labelled, tmp_path):
    recipe = replace(TINY, model=name)
    run(labelled, tmp_path / "run", recipe, steps=1, probe_every=1)
    (row,) = looks(tmp_path / "run").values()
    assert "probe_top1" in row
    assert "attention_nmi" not in row  # of blocks that it cannot be read of
    evaluate(COMMANDS[-2], tmp_path / "run", labelled, tmp_path)
    assert pin_attention(make_model(recipe), 96, torch.device("cuda")) == ""
    with pytest.raises(UserError, match=f"^{name}: its attention cannot be read"):
        run(labelled, tmp_path / "other", changed(recipe, ["sample_by=attention"]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_r_s16_p8_224", {"depth": 1}),
        ("test_vit", {"depth": 1}),
        ("vit_small_patch16_dinov3", {"depth": 1}),
    ],
)
def test_what_cannot_be_pretrained_is_evaluated(name, options, labelled, tmp_path):
    size = {"img_size": 96, "num_classes": 0}
    model = timm.create_model(name, **options, **size)
    facts = {"model": name, "options": json.dumps(options | size)}
    save_file(model.state_dict(), tmp_path / "e.safetensors", facts)
    for number, words in enumerate((COMMANDS[0], COMMANDS[-3], COMMANDS[-2], COMMANDS[-1])):
        evaluate(words, tmp_path / "e.safetensors", labelled, tmp_path / str(number))
