"""Evaluation: probes that can only be right, features of the block asked for, others' weights."""

import csv
import json
import math
import os
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, errors, settings
from typed import kamim as typed_in_full
from typed import kamim_process, without_torch

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from safetensors.torch import load_file, save_file
from stores import HttpStore
from test_pretrain import TINY, run
from typer.testing import CliRunner

import kamim.evaluate.analyse
import kamim.evaluate.checks
import kamim.evaluate.supervised
import preprocess
from kamim.__main__ import app
from kamim.evaluate.checks import folder_for
from kamim.evaluate.encoder import load_encoder
from kamim.evaluate.features import extract
from kamim.evaluate.supervised import (
    Classifier,
    LabelRecipe,
    augmented,
    parameter_groups,
    recipe_for,
    train_supervised,
    windows_of,
)
from preprocess import build_shards, open_source
from shards import ShardSet, decode_frame
from shards.beton import convert_to_ffcv
from train import checkpoint, probe
from train.features import Encoder, tokens
from train.huggingface import from_timm, to_timm
from train.probe import linear_probe, nearest_neighbours

CPU = torch.device("cpu")
TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 0}
COMMANDS = [
    ["probe"],
    ["probe", "--protocol", "paper"],
    ["probe", "--protocol", "attentive"],
    ["finetune"],
]


def typed(command, *words):
    """The command as a user types it, in this process: importing torch anew takes seconds."""
    result = CliRunner().invoke(app, [command, *map(str, words)], catch_exceptions=True)
    error = "" if result.exception is None else str(result.exception)
    return result.exit_code, result.stdout, error


def clusters(count, classes, seed, shuffled=False):
    """Features that a line separates, or the same with labels that mean nothing."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=rng)
    centres = torch.randn(classes, 32, generator=torch.Generator().manual_seed(99)) * 5
    features = centres[labels] + 0.3 * torch.randn(count, 32, generator=rng)
    return features, labels[torch.randperm(count, generator=rng)] if shuffled else labels


def test_a_separable_set_is_all_right_and_shuffled_labels_are_chance():
    val = clusters(500, 7, 2)
    score = linear_probe(clusters(2000, 7, 1), val, 7, seed=0)
    assert score.top1 == score.top5 == 1
    assert nearest_neighbours(clusters(2000, 7, 1), val, 7) == 1
    for seed in (0, 1):
        by_chance = linear_probe(clusters(2000, 7, 1, True), val, 7, seed=seed)
        assert abs(by_chance.top1 - 1 / 7) < 0.1
    assert abs(nearest_neighbours(clusters(2000, 7, 1, True), val, 7) - 1 / 7) < 0.1


def test_neighbours_vote_as_the_slow_twin_says_however_few_fit_at_once(monkeypatch):
    train, val = clusters(300, 5, 1, True), clusters(90, 5, 2)
    mean = train[0].mean(0)
    known, right = torch.nn.functional.normalize(train[0] - mean), 0
    for feature, label in zip(*val, strict=True):
        similarity = known @ torch.nn.functional.normalize(feature - mean, dim=0)
        votes = [0.0] * 5
        for near in similarity.argsort(descending=True)[:20].tolist():
            votes[train[1][near]] += math.exp(similarity[near] / 0.07)
        right += votes.index(max(votes)) == label
    assert 0.05 < right / 90 < 0.6  # labels mean little here: votes must be counted right
    for most in (2**28, 1000, 1):
        monkeypatch.setattr(probe, "SIMILARITIES", most)
        assert nearest_neighbours(train, val, 5) == right / 90


def test_a_probe_depends_on_its_seed_alone():
    train, val = clusters(300, 3, 1, True), clusters(100, 3, 2)
    scores = [linear_probe(train, val, 3, seed=seed, epochs=3) for seed in (4, 4, 5)]
    assert scores[0] == scores[1]


@pytest.fixture
def labelled(small_source, tmp_path, build_once):
    chosen = settings(frame=96, crop=96, detectors=(preprocess.detector_settings("fast"),))
    return build_once(small_source, tmp_path / "set", chosen)


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features_are_those_of_the_block_in_the_order_of_the_set(labelled, tmp_path, block, pool):
    run(labelled, tmp_path / "run", steps=2)
    encoder = load_encoder(str(tmp_path / "run"), CPU)
    assert (encoder.size, encoder.blocks, encoder.default_block) == (96, 2, 1)
    records = ShardSet(labelled)
    features, labels = extract(encoder, records, block, pool, CPU, batch=16)
    assert labels.tolist() == [records[n].label for n in range(40)]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    model = encoder.model
    for number in (0, 17, 39):
        frame = torch.from_numpy(decode_frame(records[number].frame)).permute(2, 0, 1) / 255
        x = model._pos_embed(model.patch_embed(((frame - mean) / std)[None]))
        for layer in model.blocks[:block]:
            x = layer(x)
        x = model.norm(x) if block == 2 else x
        expected = x[0, 1:].mean(0) if pool == "mean" else x[0, 0]
        torch.testing.assert_close(features[number], expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["random:vit_tiny_patch16_224", "random:swin_tiny_patch4_window7_224"]
)
def test_any_block_of_any_backbone_gives_tokens(name):
    encoder = load_encoder(name, CPU, size=96)
    for block in (1, encoder.blocks):
        patches, cls = tokens(encoder, torch.zeros(2, 3, 96, 96), block)
        assert patches.ndim == 3
        assert cls.shape == (2, patches.shape[2])
    assert encoder.default_block == (8 if "vit" in name else 4)


def test_hugging_face_vits_load_and_give_the_same_features(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"intermediate_size": 512, "image_size": 96, "patch_size": 16, "encoder_stride": 16}
    config = transformers.ViTConfig(**shape)
    torch.manual_seed(0)
    theirs = transformers.ViTForMaskedImageModeling(config).eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = theirs.vit(images).last_hidden_state
    state = published_layout(theirs.state_dict())
    save_file(state, tmp_path / "theirs.safetensors")
    torch.save(state, tmp_path / "theirs.bin")
    for file in ("theirs.safetensors", "theirs.bin"):
        encoder = load_encoder(str(tmp_path / file), CPU)
        assert (encoder.size, encoder.blocks) == (96, 3)
        patches, cls = tokens(encoder, images, 3)
        torch.testing.assert_close(patches, expected[:, 1:], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(cls, expected[:, 0], atol=1e-4, rtol=1e-3)
    back = from_timm(to_timm(state))
    assert all(torch.equal(back[name], state[name]) for name in back)


def published_layout(state):
    """A state dict of today's transformers by the names that files of 2024 have."""
    names = {
        "vit.layers.": "vit.encoder.layer.",
        ".attention.q_proj.": ".attention.attention.query.",
        ".attention.k_proj.": ".attention.attention.key.",
        ".attention.v_proj.": ".attention.attention.value.",
        ".attention.o_proj.": ".attention.output.dense.",
        ".mlp.fc1.": ".intermediate.dense.",
        ".mlp.fc2.": ".output.dense.",
    }
    renamed = {}
    for name, tensor in state.items():
        for new, old in names.items():
            name = name.replace(new, old)
        renamed[name] = tensor.contiguous()
    return renamed


def test_what_is_no_encoder_is_one_line(labelled, tmp_path):
    run(labelled, tmp_path / "run", steps=1)
    path = checkpoint.newest(tmp_path / "run" / "checkpoints")
    state = checkpoint.load(path)
    state["run"]["recipe"]["options"]["embed_dim"] = 64
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"is of another architecture: .* is "):
        load_encoder(str(path), CPU)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for what, words in (
        (tmp_path / "junk.pt", "not loaded; name a run, .* or a file of `kamim export`$"),
        (tmp_path / "plain.safetensors", "does not say what it is of"),
        (tmp_path, "holds no checkpoint"),
        ("nothing", "is no file, run folder"),
        ("random:vit_nothing", "timm has no model"),
        ("random:vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("timm:vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"),
    ):
        with pytest.raises(ValueError, match=words):
            load_encoder(str(what), CPU)


@pytest.mark.parametrize(("known", "asked"), [(0, 3), (2, 3), (3, 0)])
def test_a_probe_of_too_few_images_is_one_line(known, asked):
    train, val = (clusters(10, 2, 1), clusters(10, 2, 2))
    few = [tuple(part[:n] for part in each) for each, n in ((train, known), (val, asked))]
    with pytest.raises(ValueError, match=f"at least 3 training .* not {known} and {asked};"):
        linear_probe(*few, 2, seed=0)


def test_the_command_resumes_from_its_features_and_refuses_wrong_labels(labelled, tmp_path):
    out = tmp_path / "probe"
    name = "random:vit_tiny_patch16_224"
    words = ["probe", name, labelled, labelled, "--epochs", "2", "--seeds", "2", "--out", out]
    status, printed, error = typed(*words, "--json")
    assert status == 0, error
    row = json.loads(printed)
    assert len(row["top1"]) == 2
    assert row["block"] == 8
    assert json.loads((out / "probe.json").read_text()) == row
    kept = {path: path.stat().st_mtime_ns for path in out.glob("features-*")}
    assert len(kept) == 1  # training and validation set are the same one here
    assert "top-1" in typed(*words)[1]
    assert {path: path.stat().st_mtime_ns for path in out.glob("features-*")} == kept
    assert "has 12" in typed(*words, "--block", "13")[2]
    index = np.load(labelled / "index.npy")
    index["label"][7] = 4
    resigned(labelled, index)
    done = typed_in_full(*words)
    assert done.returncode == 2
    assert "label 4 is none of its 4 classes" in done.stderr


def test_each_block_can_be_probed(labelled, tmp_path):
    words = ["probe", "random:small", labelled, labelled, "--epochs", "1", "--seeds", "1"]
    status, printed, error = typed(*words, "--every-block", "--json", "--out", tmp_path / "probe")
    assert status == 0, error
    row = json.loads(printed)
    assert [each["block"] for each in row["by_block"]] == [1, 2, 3, 4]
    chosen = row["by_block"][row["block"] - 1]
    assert {name: chosen[name] for name in ("top1", "knn")} == {n: row[n] for n in ("top1", "knn")}
    assert len(list((tmp_path / "probe").glob("features-*"))) == 4


def supervised(labelled, out, epochs, frozen=True, micro_batch=0, pool="mean", **changes):
    """A short run on the forty, a checkpoint an epoch."""
    encoder = load_encoder("random:small", CPU)
    torch.manual_seed(0)
    recipe = LabelRecipe(frozen=frozen, epochs=epochs, warmup=1, batch=10, **changes)
    model = Classifier(encoder, 2, pool, 4, recipe)
    records = ShardSet(labelled)
    facts = {"encoder": "x"}
    train_supervised(model, recipe, records, records, out, 0, CPU, facts, micro_batch)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("frozen", "pool"), [(True, "mean"), (False, "mean"), (True, "attention")])
def test_supervised_training_resumes_to_the_last_bit(labelled, tmp_path, frozen, pool, monkeypatch):
    whole = supervised(labelled, tmp_path / "whole", 2, frozen, pool=pool)
    real, seen = kamim.evaluate.supervised.augmented, []

    def killed(*arguments):
        seen.append(arguments[5])
        if len(seen) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(kamim.evaluate.supervised, "augmented", killed)
    with pytest.raises(KeyboardInterrupt):
        supervised(labelled, tmp_path / "parts", 2, frozen, pool=pool)
    left = tmp_path / "parts" / "metrics.jsonl.0123456789ab.tmp"  # killed while rows were trimmed
    left.touch()
    again = supervised(labelled, tmp_path / "parts", 2, frozen, pool=pool)
    assert not left.exists()
    assert seen[5:7] == [5, 4]  # it goes on after the first epoch's four steps
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="holds another run"):
        supervised(labelled, tmp_path / "parts", 2, frozen, pool=pool, peak=1.0)
    start = load_encoder("random:small", CPU).model.state_dict()
    same = all(torch.equal(whole[f"trunk.{name}"], start[name]) for name in start)
    assert same == frozen


class Colours(torch.nn.Module):
    """A trunk that cannot learn: the mean colour of each 16-px patch, with a scale of its own."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Identity()])
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.norm = self.fc_norm = torch.nn.Identity()
        self.num_prefix_tokens = 0

    def forward_intermediates(self, images, **options):
        means = torch.nn.functional.avg_pool2d(images, 16) * self.scale[:, None, None]
        return [means.flatten(2).transpose(1, 2)]


@pytest.fixture
def pairs(tmp_path):
    """Two classes with the same mean colour: blue lies on the red patch or on the green one."""
    rng, source = np.random.default_rng(0), tmp_path / "source"
    for number in range(64):
        picture, label = np.full((4, 4, 3), 128, np.uint8), number % 2
        red, green = rng.choice(16, 2, replace=False)
        picture.reshape(16, 3)[red] = 255, 0, 255 * label
        picture.reshape(16, 3)[green] = 0, 255, 255 * (1 - label)
        path = source / f"class{label}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), picture.repeat(16, 0).repeat(16, 1)[:, :, ::-1])
    build_shards(open_source(str(source)), tmp_path / "pairs", settings(quality=0), 1)
    return ShardSet(tmp_path / "pairs")


def test_attention_learns_what_the_mean_of_tokens_has_lost(pairs, tmp_path):
    found = {}
    for pool in ("mean", "attention"):
        encoder = Encoder("colours", Colours().eval(), 64)
        before = encoder.model.state_dict()["scale"].clone()
        torch.manual_seed(0)
        recipe = replace(recipe_for("attentive-probe", False, 32, 40, 1e-2), area=None)
        model = Classifier(encoder, 1, pool, 2, recipe)
        how = recipe, pairs, pairs, tmp_path / pool, 0, CPU, {}
        found[pool] = train_supervised(model, *how)["top1"]
        assert torch.equal(encoder.model.state_dict()["scale"], before)
    assert found["attention"] == 1.0
    assert found["mean"] < 0.7


@pytest.mark.parametrize(
    "name",
    ["random:small", pytest.param("random:swin_tiny_patch4_window7_224", marks=pytest.mark.slow)],
)
def test_an_attentive_probe_of_any_backbone_leaves_it_as_it_was(name, labelled, tmp_path):
    words = ["probe", name, labelled, labelled, "--protocol", "attentive", "--epochs", "1"]
    words += ["--seeds", "1", "--batch", "10", "--lr", "1e-2", "--out", tmp_path / "probe"]
    status, printed, error = typed(*words, "--json")
    assert status == 0, error
    row = json.loads(printed)
    assert (row["pool"], row["protocol"]) == ("attention", "attentive")
    (saved,) = (tmp_path / "probe" / "attentive-probe-seed-0" / "checkpoints").iterdir()
    state = checkpoint.load(saved)
    assert state["run"]["supervised"]["peak"] == 1e-2
    start = load_encoder(name, CPU).model.state_dict()
    assert all(torch.equal(state["model"][f"trunk.{key}"], start[key]) for key in start)
    width = state["model"]["head.weight"].shape[1]
    assert state["model"]["attend.1.latent"].shape == (1, 1, width)
    again = typed(*words, "--json")  # from what is finished
    assert json.loads(again[1]) == row
    assert "holds a result of epochs 1.0, not 2.0" in typed(*words, "--epochs", "2")[2]
    (tmp_path / "probe" / "probe-attentive.json").unlink()
    assert "another run: epochs was 1.0, is 2.0" in typed(*words, "--epochs", "2")[2]


@pytest.mark.parametrize(
    ("protocol", "words", "those"),
    [
        ("fast", ["--lr", "1e-3"], "--lr is of the protocols paper and attentive"),
        ("fewshot", ["--batch", "64"], "--batch is of the protocols paper and attentive"),
        ("fewshot", ["--epochs", "5"], "--epochs is of the protocols fast, paper and attentive"),
        ("fewshot", ["--every-block"], "--every-block is of the protocols fast, paper and"),
        ("attentive", ["--pool", "cls"], "--pool cls is of the protocols fast, fewshot and paper"),
    ],
)
def test_an_option_of_another_protocol_is_refused(labelled, protocol, words, those):
    words = ["probe", "random:small", labelled, labelled, "--protocol", protocol, *words]
    _, _, error = typed(*words)
    assert error.startswith(those)
    assert error.endswith("; leave it out")


def test_a_step_in_parts_has_the_loss_of_a_whole_one(labelled, tmp_path):
    """Ten images in parts of four, four and two: each image counts alike."""
    rows = {}
    for part in (0, 4):
        supervised(labelled, tmp_path / str(part), 1, False, micro_batch=part)
        rows[part] = (tmp_path / str(part) / "metrics.jsonl").read_text()
    whole, parts = (json.loads(text)["loss"] for text in rows.values())
    assert parts == pytest.approx(whole, rel=1e-3)


def test_layer_decay_and_augmentation(labelled):
    encoder = load_encoder("random:vit_tiny_patch16_224", CPU, 96)
    recipe = LabelRecipe(layer_decay=0.5)
    model = Classifier(encoder, 12, "mean", 4, recipe)
    groups = parameter_groups(model, recipe)
    assert [group["scale"] for group in groups] == [0.5**n for n in range(13, -1, -1)]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    registers = load_encoder("random:vit_small_patch14_reg4_dinov2", CPU, 98)
    model = Classifier(registers, 12, "mean", 4, recipe)
    found = {id(p): g["scale"] for g in parameter_groups(model, recipe) for p in g["params"]}
    for name, layer in (("cls_token", 0), ("reg_token", 0), ("norm.weight", 13)):
        assert found[id(dict(model.trunk.named_parameters())[name])] == 0.5 ** (13 - layer), name
    frames = torch.randint(0, 256, (6, 3, 96, 96)).float()
    batch = {"labels": torch.arange(6) % 4, "samples": torch.arange(6), "epochs": torch.zeros(6)}
    images, soft = augmented(frames, batch, 4, recipe, 0, 3)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    later = batch | {"epochs": torch.ones(6)}
    for other, step in ((batch, 4), (later, 3)):
        assert not torch.equal(images, augmented(frames, other, 4, recipe, 0, step)[0])
    state = torch.get_rng_state()
    assert torch.equal(images, augmented(frames, batch, 4, recipe, 0, 3)[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_finetune_and_the_papers_probe_from_the_command_line(labelled, tmp_path):
    name = "random:small"
    for words in (["finetune"], ["probe", "--protocol", "paper", "--seeds", "1"]):
        command, *options = words
        options += ["--epochs", "1", "--batch", "20", "--out", tmp_path / command]
        status, printed, error = typed(command, name, labelled, labelled, *options)
        assert status == 0, error
        assert "top-1" in printed


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(COMMANDS[0], marks=pytest.mark.slow),
        *(pytest.param(each, marks=pytest.mark.release) for each in COMMANDS[1:]),
    ],
)
def test_commands_killed_again_and_again_end_with_the_numbers_of_a_calm_run(
    command, labelled, tmp_path
):
    words = [sys.executable, "-m", "kamim", *command, "random:small", labelled, labelled]
    words += ["--epochs", "6"]
    words += ["--batch", "10"] if command != ["probe"] else []
    words += ["--seeds", "2"] if command[0] == "probe" else []

    def typed_into(out):
        subprocess.run([*words, "--out", out], check=True, capture_output=True)
        rows = [(f.parent.name, f.read_text()) for f in sorted(out.rglob("metrics.jsonl"))]
        (result,) = out.glob("*.json")
        return json.loads(result.read_text()), rows

    calm = typed_into(tmp_path / "calm")
    midway, out = 0, tmp_path / "killed"
    for number in range(5):
        process = subprocess.Popen([*words, "--out", out], stderr=subprocess.DEVNULL)
        before = len(list(out.rglob("*")))
        while process.poll() is None and len(list(out.rglob("*"))) <= before:
            time.sleep(0.01)
        time.sleep(0.15 * number)
        midway += process.poll() is None
        process.kill()
        process.wait()
    assert midway > 0
    assert typed_into(out) == calm
    assert not [*out.rglob("*.tmp")]


def resigned(folder, index):
    from shards import load
    from shards.record import npy_bytes
    from shards.spec import write, write_file

    file = write_file(folder / "index.npy", npy_bytes(index), len(index))
    write(folder, replace(load(folder), index=file))


def test_export_for_hugging_face(labelled, tmp_path):
    run(labelled, tmp_path / "run", steps=1, recipe=TINY)
    target = tmp_path / "hf.safetensors"
    assert typed("export-hf", tmp_path / "run", target)[0] == 0
    names = load_file(target)
    assert "vit.encoder.layer.1.attention.attention.query.weight" in names
    assert "exists; name another file" in typed("export-hf", tmp_path / "run", target)[2]


def test_what_is_exported_for_hugging_face_is_loaded_by_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    # `small` has 4 heads of 32 channels: no shape tells that, and published ViTs have 64.
    assert typed("export-hf", "random:small", tmp_path / "hf")[0] == 0
    images = torch.randn(2, 3, 96, 96)
    patches, cls = tokens(load_encoder("random:small", CPU), images, 4)
    theirs = transformers.ViTModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.no_grad():
        found = theirs(images).last_hidden_state
    torch.testing.assert_close(found[:, 1:], patches, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:, 0], cls, atol=1e-5, rtol=1e-4)
    assert typed("export-hf", "random:small", tmp_path / "one.safetensors")[0] == 0
    for what in (tmp_path / "hf", tmp_path / "one.safetensors"):
        torch.testing.assert_close(tokens(load_encoder(str(what), CPU), images, 4)[0], patches)
    again = typed("export-hf", "random:small", tmp_path / "hf")
    assert "exists; name another folder or remove it" in again[2]
    scaled = typed("export-hf", "random:vit_small_patch16_dinov3", tmp_path / "other")
    assert "has no place for this model" in scaled[2]
    assert not (tmp_path / "other").exists()


def test_an_ffcv_set_gives_the_features_of_the_set_it_was_made_of(labelled, tmp_path):
    encoder = load_encoder("random:small", CPU)
    for frames in ("jpeg", "raw"):
        convert_to_ffcv(labelled, tmp_path / frames, frames)
        folders = labelled, tmp_path / frames
        sets = [extract(encoder, ShardSet(f), 4, "mean", CPU, batch=16) for f in folders]
        torch.testing.assert_close(sets[0][0], sets[1][0], atol=1e-2, rtol=1e-2)
        assert torch.equal(sets[0][1], sets[1][1])


@pytest.fixture
def store(labelled, tmp_path):
    """The labelled set behind a web server."""
    served = HttpStore(labelled, tmp_path / "log")
    yield served
    served.kill()


@pytest.mark.parametrize("command", COMMANDS)
def test_sets_at_a_url_give_the_numbers_of_their_folder(command, labelled, store, tmp_path):
    options = ["--epochs", "1"] + (["--batch", "10"] if command != ["probe"] else [])
    options += ["--seeds", "1"] if command[0] == "probe" else []
    rows = []
    for places, more in (
        ([labelled, labelled], []),
        ([store.url, labelled], ["--cache", tmp_path / "cache"]),
        ([store.url, store.url], ["--cache", tmp_path / "cache"]),
    ):
        out = tmp_path / f"out{len(rows)}"
        words = [command[0], "random:small", *places, *command[1:], *options, *more]
        status, printed, error = typed(*words, "--out", out, "--json")
        assert status == 0, error
        rows.append(json.loads(printed))
        assert [rows[-1].pop("train"), rows[-1].pop("val")] == [str(place) for place in places]
    assert rows[0] == rows[1] == rows[2]
    assert list((tmp_path / "cache").glob("*/shard-000000.tar"))


@pytest.mark.slow
def test_analyse_takes_a_url_and_an_ffcv_set(labelled, store, tmp_path):
    convert_to_ffcv(labelled, tmp_path / "raw", "raw")
    convert_to_ffcv(labelled, tmp_path / "jpeg", "jpeg")
    found = []
    for where, more in (
        (labelled, []),
        (store.url, ["--cache", tmp_path / "cache"]),
        (tmp_path / "jpeg", []),
        (tmp_path / "raw", []),
    ):
        words = ["analyse", "random:small", where, "--images", "4", *more]
        status, printed, error = typed(*words, "--out", tmp_path / f"page{len(found)}", "--json")
        assert status == 0, error
        found.append(json.loads(printed)["encoders"])
    assert all(facts == found[0] for facts in found)


@pytest.mark.parametrize(
    "command", [*(pytest.param(c, marks=pytest.mark.slow) for c in COMMANDS[1:3]), COMMANDS[3]]
)
def test_training_with_labels_from_ffcv(command, labelled, tmp_path):
    if find_spec("ffcv") is None:  # to import it here would set torch's number of threads
        pytest.skip("FFCV is not installed")
    convert_to_ffcv(labelled, tmp_path / "raw", "raw")
    rows = []
    for where in (labelled, tmp_path / "raw"):
        words = [command[0], "random:small", where, where, *command[1:], "--epochs", "1"]
        words += ["--batch", "10", "--out", tmp_path / f"out{len(rows)}", "--json"]
        status, printed, error = typed(*words)
        assert status == 0, error
        rows.append(json.loads(printed))
    losses = [
        [json.loads(line)["loss"] for line in path.read_text().splitlines()]
        for out in ("out0", "out1")
        for path in sorted((tmp_path / out).rglob("metrics.jsonl"))
    ]
    half = len(losses) // 2
    assert half >= 1
    for ours, theirs in zip(losses[:half], losses[half:], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_a_cache_is_for_urls_and_urls_need_one(labelled, tmp_path):
    url = "http://127.0.0.1:9/set"
    for words, said in (
        (["probe", "random:small", url, labelled], f"{url} needs --cache"),
        (["finetune", "random:small", labelled, url], f"{url} needs --cache"),
        (["analyse", "random:small", url], f"{url} needs --cache"),
        (["probe", "random:small", labelled, labelled, "--cache", tmp_path], "is for shards at a"),
        (["analyse", "random:small", labelled, "--cache", tmp_path], "is for shards at a URL"),
    ):
        status, _, error = typed(*words)
        assert status == 1
        assert said in error


def test_large_sets_at_a_url_are_trained_on_in_windows(labelled, monkeypatch):
    records = ShardSet(labelled)
    assert windows_of(records, 0) is None
    records.copies = object()
    assert windows_of(records, 0) is None  # ten shards
    monkeypatch.setattr(kamim.evaluate.supervised, "WINDOW", 4)
    assert windows_of(records, 0).limit == 4


def test_sets_of_other_classes_are_refused(labelled, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted((tmp_path / "source").rglob("*.jpg"))[:20]:
        target = other / f"z{path.parent.name}" / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    build_shards(open_source(str(other)), tmp_path / "b", settings(frame=96, crop=96), 1)
    (other / "only").mkdir()
    for path in sorted(other.glob("z*/*.jpg")):
        path.rename(other / "only" / path.name)
    for folder in other.glob("z*"):
        folder.rmdir()
    build_shards(open_source(str(other)), tmp_path / "c", settings(frame=96, crop=96), 1)
    error = typed("probe", "random:small", labelled, tmp_path / "b")[2]
    assert error == f"{labelled} and {tmp_path / 'b'} have different classes"
    error = typed("finetune", "random:small", tmp_path / "c", labelled)[2]
    assert error == f"{tmp_path / 'c'} has 1 classes; a probe needs two or more"


def test_a_request_is_checked_before_torch_is_imported(labelled, tmp_path):
    """The last is right, and comes to torch: so this can fail."""
    commands = (
        (["probe", "nosuch.pt", "A", "B"], "nosuch.pt is no file, run folder"),
        (["probe", tmp_path, labelled, labelled], "holds no checkpoint"),
        (["probe", "timm:", labelled, labelled], "names no model"),
        (["probe", "random:small", "A", labelled], "A has no manifest.json"),
        (
            ["finetune", "random:small", labelled, labelled, "--device", "kuda"],
            "use auto, cpu, cuda or cuda:N",
        ),
        (["analyse", "nosuch.pt", labelled], "nosuch.pt is no file"),
        (["export-hf", "nosuch.pt", tmp_path / "x"], "nosuch.pt is no file"),
        (["probe", "random:small", labelled, labelled], "torch is not installed"),
    )
    ended = without_torch(*(words for words, _ in commands), cwd=tmp_path)
    for done, (_, said) in zip(ended, commands, strict=True):
        assert (done.returncode, errors(done)) == (2, 1), done
        assert said in done.stderr


def test_commands_of_evaluation_and_benchmarks_import_nothing_heavy():
    heavy = ["torch", "numpy", "cv2", "pandas", "joblib", "timm"]
    code = "import sys, kamim.evaluate.cli, kamim.bench.cli; "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.slow
def test_weights_that_cannot_be_fetched_are_one_line_after_one_call(labelled, tmp_path):
    """A server that hangs up; Hugging Face's client would call again for a minute."""
    calls = []

    class HangsUp(socketserver.BaseRequestHandler):
        def handle(self):
            calls.append(self.client_address)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangsUp) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        nobody = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}"}
        nobody |= {"HF_HOME": str(tmp_path / "cache"), "no_proxy": "127.0.0.1"}
        name, environment = "timm:vit_tiny_patch16_224", {**os.environ, **nobody}
        words = ["probe", name, labelled, labelled, "--out", tmp_path / "p"]
        done = kamim_process(*words, env=environment)
        server.shutdown()
    assert len(calls) == 1
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "kamim: the weights of timm:vit_tiny_patch16_224"
    )
    assert "connect once" in done.stderr.splitlines()[-1]
    assert "Retry" not in done.stderr
    with pytest.raises(ValueError, match="timm has no model 'vit_nothing'"):
        load_encoder("timm:vit_nothing", CPU)


def test_a_damaged_file_of_others_is_one_line(tmp_path):
    from_timm_names = {"vit.embeddings.position_embeddings": torch.zeros(1, 37, 64)}
    save_file(from_timm_names, tmp_path / "part.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"x": torch.zeros(1)}, tmp_path / "old.safetensors", {"model": "vit"})
    for name, config in (("list", "[1]"), ("brace", "{")):
        save_file(from_timm_names, tmp_path / f"{name}.safetensors", {"config": config})
    for name, words in (
        ("list", "holds no whole Hugging Face ViT"),
        ("brace", "holds no whole Hugging Face ViT"),
        ("part", "holds no whole Hugging Face ViT"),
        ("cut", "is no sound .safetensors file"),
        ("old", "does not say what it is of"),
    ):
        with pytest.raises(ValueError, match=words):
            load_encoder(str(tmp_path / f"{name}.safetensors"), CPU)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint_path": "/etc/hostname"}, "options: checkpoint_path is not to be set"),
        ({"pretrained": True}, "options: pretrained is not to be set"),
        ({"pretrained_cfg": {"url": "http://127.0.0.1/x"}}, "options: pretrained_cfg is not"),
        ({"pretrained_strict": False}, "options: pretrained_strict is not to be set"),
        ({"in_chans": 1}, "options: in_chans is not to be set"),
        ({"act_layer": "nothing"}, "timm makes no 'vit_tiny_patch16_224' with"),
        ({"img_size": "wide"}, "its options are no arguments of a model"),
        ([1], "its options are no arguments of a model"),
    ],
)
def test_a_file_of_others_has_timm_read_and_fetch_nothing(options, words, tmp_path):
    if isinstance(options, dict):
        options = {"img_size": 32} | options
    facts = {"model": "vit_tiny_patch16_224", "options": json.dumps(options)}
    save_file({"x": torch.zeros(1)}, tmp_path / "e.safetensors", facts)
    with pytest.raises(ValueError, match=words) as error:
        load_encoder(str(tmp_path / "e.safetensors"), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"run": {}},
        {"run": {"recipe": {"model": "vit_tiny_patch16_224", "size": 32, "options": [1]}}},
        {"run": {"recipe": {"model": 5, "size": 32, "options": {}}}},
        {"model": [1]},
        {"model": {"encoder.x": 1}},
        {"model": {1: torch.zeros(1)}},
    ],
)
def test_a_checkpoint_of_other_content_is_one_line(change, tmp_path):
    recipe = {"model": "vit_tiny_patch16_224", "size": 32, "options": {}}
    whole = {"version": checkpoint.VERSION, "run": {"recipe": recipe}, "model": {}}
    torch.save(whole | change, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"is no whole checkpoint|names no model") as error:
        load_encoder(str(tmp_path / "x.pt"), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [None, {}, {"input_size": [3]}])
def test_a_timm_config_without_a_size_is_one_line(size, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    text = json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": size})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json says no size"):
        load_encoder(str(tmp_path), CPU)


@pytest.mark.parametrize("text", ["{", "[1]"])
@pytest.mark.parametrize("name", ["x", "vit.embeddings.position_embeddings"])
def test_a_damaged_config_beside_tensors_is_one_line(name, text, tmp_path):
    save_file({name: torch.zeros(1, 37, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json holds no JSON object"):
        load_encoder(str(tmp_path), CPU)


def test_a_result_is_not_taken_for_that_of_other_weights_by_the_same_name(labelled, tmp_path):
    options = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "num_classes": 0}
    facts = {"model": "vit_tiny_patch16_224", "options": json.dumps(options)}
    path = tmp_path / "e.safetensors"
    words = [path, labelled, labelled, "--epochs", "1", "--batch", "20", "--out", tmp_path / "out"]
    kept = tmp_path / "out" / "finetune.json"
    for seed, said in ((0, ""), (0, ""), (1, "result of other weights"), (1, "run: other weights")):
        if said == "run: other weights":  # as if the first had been killed before its end
            kept.unlink()
        torch.manual_seed(seed)
        model = timm.create_model(facts["model"], **options)
        save_file(model.state_dict(), path, facts)
        status, _, error = typed("finetune", *words)
        assert (status == 0, said in error) == (not said, True), error


def test_results_of_other_protocols_recipes_and_seeds_lie_beside_each_other(labelled, tmp_path):
    """Each took the place of the one before it."""
    out, sets = tmp_path / "out", [labelled, labelled]
    short = ["--epochs", "1", "--batch", "20"]
    for words, name in (
        (["probe"], "probe.json"),
        (["probe", "--protocol", "attentive", *short], "probe-attentive.json"),
        (["probe", "--protocol", "paper", *short], "probe-paper.json"),
        (["probe", "--protocol", "fewshot"], "probe-fewshot.json"),
        (["finetune", *short], "finetune.json"),
        (["finetune", *short, "--seed", "1"], "finetune-seed-1.json"),
        (["finetune", *short, "--recipe", "kamim", "--seed", "1"], "finetune-kamim-seed-1.json"),
    ):
        before = {path: path.read_bytes() for path in out.glob("*.json")}
        seeds = ["--seeds", "1"] if words[0] == "probe" else []
        words = [words[0], "random:small", *sets, *words[1:], *seeds, "--out", out, "--json"]
        for _ in range(2):  # the same command may write its result again
            status, printed, error = typed(*words)
            assert status == 0, error
        after = {path: path.read_bytes() for path in out.glob("*.json")}
        assert after.keys() - before.keys() == {out / name}
        assert {path: after[path] for path in before} == before
        assert json.loads(after[out / name]) == json.loads(printed)


def test_no_result_of_another_request_is_overwritten(labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--seeds", "1", "--epochs", "1"]
    for name in "ab":
        model = timm.create_model("vit_tiny_patch16_224", **TINY_VIT)
        (tmp_path / name).mkdir()
        facts = {"model": "vit_tiny_patch16_224", "options": json.dumps(TINY_VIT)}
        save_file(model.state_dict(), tmp_path / name / "enc.safetensors", facts)
    words = [labelled, labelled, *few]
    assert typed("probe", "a/enc.safetensors", *words)[0] == 0
    kept = tmp_path / "runs" / "probe-enc.safetensors" / "probe.json"
    first = kept.read_bytes()
    for encoder, more, said in (
        ("b/enc.safetensors", [], "probe.json holds a result of other weights; move it, or name"),
        (
            "a/enc.safetensors",
            ["--block", "2"],
            "of block 1, not 2; move it, or name another --out",
        ),
        ("a/enc.safetensors", ["--every-block"], "of every_block False, not True"),
        ("a/enc.safetensors", ["--epochs", "2"], "of epochs 1, not 2"),
    ):
        status, _, error = typed("probe", encoder, *words, *more)
        assert (status != 0, said in error) == (True, True), error
        assert kept.read_bytes() == first
    # The same weights and sets by another name are no other request.
    assert typed("probe", tmp_path / "a" / "enc.safetensors", *words)[0] == 0
    for text in (b"{}", b"[1]", b"notes"):
        kept.write_bytes(text)
        assert "does not say of what weights" in typed("probe", "a/enc.safetensors", *words)[2]
        assert kept.read_bytes() == text


def test_results_go_where_git_ignores_them(labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, error = typed("probe", "random:small", labelled, labelled, "--seeds", "1")
    assert status == 0, error
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["probe-random-small"]
    assert folder_for("finetune", "a/runs/my.run") == Path("runs/finetune-my.run")
    assert folder_for("probe", "x/step-00000010.pt") == Path("runs/probe-step-00000010")
    assert folder_for("probe", "a/checkpoints/step-1.pt") == Path("runs/probe-a-step-1")
    assert folder_for("probe", "a/model.safetensors") == Path("runs/probe-a")
    assert folder_for("probe", ".") == Path(f"runs/probe-{tmp_path.name}")
    status, printed, error = typed("analyse", "random:small", labelled, "--images", "4", "--json")
    assert status == 0, error
    result = json.loads(printed)
    assert result["page"] == "runs/analysis/analysis.html"
    assert len(result["encoders"]["random:small"]["blocks"]) == 4
    page = (tmp_path / result["page"]).read_text()
    assert "<meta name=viewport" in page
    assert "random:small" in page


@pytest.mark.parametrize(("package", "extra"), [("sklearn", "train"), ("skimage", "demo")])
def test_a_package_that_analyse_lacks_is_named_first(package, extra, labelled, monkeypatch):
    real = kamim.evaluate.checks.find_spec
    monkeypatch.setattr(
        kamim.evaluate.checks, "find_spec", lambda name: None if name == package else real(name)
    )
    _, _, error = typed("analyse", "random:small", labelled)
    assert error.startswith(f"this needs {package}, which is not installed")
    assert error.endswith(f"pip install '.[{extra}]'")


def test_the_page_of_several_encoders_warns_of_collapse(labelled, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        kamim.evaluate.analyse, "waiting", lambda what: told.append(what) or nullcontext()
    )
    run(labelled, tmp_path / "run", steps=1)
    collapsed = load_encoder(str(tmp_path / "run"), CPU)
    path = checkpoint.newest(tmp_path / "run" / "checkpoints")
    state = checkpoint.load(path)
    for name, tensor in state["model"].items():
        if "attn.qkv" in name:
            tensor.zero_()
    torch.save(state, tmp_path / "flat.pt")
    words = [
        tmp_path / "run",
        tmp_path / "flat.pt",
        "random:swin_tiny_patch4_window7_224",
        labelled,
    ]
    status, _, error = typed("analyse", *words, "--out", tmp_path / "page", "--images", "4")
    assert status == 0, error
    facts = json.loads((tmp_path / "page" / "analysis.json").read_text())
    assert len(facts) == 3
    assert facts[str(tmp_path / "run")]["psnr_masked"] > 0
    assert facts[str(tmp_path / "flat.pt")]["blocks"][0]["nmi"] == 0
    page = (tmp_path / "page" / "analysis.html").read_text()
    assert "flat.pt: attention has collapsed" in page
    assert page.count("<svg ") == 3 * 4  # a column per encoder
    assert all(f">class{number}</text>" in page for number in range(4))  # t-SNE had named none
    rows = list(csv.reader(page.split("<pre>")[1].split("</pre>")[0].splitlines()))
    assert rows[0] == ["encoder", "block", "distance", "uniform", "nmi", "frequency"]
    for title, block, *values in rows[1:]:
        row = facts[title]["blocks"][int(block) - 1]
        assert [float(value) for value in values] == [row[name] for name in rows[0][2:]]
    figure = ElementTree.fromstring((tmp_path / "page" / "analysis.svg").read_text())
    assert figure.get("width") == str(3 * 340)
    panels = [each for each in figure if each.get("aria-label").startswith("attention distance")]
    axes = [[text.text for text in panel if text.get("text-anchor")] for panel in panels]
    assert axes[0] == axes[1]
    assert axes[2] == [*axes[0], "none of this kind"]  # a Swin's
    assert len(axes[0]) > 5
    for what in ("1 of 3): attention", "1 of 3): reconstructions", "3 of 3): t-SNE of tokens"):
        assert any(title.endswith(what) for title in told)  # all of it was silent
    assert sorted(path.suffix for path in (tmp_path / "page").iterdir()) == [
        ".html",
        ".json",
        ".svg",
    ]
    assert collapsed.blocks == 2
