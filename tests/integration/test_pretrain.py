"""Pretraining as a user runs it: determinism, kills, processes, refusals, export, pictures."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

torch = pytest.importorskip("torch")
import timm
from safetensors.torch import load_file

from shards.errors import UserError
from shards.files import alone
from shards.loader import Loader
from train import checkpoint, setup
from train.export import export
from train.loop import pretrain
from train.metrics import read_metrics
from train.models import encoder_options
from train.recipes import changed, find_recipe, simmim
from train.request import Run, file_of
from train.schedule import temperature

TINY = replace(
    find_recipe("small"),
    options={"embed_dim": 32, "depth": 2, "num_heads": 2},
    batch=8,
    epochs=3,
    warmup=0.5,
)


ONE = {**os.environ, "OMP_NUM_THREADS": "1"}  # a thread of torch: several processes at a time
CALM: list[float] = []


@pytest.fixture
def shards(built):
    return built


def losses(out):
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def kills_at(command, out, names):
    """Run `command` and kill it as each file of `names` is begun in `out`, and again once it is
    whole and some steps are done; how often it still ran then.
    """
    midway = 0
    for wanted in (each for name in names for each in (f"{name}*", name)):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not list(out.glob(wanted)) and process.poll() is None:
            time.sleep(0.001)
        midway += process.poll() is None
        process.kill()
        process.wait()
    return midway


def run(shards, out, recipe=TINY, **changes):
    changes = {"detector": "fast", "device": "cpu", "log_every": 4} | changes
    pretrain(Run(shards=shards, out=out, recipe=recipe, **changes))
    return losses(out)


def test_the_same_seed_gives_the_same_losses_to_the_last_bit(shards, tmp_path):
    first = run(shards, tmp_path / "a", workers=1)
    assert len(first) == 15
    assert run(shards, tmp_path / "b", workers=2) == first
    assert run(shards, tmp_path / "c", seed=1) != first


def test_stopping_between_steps_and_going_on_changes_nothing(shards, tmp_path, capsys):
    whole = run(shards, tmp_path / "whole")
    for stop in (4, 9):
        run(shards, tmp_path / "parts", steps=stop, save_every=2, resume=True)
    capsys.readouterr()
    assert run(shards, tmp_path / "parts", resume=True) == whole
    assert "going on after step 9" in capsys.readouterr().err
    a = checkpoint.load(checkpoint.newest(tmp_path / "whole" / "checkpoints"))
    b = checkpoint.load(checkpoint.newest(tmp_path / "parts" / "checkpoints"))
    assert a["step"] == b["step"] == 15
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


# What is no default, by --set: each goes on to the last bit.
OPTIONS = {
    "temperature": ["temperature_end=0.05", "temperature_form=linear"],
    "muon": ["optimizer=muon"],
    "lion": ["optimizer=lion", 'optimizer_options={"betas": [0.9, 0.98]}', "peak=1e-4"],
    "sgd": ["optimizer=sgd", "decay_all=false"],
    "ema": ["ema=0.9", "peak=1e-3"],
    "checkpoint": ["checkpoint=true", "model=vit_tiny_patch16_224", "peak=1e-3"],
    "all": ["optimizer=nadamw", "ema=0.99", "checkpoint=true", "temperature_end=1"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_stopped_run_of_any_option_goes_on_to_the_last_bit(name, shards, tmp_path):
    recipe = changed(TINY, OPTIONS[name])
    whole = run(shards, tmp_path / "whole", recipe)
    assert whole != run(shards, tmp_path / "plain")
    run(shards, tmp_path / "parts", recipe, steps=5)
    assert run(shards, tmp_path / "parts", recipe, resume=True) == whole
    a, b = (
        checkpoint.load(checkpoint.newest(tmp_path / each / "checkpoints"))
        for each in ("whole", "parts")
    )
    for part in ("model", "ema") if "ema" in a else ("model",):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


def test_a_mean_of_the_weights_is_that_of_the_formula_and_leaves_losses_alone(shards, tmp_path):
    kept, recipe = [], replace(TINY, ema=0.4)
    for step in range(1, 6):
        run(shards, tmp_path / "run", recipe, steps=step, resume=True)
        kept.append(checkpoint.load(checkpoint.newest(tmp_path / "run" / "checkpoints")))
    assert losses(tmp_path / "run") == run(shards, tmp_path / "plain", steps=5)
    name = "encoder.blocks.0.attn.qkv.weight"
    mean = kept[0]["model"][name]
    for number, state in enumerate(kept[1:], 1):
        decay = min(0.4, 1 - (1 + number) ** (-2 / 3))  # as young as it is, less
        mean = decay * mean + (1 - decay) * state["model"][name]
        assert torch.allclose(state["ema"][name], mean, rtol=1e-4, atol=1e-7)


def test_a_resumed_run_keeps_the_parts_of_its_steps(shards, tmp_path):
    """What is free on a card differs from start to start, and sums are in the order of parts."""
    whole = run(shards, tmp_path / "whole", micro := replace(TINY, micro_batch=2))
    run(shards, tmp_path / "parts", micro, steps=4)
    state = checkpoint.load(checkpoint.newest(tmp_path / "parts" / "checkpoints"))
    assert state["run"]["micro_batch"] == 2
    assert run(shards, tmp_path / "parts", resume=True) == whole
    state = checkpoint.load(checkpoint.newest(tmp_path / "parts" / "checkpoints"))
    assert state["run"]["micro_batch"] == 2
    run(shards, tmp_path / "other", micro, steps=4)
    run(shards, tmp_path / "other", replace(TINY, micro_batch=8), resume=True, steps=5)
    state = checkpoint.load(checkpoint.newest(tmp_path / "other" / "checkpoints"))
    assert state["run"]["micro_batch"] == 8  # what is asked for goes first


def test_a_copy_of_a_checkpoint_is_no_checkpoint_and_stays(shards, tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    run(shards, tmp_path / "run", steps=2)
    path = checkpoint.newest(folder)
    copies = [folder / "step-best.pt", folder / "step-00000001-mine.pt"]
    for copy in copies:
        copy.write_bytes(path.read_bytes())
    assert checkpoint.newest(folder) == file_of(str(tmp_path / "run")) == path
    run(shards, tmp_path / "run", resume=True, save_every=1, steps=6)
    assert all(copy.exists() for copy in copies)
    assert len(list(folder.glob("step-*.pt"))) == checkpoint.KEEP + 2


def test_fewer_steps_than_are_done_are_none(shards, tmp_path, capsys):
    run(shards, tmp_path / "run", steps=3)
    assert len(run(shards, tmp_path / "run", resume=True, steps=2)) == 3
    assert "has done the 2 steps" in capsys.readouterr().err


def test_a_set_of_shards_is_no_place_for_a_run(shards):
    before = sorted(shards.iterdir())
    with pytest.raises(ValueError, match="is a set of shards; name another --out"):
        run(shards, shards, steps=1)
    assert sorted(shards.iterdir()) == before


def test_a_run_of_a_newer_version_is_not_gone_on_with(shards, tmp_path):
    run(shards, tmp_path / "run", steps=2)
    path = checkpoint.newest(tmp_path / "run" / "checkpoints")
    state = checkpoint.load(path)
    state["run"]["recipe"]["soon"] = 1
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"\['soon'\], of a newer kamim"):
        run(shards, tmp_path / "run", resume=True)


@pytest.mark.parametrize("weights", ["detector", "inverse"])
def test_a_temperature_that_moves_weighs_as_it_is_at_each_step(weights, shards, tmp_path):
    recipe = replace(TINY, weights=weights, temperature=0.5, temperature_end=0.1, correct=False)
    run(shards, tmp_path / "run", recipe)
    rows = read_metrics(tmp_path / "run")
    assert [row["temperature"] for row in rows] == [temperature(s, 15, recipe) for s in range(15)]
    means = [row["mean_weight"] for row in rows]
    run(shards, tmp_path / "first", replace(recipe, temperature_end=None), steps=1)
    run(shards, tmp_path / "last", replace(recipe, temperature=0.1, temperature_end=None))
    assert means[0] == read_metrics(tmp_path / "first")[0]["mean_weight"]
    # The published form divides by T as a number, not as a tensor.
    assert means[-1] == pytest.approx(read_metrics(tmp_path / "last")[-1]["mean_weight"], rel=1e-6)
    assert "temperature" not in read_metrics(tmp_path / "last")[0]


@pytest.mark.parametrize(
    "drops", [pytest.param({}, marks=pytest.mark.slow), {"drop_path_rate": 0.5}]
)
def test_a_swin_drops_the_same_paths_after_a_stop_or_none(shards, tmp_path, drops):
    options = {"embed_dim": 24, "depths": (2, 2, 2, 2), **drops}
    recipe = replace(TINY, model="swin_tiny_patch4_window7_224", options=options, epochs=2)
    whole = run(shards, tmp_path / "whole", recipe)
    run(shards, tmp_path / "parts", recipe, steps=4)
    assert run(shards, tmp_path / "parts", recipe, resume=True) == whole


def test_checkpoints_are_written_by_the_clock_too(shards, tmp_path):
    run(shards, tmp_path / "run", steps=6, save_every=1000, save_minutes=1e-9)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000005.pt", "step-00000006.pt"]


def command(shards, out, *flags):
    chosen = ["--recipe", "small", "--batch", "8", "--epochs", "4", "--detector", "fast"]
    chosen += ["--device", "cpu", "--log-every", "1", "--save-every", "3", "--out", str(out)]
    return [sys.executable, "-m", "kamim", "pretrain", str(shards), *chosen, *flags]


@pytest.fixture
def calm(shards, tmp_path_factory):
    """The losses of `command`, in one run that nothing disturbs."""
    if not CALM:
        out = tmp_path_factory.mktemp("calm") / "run"
        subprocess.run(command(shards, out), check=True, capture_output=True, env=ONE)
        CALM.extend(losses(out))
    return CALM


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_and_resumed_losses_are_bitwise_those_of_a_calm_run(workers, shards, calm, tmp_path):
    flags = ["--workers", workers, "--resume"]
    rng, out = random.Random(int(workers)), tmp_path / "killed"
    for _ in range(2):
        line, quiet = command(shards, out, *flags), subprocess.DEVNULL
        process = subprocess.Popen(line, stderr=quiet, env=ONE)
        rows = len(read_metrics(out))
        goal = rows + rng.randint(1, 5)
        while len(read_metrics(out)) < goal and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    line = command(shards, out, *flags)
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=ONE)
    assert done.stdout.strip() == str(out)
    assert losses(out) == calm
    assert len(calm) == 20


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_says_how_to_go_on(number, shards, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(shards, out, "--epochs", "400"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while len(read_metrics(out)) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 128 + number, log
    assert "Traceback" not in log
    assert "go on with --resume" in log.splitlines()[-1]
    newest = checkpoint.newest(out / "checkpoints")
    assert checkpoint.load(newest)["step"] == len(read_metrics(out))
    assert not list((out / "checkpoints").glob("*.tmp"))


def test_two_processes_train_on_the_same_batches_as_one(shards, calm, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = [sys.executable, *launcher, *command(shards, tmp_path / "two")[1:]]
    done = subprocess.run(two, capture_output=True, text=True, env=ONE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'two'}\n"  # of one process
    assert losses(tmp_path / "two") == pytest.approx(calm, rel=2e-4)
    assert len(losses(tmp_path / "two")) == 20


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--save-every", "100"], "raise the temperature; no checkpoint was saved before that"),
        (["--save-every", "1"], "checkpoints/step-0000000"),
    ],
)
def test_a_run_that_diverges_says_what_is_sound(flags, said, shards, tmp_path):
    """It was told that the last checkpoint is sound, though there was none."""
    wild = ["--set", "peak=1e19", "--set", "warmup=0", "--log-every", "1", *flags]
    done = subprocess.run(
        command(shards, tmp_path / "run", *wild), capture_output=True, text=True, env=ONE
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("kamim: ")]
    assert "the loss is " in line
    assert said in line
    saved = list((tmp_path / "run").glob("checkpoints/step-*.pt"))
    assert [f"{path} is sound" in line for path in sorted(saved)[-1:]] == [True] * bool(saved)


def test_a_run_that_another_process_trains_is_left_to_it(shards, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    drawn = replace(TINY, select=0.5)
    with alone(out, out / ".lock"), pytest.raises(ValueError, match="another process is writing"):
        run(shards, out, drawn, resume=True)
    assert not list(out.iterdir())  # what it knows of itself, and of its records, stays its own


def test_processes_settle_as_much_whatever_they_see_of_the_run(shards, tmp_path, monkeypatch):
    """Where the folder is not seen a run is new: what it asks must meet what the others ask."""
    run(shards, tmp_path / "first", steps=1)
    asked = []
    monkeypatch.setattr("train.loop.together", lambda process, ask: asked.append(1) or ask())
    counts = []
    for steps in (1, 2):
        run(shards, tmp_path / "run", init=str(tmp_path / "first"), resume=True, steps=steps)
        counts.append(len(asked) - sum(counts))
    assert counts[0] == counts[1] > 0


def test_a_loader_of_processes_gives_the_same_losses(shards, tmp_path):
    threads = run(shards, tmp_path / "threads", steps=4)
    assert run(shards, tmp_path / "processes", steps=4, workers=2, processes=True) == threads


def test_accumulation_gives_the_gradients_of_one_large_batch(shards, tmp_path):
    whole = run(shards, tmp_path / "whole")
    parts = run(shards, tmp_path / "parts", recipe=replace(TINY, micro_batch=2))
    assert parts == pytest.approx(whole, rel=1e-4)
    norms = [
        [row["grad_norm"] for row in read_metrics(tmp_path / name)] for name in ("whole", "parts")
    ]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-5)  # later ones drift by rounding


def test_plain_simmim_and_a_temperature_without_end_agree(shards, tmp_path):
    plain = run(shards, tmp_path / "plain", recipe=simmim(TINY))
    flat = run(shards, tmp_path / "flat", recipe=replace(TINY, temperature=1e9))
    weighted = run(shards, tmp_path / "weighted")
    assert flat == plain
    assert weighted[0] > plain[0]


def test_the_end_of_a_run_leaves_pictures_metrics_and_a_model_for_timm(shards, tmp_path):
    out = tmp_path / "run"
    run(shards, out)
    import cv2

    picture = cv2.imread(str(out / "reconstructions.png"))
    assert min(picture.shape[:2]) > 200
    assert picture.std() > 5
    side = (picture.shape[1] - 3 * 4) // 4  # four columns, with gaps between them
    assert (picture.shape[0] - 28) % (side + 4) == side
    assert (picture[:, side : side + 4] == 255).all()
    assert (picture[28 + side : 28 + side + 4] == 255).all()
    (out / "reconstructions.png").unlink()  # as if it had been killed before it drew
    run(shards, out, resume=True)
    assert (out / "reconstructions.png").exists()
    last = read_metrics(out)[-1]
    assert {"epoch", "loss", "lr", "grad_norm", "mean_weight", "images_per_s", "waiting"} <= set(
        last
    )
    assert list((out / "tensorboard").glob("events*"))
    assert json.loads((out / "run.json").read_text())["detector"] == "fast"

    target = tmp_path / "encoder.safetensors"
    source = checkpoint.newest(out / "checkpoints")
    assert "timm.create_model('vit_tiny_patch16_224', img_size=96" in export(source, target)
    encoder = timm.create_model(TINY.model, **encoder_options(TINY.model, TINY.size, TINY.options))
    encoder.load_state_dict(load_file(target), strict=True)
    from train.models import SimMIM

    model = SimMIM(TINY.model, TINY.size, TINY.options)
    model.load_state_dict(checkpoint.load(source)["model"])
    image = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model.encoder.eval().forward_features(image)
        assert torch.equal(encoder.eval().forward_features(image), expected)
        seen = model.eval()._vit(image, torch.zeros(2, 3, 3, dtype=torch.bool))
        torch.testing.assert_close(seen.flatten(2).transpose(1, 2), expected[:, 1:])
    with pytest.raises(ValueError, match="exists"):
        export(source, target)


def test_what_does_not_fit_is_one_clear_line_before_the_first_step(shards, tmp_path, capsys):
    cases = [
        ({"detector": "sift"}, TINY, "no maps of 'sift', only of fast, orb"),
        ({"detector": None}, TINY, "maps of fast, orb; choose one"),
        ({}, replace(TINY, size=100), "100 is no multiple of the mask cell"),
        ({}, replace(TINY, size=160), r"maps of 16 cells per side cannot serve 20 weight cells"),
        ({}, replace(TINY, w_ps=7), "w_ps 7 does not divide"),
        ({}, replace(TINY, temperature_end=0.0), "temperature_end 0.0 is out of range"),
        ({}, replace(simmim(TINY), temperature_end=0.5), "the recipe has no weights"),
        ({}, replace(TINY, batch=10_000), "make no batch of 10000"),
        ({}, replace(TINY, model="vit_giant_patch3_1"), "timm has no model"),
        ({}, replace(TINY, optimizer="adamv"), "timm has no optimizer 'adamv'; did you mean adam"),
        ({}, replace(TINY, optimizer="adahessian"), "timm has no optimizer 'adahessian'"),
        ({}, changed(TINY, ['optimizer_options={"beta": 1}']), "'adamw' cannot be made: .*'beta'"),
        ({}, replace(TINY, ema=1.0), "ema 1.0 is out of range"),
        ({}, replace(TINY, temperature=0.0), "temperature 0.0 is out of range"),
        ({"seed": 1 << 64}, TINY, r"seed 1.84467e\+19 is out of range; give 0 or more, below 2"),
        ({"device": "cuda:9"}, TINY, "no CUDA device"),
    ]
    for changes, recipe, words in cases:
        if changes.get("device") and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=words):
            run(shards, tmp_path / "out", recipe=recipe, **changes)
        assert not (tmp_path / "out").exists()
    capsys.readouterr()
    run(shards, tmp_path / "enlarged", recipe=replace(TINY, size=128, w_ps=16, epochs=0.3))
    assert "warning: frames of 120 px are enlarged for crops of 128 px" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("warmup=nan", "warmup nan is out of range; give 0 or more"),
        ("peak=-1", "peak -1 is out of range"),
        ("floor=inf", "floor inf is out of range"),
        ("clip=-1", "clip -1 is out of range"),
        ("batch=0", "batch 0 is out of range; give 1 or more"),
        ("micro_batch=-1", "micro_batch -1 is out of range; give 0 or more"),
        ("cell=0", "cell 0 is out of range"),
        ("area=-1,1", "area -1 is out of range"),
        ("area=0,1", "area 0 to 1 is out of range"),
        ("mask_ratio=nan", "mask_ratio nan is out of range"),
        ("random_epochs=inf", "random_epochs inf is out of range"),
        ("decoder=12,1,0", "decoder 0 is out of range; give 1 or more"),
        ('optimizer_options={"betas": [0.9]}', "'adamw' cannot be made"),
        ("optimizer_options.lr=0.5", "optimizer_options.lr would not count; set peak instead"),
        ("optimizer_options.weight_decay=0.9", "would not count; set weight_decay instead"),
    ],
)
def test_a_number_that_no_run_can_have_is_one_line(word, said, shards, tmp_path):
    with pytest.raises(UserError, match=said):
        run(shards, tmp_path / "out", recipe=changed(TINY, [word]))
    assert not (tmp_path / "out").exists()


def test_damaged_shards_are_refused_before_the_first_step(shards, tmp_path):
    path = shards / "shard-000003.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000003.tar is damaged"):
        run(shards, tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-000003.tar is missing"):
        run(shards, tmp_path / "out")
    text = (shards / "manifest.json").read_text()
    (shards / "manifest.json").write_text(
        text.replace('"format_version": 3', '"format_version": 1')
    )
    with pytest.raises(ValueError, match="format version 1, this kamim reads version 3"):
        run(shards, tmp_path / "out")


def test_training_on_the_bank_resumes_to_the_last_bit(shards, tmp_path):
    whole = run(shards, tmp_path / "whole", bank=True)
    assert whole != run(shards, tmp_path / "maps")
    run(shards, tmp_path / "parts", steps=7, bank=True)
    with pytest.raises(ValueError, match="bank was True, is False"):
        run(shards, tmp_path / "parts", resume=True)
    assert run(shards, tmp_path / "parts", bank=True, resume=True) == whole
    simmim = replace(TINY, temperature=None)
    assert len(run(shards, tmp_path / "simmim", recipe=simmim, bank=True)) == 15


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 128}, "the bank's crops have size 96, the recipe's 128"),
        ({"area": (0.5, 1.0)}, "have area"),
        ({"vertical": 0.0}, "have vertical 0.5, the recipe's 0.0"),
        ({"w_ps": 12}, "w_ps 12 is no multiple of the bank's 8 px"),
    ],
)
def test_a_bank_of_other_crops_is_refused(changes, words, shards, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(shards, tmp_path / "out", recipe=replace(TINY, **changes), bank=True)


def test_a_run_goes_on_only_as_itself(shards, tmp_path, monkeypatch):
    run(shards, tmp_path / "out", steps=4)
    with pytest.raises(ValueError, match=r"holds a run already \(to step 4\).*--resume, or"):
        run(shards, tmp_path / "out")
    with pytest.raises(ValueError, match=r"recipe.peak was 0.0015, is 0.1"):
        run(shards, tmp_path / "out", recipe=replace(TINY, peak=0.1), resume=True)
    with pytest.raises(ValueError, match=r"seed was 0, is 1"):
        run(shards, tmp_path / "out", seed=1, resume=True)
    with pytest.raises(ValueError, match=r"window was 0, is 3"):
        run(shards, tmp_path / "out", window=3, resume=True)
    monkeypatch.setattr(setup, "check_decoding", lambda *_: None)  # as on a GPU
    with pytest.raises(ValueError, match=r"decode was cpu, is gpu"):
        run(shards, tmp_path / "out", decode="gpu", resume=True)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/kamim-was-here",)


def test_nothing_is_unpickled_from_a_checkpoint(tmp_path):
    path = tmp_path / "step-00000001.pt"
    torch.save({"version": 1, "step": 1, "model": Evil()}, path)
    with pytest.raises(ValueError, match="no sound checkpoint"):
        checkpoint.load(path)
    assert not os.path.exists("/tmp/kamim-was-here")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no sound checkpoint"):
        checkpoint.load(path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="not loaded; remove it, and the checkpoint before it"):
        checkpoint.load(checkpoint.chosen(tmp_path))
    with pytest.raises(ValueError, match=r"there is no .*nowhere; name a run of `kamim pretrain`"):
        checkpoint.chosen(tmp_path / "nowhere")


def test_a_damaged_record_stops_the_run_or_is_counted(shards, tmp_path):
    """A record whose damage was there when the shards were signed."""
    from test_loader import damage

    from shards import ShardSet

    damage(ShardSet(shards), 17, "frame", b"\0" * 60)
    with pytest.raises(ValueError, match="record 000000017 has a frame"):
        run(shards, tmp_path / "out")
    run(shards, tmp_path / "skipped", skip_damaged=True, probe_every=1)
    assert read_metrics(tmp_path / "skipped")[-1]["damaged"] == 1


@pytest.mark.parametrize("error", [UserError("the store is gone"), OSError(5, "I/O error")])
@pytest.mark.parametrize("micro_batch", [0, 4])
def test_what_cannot_be_loaded_loses_no_step(
    shards, tmp_path, monkeypatch, capsys, error, micro_batch
):
    recipe = replace(TINY, micro_batch=micro_batch)
    whole = run(shards, tmp_path / "whole", recipe)
    finish = Loader._finish

    def failing(loader, pending):
        if pending.batch.step == 9:
            raise error
        return finish(loader, pending)

    monkeypatch.setattr(Loader, "_finish", failing)
    with pytest.raises(type(error)):
        run(shards, tmp_path / "out", recipe)
    assert "step 9 is saved" in capsys.readouterr().err
    assert checkpoint.newest(tmp_path / "out" / "checkpoints").name == "step-00000009.pt"
    assert len(losses(tmp_path / "out")) == 9
    with pytest.raises(type(error)):  # nothing is done, and nothing is lost
        run(shards, tmp_path / "out", recipe, resume=True)
    monkeypatch.undo()
    assert run(shards, tmp_path / "out", recipe, resume=True) == whole


@pytest.mark.parametrize("what", ["train.loop.follow", "train.look.Looks.look"])
def test_pictures_that_cannot_be_loaded_lose_no_step(shards, tmp_path, monkeypatch, capsys, what):
    def gone(*_):
        raise OSError(5, "Input/output error", "shard-000000.tar")

    asked = {"save_every": 6, "probe_every": 1, "log_every": 3}
    whole = run(shards, tmp_path / "whole", **asked)
    monkeypatch.setattr(what, gone)
    with pytest.raises(OSError, match="shard-000000"):
        run(shards, tmp_path / "out", **asked)
    done = len(losses(tmp_path / "out"))
    assert f"step {done} is saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(shards, tmp_path / "out", resume=True, **asked) == whole


@pytest.mark.parametrize("save_every", [2, 500])  # the write before fails, or the last one
def test_a_disk_that_is_full_as_well_does_not_hide_what_was_wrong(
    shards, tmp_path, monkeypatch, capsys, save_every
):
    def damaged(*_):
        raise UserError("record 17 is damaged")

    def full(*_):
        raise OSError(28, "No space left on device")

    finish = Loader._finish
    late = lambda loader, pending: (damaged if pending.batch.step == 3 else finish)(loader, pending)  # noqa: E731
    monkeypatch.setattr(Loader, "_finish", late)
    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match="the disk is full"):
        run(shards, tmp_path / "out", save_every=save_every)
    said = capsys.readouterr().err
    assert "record 17 is damaged" in said
    assert "is saved" not in said


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: what it is told, in order."""
    told = []

    def init(**facts):
        told.append(facts)
        return SimpleNamespace(
            log=lambda row, step: told.append(row), finish=lambda: told.append("finished")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return told


def test_weights_and_biases_gets_every_row(shards, tmp_path, wandb, monkeypatch):
    """And is closed."""
    found = run(shards, tmp_path / "named", wandb="project")
    assert wandb[0]["project"] == "project"
    assert wandb[0]["name"] == "named"
    assert [row["loss"] for row in wandb[1:-1]] == found
    assert wandb[-1] == "finished"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        run(shards, tmp_path / "other", wandb="project")


def test_weights_and_biases_has_one_run_for_each_of_ours(shards, tmp_path, wandb, monkeypatch):
    """Its id was the folder's name, which other runs have too, and `.` has none."""

    def known(out, steps, **options):
        del wandb[:]
        run(shards, out, wandb="project", steps=steps, **options)
        return wandb[0]["id"], wandb[0]["name"]

    one, two = (tmp_path / name / "seed0" for name in "xy")
    first = known(one, 2)
    assert known(one, 4, resume=True) == first
    second = known(two, 2)
    assert second[0] != first[0]
    shutil.rmtree(one)
    third = known(one, 2)
    assert third[0] not in (first[0], second[0])
    (one / "wandb.txt").unlink()  # as of a run that was begun without --wandb
    fourth = known(one, 4, resume=True)
    assert fourth[0] not in (first[0], second[0], third[0], "")
    assert known(one, 6, resume=True) == fourth
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    number, name = known(Path("."), 2)
    assert (len(number), name) == (16, "here")


@contextmanager
def nodes(*lines):
    """torchrun on as many machines as `lines`, all of them this one, one process each."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    launcher += ["--nnodes", str(len(lines)), "--master-addr", "127.0.0.1", "--master-port", port]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options |= {"env": ONE, "start_new_session": True}
    started = [
        subprocess.Popen([*launcher, "--node-rank", str(number), *line[1:]], **options)
        for number, line in enumerate(lines)
    ]
    try:
        yield started
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def on_nodes(*lines):
    """(exit status, stderr) of each of the `nodes`."""
    with nodes(*lines) as started:
        logs = [process.communicate(timeout=150)[1] for process in started]
        return [(process.returncode, log) for process, log in zip(started, logs, strict=True)]


def test_the_torchrun_lines_of_the_page_are_those_that_are_tested():
    from torch.distributed.run import get_args_parser

    page = (REPOSITORY / "docs" / "clusters.md").read_text().replace("\\\n", "")
    lines = [line.split()[1:] for line in page.splitlines() if line.startswith("torchrun")]
    ranks = []
    for line in lines:
        read = get_args_parser().parse_args(line)
        assert (read.nnodes, read.module, read.training_script) == ("2", True, "kamim")
        assert (read.master_addr, read.master_port) == ("HOST", 29500)
        ranks.append(read.node_rank)
    assert ranks == [0, 1]


@pytest.mark.slow
def test_two_nodes_train_as_one_process_and_either_goes_on_with_the_other(shards, tmp_path):
    """Node 1 has shards and a run folder of its own: it writes nothing, and hashes its copy."""
    shutil.copytree(shards, tmp_path / "copy")
    whole, parts, own = (tmp_path / name for name in ("whole", "parts", "own"))
    done = subprocess.run(command(shards, whole), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = on_nodes(
        command(shards, parts, "--steps", "7"), command(tmp_path / "copy", own, "--steps", "7")
    )
    assert [status for status, _ in ends] == [0, 0], ends
    assert not own.exists()
    names = sorted(path.name for path in (parts / "checkpoints").iterdir())
    assert names == ["step-00000006.pt", "step-00000007.pt"]
    assert ends[0][1].count("step 7/20") == 1
    assert "step 7/20" not in ends[1][1]

    # One process goes on with the run of two nodes, then two nodes with the run of one.
    on_one = command(shards, parts, "--resume", "--steps", "12")
    subprocess.run(on_one, check=True, capture_output=True)
    ends = on_nodes(*[command(shards, parts, "--resume")] * 2)
    assert [status for status, _ in ends] == [0, 0], ends
    assert "going on after step 12" in ends[0][1]
    assert losses(parts) == pytest.approx(losses(whole), rel=2e-4)
    assert len(losses(parts)) == 20

    # A node that does not see the run, or whose copy of the shards is damaged, stops them all.
    first = command(shards, parts, "--resume")
    for _, log in on_nodes(first, command(shards, own, "--resume")):
        assert "after step 20" in log
        assert "must be one folder that all machines see" in log
    path = tmp_path / "copy" / "shard-000003.tar"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    new = tmp_path / "new"
    for _, log in on_nodes(command(shards, new), command(tmp_path / "copy", new)):
        assert "shard-000003.tar is damaged" in log
    assert not new.exists()
