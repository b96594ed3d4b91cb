"""Weights stored beside the densities, and the dataset card: for readers that are not ours."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import contents, settings

import preprocess
import shards
from preprocess import build_shards, open_source, redetect_maps
from shards.beton import convert_to_ffcv
from shards.remote.copy import copy_set
from shards.verification import verify_shards

BOTH = tuple(preprocess.detector_settings(name) for name in ("fast", "frequency"))


@pytest.mark.parametrize("bank", [0, 3])
def test_they_are_what_training_would_weigh_by(bank, small_source, tmp_path):
    torch = pytest.importorskip("torch")
    from shards.weighting import crop_maps, edge_rule, loss_weights, pool_counts

    detectors = BOTH[:1] if bank else BOTH
    chosen = settings(detectors=detectors, crop=96, bank=bank, weights=(0.25, 16))
    source = open_source(str(small_source))
    manifest = build_shards(source, tmp_path / "set", chosen, 1)
    assert "numpy" in manifest.versions
    assert verify_shards(tmp_path / "set", "decode") == []
    records = shards.ShardSet(tmp_path / "set")
    assert redetect_maps(records, source) == []
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.zeros(1, 2, dtype=torch.bool)
    sight = edge_rule(chosen, detectors[0], 96, 6)
    for number in range(len(records)):
        record = records[number]
        assert list(record.weights) == ["fast"]
        stored = record.weights["fast"] / 256
        if bank:
            density = pool_counts(torch.from_numpy(np.array(record.bank.counts["fast"])), 6)
        else:
            density = crop_maps(torch.from_numpy(record.maps["fast"])[None], *whole, 6, sight)
        expected = loss_weights(density, 0.25).numpy().reshape(stored.shape)
        np.testing.assert_allclose(stored, expected, atol=1 / 512 + 1e-3)
        assert stored.min() == 1
    convert_to_ffcv(tmp_path / "set", tmp_path / "ffcv")
    copy = shards.ShardSet(tmp_path / "ffcv")
    assert all(
        np.array_equal(copy[n].weights["fast"], records[n].weights["fast"]) for n in range(40)
    )


def test_adding_them_to_a_finished_set_gives_the_bytes_of_one_build(small_source, tmp_path):
    source = open_source(str(small_source))
    chosen = settings(bank=2, weights=(0.5, 8))
    build_shards(source, tmp_path / "bare", settings(), 1)
    build_shards(source, tmp_path / "whole", chosen, 1)
    build_shards(source, tmp_path / "added", chosen, 2, reuse=tmp_path / "bare")
    assert contents(tmp_path / "added") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.25", "--weights 0.25 is not T,w_ps; give it as 0.25,8"),
        ("0.25,x", "is not T,w_ps"),
        ("nan,8", "give 0.181 or more"),
        ("0.1,8", "reach beyond 255, the most that is stored; give 0.181 or more"),
        ("0.25,7", "w_ps 7 of the weights: give a divisor of the crop of 192 px"),
    ],
)
def test_a_wrong_word_is_one_line(text, words, tmp_path):
    line = [sys.executable, "-m", "kamim", "shards", "build", "demo", tmp_path / "x"]
    done = subprocess.run([*map(str, line), "--weights", text], capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_the_card_says_what_is_there_and_goes_with_the_set(small_source, tmp_path):
    chosen = settings(bank=2, weights=(0.25, 8))
    build_shards(open_source(str(small_source)), tmp_path / "set", chosen, 1)
    card = (tmp_path / "set" / "README.md").read_text()
    head, body = card.split("---\n")[1:]
    assert "path: shard-*.tar" in head
    assert "- n<1K" in head
    assert "40 images of 4 classes in 10 WebDataset shards" in body
    assert "| fast.density.npy | uint8 [16, 16]: density = value / 255 on the whole image |" in body
    assert "| fast.weights.npy | uint16 [2, 8, 8]: loss weight = value / 256 on each stored" in body
    copy_set(str(tmp_path / "set"), str(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == contents(tmp_path / "set")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    build_shards(open_source(str(small_source)), tmp_path / "mine", chosen, 1)
    assert (tmp_path / "mine" / "README.md").read_text() == "my notes"


def test_datasets_loads_a_folder_by_its_card(small_source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    build_shards(open_source(str(small_source)), tmp_path / "set", settings(bank=2), 1)
    records = shards.ShardSet(tmp_path / "set")
    rows = list(datasets.load_dataset(str(tmp_path / "set"), split="train", streaming=True))
    assert len(rows) == 40
    for number, row in enumerate(rows):
        record = records[number]
        assert row["__key__"] == record.key
        assert row["cls"] == record.label
        assert row["json"]["boxes"] == record.bank.boxes.tolist()
        np.testing.assert_array_equal(row["fast.density.npy"], record.maps["fast"])
        np.testing.assert_array_equal(row["fast.counts.npy"], record.bank.counts["fast"])
