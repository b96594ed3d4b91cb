"""Pretraining on several sets at once: the same losses however it is stopped, split and stored."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import settings

torch = pytest.importorskip("torch")
from test_pretrain import TINY, command, losses, run

import preprocess
import shards
from preprocess import build_shards, open_source
from shards import Plan, ShardSet, WeightedCrops, to_device
from shards.beton import convert_to_ffcv
from shards.spec import Edge
from shards.weighting import crop_maps
from train import checkpoint
from train.recipes import find_recipe
from train.request import take_shares

CPU = torch.device("cpu")


@pytest.fixture
def two(built, small_source, tmp_path):
    """Sets of 40 and 10 records; the second in FFCV, of other options and another edge rule."""
    fast = preprocess.detector_settings("fast", {"threshold": "20"})
    fast = replace(fast, edge=Edge([0.0, 20.0], [0.1, 1.0], "ring", 9))
    detectors = (preprocess.detector_settings("orb"), fast)
    chosen = settings(frame=120, crop=96, detectors=detectors, bank=3)
    build_shards(open_source(str(small_source / "class1")), tmp_path / "small", chosen, 1)
    convert_to_ffcv(tmp_path / "small", tmp_path / "ffcv")
    return built, tmp_path / "ffcv"


def test_stopped_and_resumed_losses_are_bitwise_those_of_a_calm_run(two, tmp_path, capsys):
    shares = {"shares": (1.0, 3.0)}
    whole = run(two, tmp_path / "whole", **shares)
    said = capsys.readouterr().err
    assert len(whole) == 18  # three epochs of 50
    assert f"{two[0]}: 12 of 50 samples an epoch, each record 0.3 times" in said
    assert f"{two[1]}: 38 of 50 samples an epoch, each record 3.8 times" in said
    assert "note: fast has other options, or another edge rule, from set to set" in said
    for stop in (4, 9):
        run(two, tmp_path / "parts", steps=stop, save_every=2, resume=True, **shares)
    assert run(two, tmp_path / "parts", resume=True, workers=1, **shares) == whole
    assert run(two, tmp_path / "bank", bank=True, steps=3) != whole[:3]


def test_a_run_goes_on_only_with_its_sets_and_shares(two, tmp_path):
    out = tmp_path / "out"
    run(two, out, steps=2)
    facts = json.loads((out / "run.json").read_text())
    prints = [ShardSet(each).manifest.fingerprint for each in two]
    assert (facts["shards"], facts["shares"]) == (prints, [40, 10])
    assert facts["shards_folder"] == [str(each) for each in two]
    for sets, how, words in (
        (two[0], {}, "shards was"),
        (two[::-1], {}, "shards was"),
        (two, {"shares": (1, 1)}, r"shares was \[40, 10\], is \[25, 25\]"),
        (two, {"window": 3}, "window was 0, is 3"),
    ):
        with pytest.raises(ValueError, match=words):
            run(sets, out, resume=True, **how)
    run(two, out, steps=3, resume=True)
    assert len(losses(out)) == 3
    run(two[0], tmp_path / "alone", steps=1)
    with pytest.raises(ValueError, match=r"shards was .*, is "):
        run(two, tmp_path / "alone", resume=True)


@pytest.mark.slow  # test_pretrain trains one set so
def test_two_processes_train_on_the_same_batches_as_one(two, tmp_path):
    words = [str(two[0]) + ":1", str(two[1]) + ":1.5"]
    one = command(words[0], tmp_path / "one", "--window", "4", "--epochs", "2", words[1])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = [sys.executable, *launcher, *one[1:]]
    both[both.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    for line in (one, both):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-4)
    assert len(losses(tmp_path / "two")) == 12


def test_ranks_have_the_parts_of_one_batch(two):
    records = shards.open(two, shares=[2, 1])
    plan, how = records.plan(12, 5, window=3), {"maps": ["fast"]}
    parts = [records.loader(plan, 2, 9, rank=rank, ranks=2, **how) for rank in (0, 1)]
    for whole, *pieces in zip(records.loader(plan, 2, 9, **how), *parts, strict=True):
        for name in ("frames", "labels", "samples", "epochs", "boxes", "flips"):
            joined = np.concatenate([getattr(each, name) for each in pieces])
            np.testing.assert_array_equal(joined, getattr(whole, name))


def test_each_sets_edge_rule_weighs_its_own_crops(two):
    records = shards.open(two)
    crops = WeightedCrops(records, "fast", size=96)
    alone = [WeightedCrops(one, "fast", size=96) for one in records.sets]
    plan = records.plan(10, 1)
    seen = set()
    for batch, tensors in to_device(records.loader(plan, 0, 10, maps=["fast"]), CPU):
        weights = crops(tensors).weights
        for place, sample in enumerate(batch.samples.tolist()):
            owner = int(sample >= 40)
            seen.add(owner)
            mine = {
                name: value[[place]] if torch.is_tensor(value) else {}
                for name, value in tensors.items()
            }
            mine["maps"] = {"fast": tensors["maps"]["fast"][[place]]}
            torch.testing.assert_close(alone[owner](mine).weights[0], weights[place])
    assert seen == {0, 1}
    sights = crops.sight(torch.tensor([0, 39, 40, 49]))
    assert torch.equal(sights[0], sights[1])
    assert not torch.equal(sights[1], sights[2])
    assert torch.equal(sights[2], alone[1].sight(None))


def test_the_edge_rule_of_each_crop_is_read_as_one_by_one():
    maps = torch.randint(256, (3, 16, 16), dtype=torch.uint8)
    boxes, flips = torch.rand(3, 4) / 2 + 0.1, torch.tensor([[0, 1], [1, 0], [1, 1]]).bool()
    sights = torch.rand(3, 6)
    together = crop_maps(maps, boxes, flips, 6, sights)
    for n in range(3):
        one = crop_maps(maps[[n]], boxes[[n]], flips[[n]], 6, sights[n])
        torch.testing.assert_close(one[0], together[n])


def test_a_dataloader_and_batches_give_the_same_crops(two):
    records = shards.open(two, shares=[1, 1])
    plan = records.plan(10, 4)
    crops = WeightedCrops(records, "fast", size=96)
    theirs = torch.utils.data.DataLoader(
        records.dataset(plan, maps=["fast"]), batch_sampler=shards.PlanSampler(plan), num_workers=2
    )
    ours = records.batches(size=96, batch=10, seed=4, weights="fast", device="cpu")
    for found, batch in zip(ours, theirs, strict=True):
        expected = crops(batch)
        for name in ("images", "weights", "labels", "samples", "epochs"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_attention_is_of_every_record_whatever_the_shares(two, tmp_path):
    recipe = replace(
        TINY, sample_by="attention", throw_ratio=0.3, mask_ratio=0.4, random_epochs=1.0
    )
    recipe = replace(recipe, refresh_epochs=1.0, epochs=2.0)
    whole = run(two, tmp_path / "a", recipe, shares=(9, 1))
    (written,) = (tmp_path / "a").glob("attention-*.npy")
    assert np.load(written).shape == (50, 36)
    assert not (np.load(written) == 255).all(axis=1).any()  # each was looked at
    run(two, tmp_path / "b", recipe, shares=(9, 1), steps=8)
    assert run(two, tmp_path / "b", recipe, shares=(9, 1), resume=True) == whole


def test_what_does_not_fit_is_one_line(two, small_source, tmp_path):
    other = tmp_path / "sift"
    detectors = (preprocess.detector_settings("sift"),)
    chosen = settings(frame=120, crop=96, detectors=detectors)
    build_shards(open_source(str(small_source)), other, chosen, 1)
    with pytest.raises(ValueError, match="sift has no maps of 'fast', only of sift; add them"):
        run((*two, other), tmp_path / "run")
    with pytest.raises(ValueError, match="the sets have no maps of one detector in common"):
        run((*two, other), tmp_path / "run", detector=None)
    plain = replace(
        find_recipe("small_simmim"), **{n: getattr(TINY, n) for n in ("options", "batch")}
    )
    run((*two, other), tmp_path / "run", plain, detector=None, steps=1)
    with pytest.raises(ValueError, match="a share of 1e-09 gives none of 50 samples"):
        run(two, tmp_path / "none", shares=(1, 1e-9))
    assert not (tmp_path / "none").exists()


def test_damage_in_any_set_is_found_before_the_first_step(two, tmp_path):
    path = two[1] / "records.beton"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"records.beton is damaged"):
        run(two, tmp_path / "run")


def test_shares_are_read_off_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:2").mkdir()
    for words, found in (
        (["a"], (["a"], None)),
        (["a", "b"], (["a", "b"], None)),
        (["a:1", "b/c:0.25"], (["a", "b/c"], (1, 0.25))),
        (["odd:2", "b"], (["odd:2", "b"], None)),
        (["odd:2:3", "s3://bucket/set:7"], (["odd:2", "s3://bucket/set"], (3, 7))),
        (["https://host:8080/set", "a:b"], (["https://host:8080/set", "a:b"], None)),
    ):
        assert take_shares(words) == found
    with pytest.raises(ValueError, match=r"1 of 2 sets have a share: give every set one, as a:1 b"):
        take_shares(["a", "b:2"])


def test_one_set_alone_trains_as_ever(built, tmp_path):
    before = run(built, tmp_path / "a", steps=4)
    assert run((built,), tmp_path / "b", steps=4) == before
    plan = shards.open(built).plan(8, 3)
    np.testing.assert_array_equal(plan.samples(7), Plan(40, 8, 3).samples(7))
    facts = checkpoint.load(checkpoint.newest(tmp_path / "b" / "checkpoints"))["run"]
    assert facts["shards"] == ShardSet(built).manifest.fingerprint
