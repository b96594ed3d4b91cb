"""Looks at the features while a run trains: what they say, what they cost, and that they change
nothing of the run.
"""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest
from conftest import settings

torch = pytest.importorskip("torch")

from test_pretrain import TINY, command, losses, run

import train.look
from kamim.evaluate.encoder import load_encoder
from preprocess import build_shards, open_source
from shards import Plan, ShardSet
from train.diagnosis import diagnose
from train.features import features_of
from train.metrics import COLLAPSED, read_metrics
from train.probe import effective_rank, linear_probe, nearest_neighbours
from train.selection import Selection

FIGURES = {"probe_top1", "knn_top1", "effective_rank", "look_seconds"}
FIGURES |= {"attention_distance", "attention_uniform", "attention_nmi"}


@pytest.fixture
def shards(built):
    return built


def looks(out):
    """{steps done: the row of a look}."""
    return {row["step"] + 1: row for row in read_metrics(out) if "look_seconds" in row}


def told(out):
    """The figures of a run's looks, without what the clock gave."""
    names = FIGURES - {"look_seconds"}
    return {done: {name: row[name] for name in names} for done, row in looks(out).items()}


def test_a_look_changes_no_loss_and_says_what_the_probe_says_of_the_same_images(
    shards, tmp_path, capsys
):
    plain = run(shards, tmp_path / "plain")
    assert run(shards, tmp_path / "looked", probe_every=1) == plain
    # 15 steps of 3 epochs; a tenth is step 2.
    assert list(looks(tmp_path / "looked")) == [1, 2, 5, 10, 15]
    row = looks(tmp_path / "looked")[15]
    assert set(row) >= FIGURES
    assert "look_seconds" not in read_metrics(tmp_path / "plain")[-1]
    said = capsys.readouterr().err
    assert "every 1 epoch, on 40 images of" in said
    assert "4 of them held out from the heads: about" in said
    assert f"20-NN {row['knn_top1']:.2%}, effective rank {row['effective_rank']:.1f}" in said

    encoder, records = load_encoder(str(tmp_path / "looked"), torch.device("cpu")), ShardSet(shards)
    batches = records.loader(Plan(40, 40, seed=0), 0, 1)
    features, labels = features_of(encoder, batches, 40, 1, "mean", torch.device("cpu"), "")
    asked, known = (features[:4], labels[:4]), (features[4:], labels[4:])
    assert row["probe_top1"] == linear_probe(known, asked, 4, seed=0).top1
    assert row["knn_top1"] == nearest_neighbours(known, asked, 4, 20)
    assert row["effective_rank"] == pytest.approx(effective_rank(features))
    uniform = diagnose(encoder.model, torch.zeros(1, 3, 96, 96))[0]["uniform"]
    assert row["attention_uniform"] == uniform


def test_a_run_stopped_between_looks_goes_on_to_the_same_bits_and_looks(shards, tmp_path):
    calm = run(shards, tmp_path / "calm", probe_every=1)
    run(shards, tmp_path / "parts", probe_every=1, steps=7)
    assert run(shards, tmp_path / "parts", probe_every=1, resume=True) == calm
    assert told(tmp_path / "parts") == told(tmp_path / "calm")
    assert list(looks(tmp_path / "parts")) == [1, 2, 5, 10, 15]


@pytest.mark.slow
def test_a_run_killed_between_looks_goes_on_to_the_same_bits_and_looks(shards, tmp_path):
    flags = ["--resume", "--probe-every", "0.5"]
    subprocess.run(command(shards, tmp_path / "calm", *flags), check=True, capture_output=True)
    rng, out = random.Random(3), tmp_path / "killed"
    for _ in range(2):
        process = subprocess.Popen(command(shards, out, *flags), stderr=subprocess.DEVNULL)
        goal = len(read_metrics(out)) + rng.randint(3, 6)
        while len(read_metrics(out)) < goal and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(shards, out, *flags), check=True, capture_output=True)
    assert losses(out) == losses(tmp_path / "calm")
    assert told(out) == told(tmp_path / "calm")
    assert len(told(out)) >= 8


def test_a_labelled_set_of_its_own_is_looked_at(shards, small_source, tmp_path, capsys):
    from typed import kamim

    build_shards(open_source(str(small_source)), tmp_path / "own", settings(frame=96, crop=96), 1)
    run(shards, tmp_path / "run", probe_every=3, probe_set=tmp_path / "own", steps=1)
    assert f"40 images of {tmp_path / 'own'}" in capsys.readouterr().err
    for path in small_source.glob("class[123]/*"):
        path.rename(small_source / "class0" / path.name)
    for number in (1, 2, 3):
        (small_source / f"class{number}").rmdir()
    none = tmp_path / "none"
    build_shards(open_source(str(small_source)), none, settings(frame=120, crop=96), 1)
    with pytest.raises(ValueError, match="none has 1 classes; a probe needs two"):
        run(shards, tmp_path / "x", probe_every=1, probe_set=none)
    run(none, tmp_path / "unlabelled", probe_every=3, steps=1)
    assert "no probe, only rank and attention" in capsys.readouterr().err
    assert FIGURES - set(looks(tmp_path / "unlabelled")[1]) == {"probe_top1", "knn_top1"}
    for number in range(3):
        source = tmp_path / "few" / f"class{number % 2}"
        source.mkdir(parents=True, exist_ok=True)
        shutil.copy(sorted(small_source.glob("class0/*"))[number], source)
    build_shards(
        open_source(str(tmp_path / "few")), tmp_path / "three", settings(frame=120, crop=96), 1
    )
    three = replace(TINY, batch=2, epochs=2)
    run(tmp_path / "three", tmp_path / "by-three", recipe=three, probe_every=1)
    assert "no probe, only rank and attention: 3 images" in capsys.readouterr().err
    done = kamim("pretrain", shards, "--probe-set", tmp_path / "own")
    assert (done.returncode, "--probe-set needs --probe-every" in done.stderr) == (2, True)
    done = kamim("pretrain", shards, "--probe-every", "1", "--probe-set", tmp_path / "nowhere")
    assert (done.returncode, "there is no folder" in done.stderr) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("converted", ["raw", "jpeg"], indirect=True)
def test_an_ffcv_set_is_looked_at_in_the_same_order(shards, converted, tmp_path):
    pytest.importorskip("ffcv")
    run(shards, tmp_path / "tar", probe_every=3, steps=1)
    run(converted, tmp_path / "ffcv", probe_every=3, steps=1)
    one, two = looks(tmp_path / "tar")[1], looks(tmp_path / "ffcv")[1]
    assert one["effective_rank"] == pytest.approx(two["effective_rank"], rel=0.02)


def test_a_look_takes_no_more_images_than_its_share_of_the_computation(shards, monkeypatch):
    """Counted in operations, not by the clock: a hundredth of what is trained in between."""

    def looked(records, every, share=train.look.SHARE):
        found = object.__new__(train.look.Looks)
        monkeypatch.setattr(train.look, "SHARE", share)
        chosen = Selection(TINY, 0, records, partial(records.plan, TINY.batch))
        fields = {"records": records, "load": lambda *a, **k: None, "selection": chosen}
        data = type("Data", (), fields)
        given = {"shards": shards, "out": shards, "recipe": TINY, "probe_every": every}
        encoder = load_encoder("random:small", torch.device("cpu")).model
        flops = 3 * train.look.model_flops(encoder, 96, ()) / 3
        found.__init__(train.look.Run(**given), data, encoder, flops, 1000, torch.device("cpu"))
        return found

    records = ShardSet(shards)
    monkeypatch.setattr(ShardSet, "__len__", lambda self: 50_000)
    usual = looked(records, 1)
    assert usual.count == pytest.approx(1500, abs=12)
    assert usual.share == pytest.approx(0.01, rel=0.01)
    assert looked(records, 10).count == pytest.approx(15_000, abs=118)
    assert looked(records, 100).count == pytest.approx(20_000, abs=157)
    assert looked(records, 0.1).count == pytest.approx(500, abs=4)  # fewer say nothing
    monkeypatch.undo()
    assert looked(records, 1).count == 40


def test_uniform_attention_is_warned_of_from_a_tenth_of_the_run_on(shards, tmp_path, capsys):
    flat = replace(TINY, peak=0.0, floor=0.0, start=0.0)  # an untrained ViT attends uniformly
    run(shards, tmp_path / "flat", recipe=flat, probe_every=1)
    rows = looks(tmp_path / "flat")
    assert rows[1]["attention_nmi"] < COLLAPSED
    assert rows[1]["attention_distance"] == pytest.approx(rows[1]["attention_uniform"], rel=0.02)
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if "attention is uniform" in line]
    assert len(warnings) == 1  # not after the first step, and once
    assert warnings[0].startswith("warning: 13% of the run is done")


def test_looks_that_cost_more_than_their_limit_say_what_takes_less(shards, tmp_path, capsys):
    run(shards, tmp_path / "run", probe_every=1, steps=5)
    row = looks(tmp_path / "run")[5]
    share = row["look_seconds"] / (40 / row["images_per_s"])
    said = capsys.readouterr().err
    assert f"{row['look_seconds']:.1f} s, {share:.1%} of the training since the last" in said
    assert (
        "of the time of training; --probe-every" in said
    )  # a second's look at an epoch of forty images


def test_tensorboard_has_the_figures_of_looks(shards, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(shards, tmp_path / "run", probe_every=1)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= FIGURES | {"loss"}
    steps = [event.step + 1 for event in events.Scalars("probe_top1")]
    assert steps == list(looks(tmp_path / "run"))


def test_the_real_wandb_gets_losses_and_looks(shards, tmp_path):
    """Offline, as where there is no network; read back from the file that it would send."""
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed: pip install wandb")
    out = tmp_path / "named"
    words = command(shards, out, "--wandb", "project", "--probe-every", "2")
    offline = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(words, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    rows = history(file)
    assert [row["loss"] for row in rows] == losses(out)
    assert [row["_step"] for row in rows] == list(range(20))
    found = {row["_step"] + 1: row for row in rows if "probe_top1" in row}
    assert found.keys() == looks(out).keys()
    for step, row in looks(out).items():
        assert {name: found[step][name] for name in FIGURES} == {
            name: row[name] for name in FIGURES
        }


def history(path):
    """The rows in a .wandb file: protocol buffers in LevelDB's log, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, rows = path.read_bytes(), 7, b"", []
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no room for a head: zeros
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last part
            record = wandb_internal_pb2.Record.FromString(whole)
            items, whole = record.history.item, b""
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in items}
            rows += [row] if row else []
    return rows
