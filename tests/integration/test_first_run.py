"""A newcomer's first runs: words, what a run says before and while it works, stopping, going on."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace

import pytest
from conftest import errors

torch = pytest.importorskip("torch")
from test_pretrain import TINY, losses, run
from typed import kamim, without_torch

import train.request
from shards.beton import convert_to_ffcv
from shards.weighting import WeightedCrops
from train import checkpoint, estimate, progress
from train.checkpoint import check_length
from train.cli import take_word
from train.distributed import Stop, Stopped
from train.metrics import read_metrics
from train.models import SimMIM, model_flops
from train.recipes import find_recipe, recipe_names
from train.request import Run
from train.schedule import learning_rate
from train.setup import find_device

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def signals():
    """Handlers as they were, after a run that changed them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_words_are_checked_before_torch_is_imported(built):
    """The last is right, and comes to torch: so this can fail."""
    said = {
        "built --recipe smal": "unknown recipe 'smal'.* did you mean small[?]",
        "built --device cudda": "--device 'cudda' is unknown",
        "built --device cuda:one": "did you mean cuda:0[?]",
        "build --device cpu": "no folder build of shards",
        "build": "did you mean built[?]",
        ".": "holds the sets built; name one",
        "built --wandb mine": "pip install wandb",
        "built --cache-limit much": "'much' is no size",
        "built --extend": "--extend needs --epochs",
        "built more": "there is no folder more of shards",
        "built more:2": "1 of 2 sets have a share",
        "built:1 built:0.5x": "built:0.5x: '0.5x' is no share; give a number, as built:0.5",
        "built --batch 8 --set batch=-4": "batch is given twice, by --batch and by --set",
        "built": "torch is not installed",
    }
    ended = without_torch(*(["pretrain", *words.split()] for words in said), cwd=built.parent)
    for done, line in zip(ended, said.values(), strict=True):
        assert (done.returncode, errors(done)) == (2, 1), done
        assert re.search(line, done.stderr), done
    assert not (built.parent / "runs").exists()


def test_a_folder_of_somebodys_files_is_no_runs(built, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"theirs")
    with pytest.raises(
        ValueError, match=r"photos holds other files \(a.jpg\); name a new or empty"
    ):
        run(built, tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == ["a.jpg"]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "slurm-7.out").write_text("theirs")
    run(built, tmp_path / "logs", steps=1)


def test_an_ffcv_set_without_ffcv_is_told_before_torch_is_imported(built, tmp_path, monkeypatch):
    convert_to_ffcv(built, tmp_path / "ffcv", "raw")
    monkeypatch.setattr(train.request, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"FFCV is not installed; type.*make ffcv"):
        train.request.check_folder(str(tmp_path / "ffcv"))
    train.request.check_folder(str(built))


@pytest.mark.slow
def test_without_a_recipe_the_default_follows_the_device_and_says_so(built):
    done = kamim("pretrain", built, "--device", "cpu", "--detector", "f")
    assert "no --recipe: demo, as this runs on cpu" in done.stderr
    assert "no maps of 'f'" in done.stderr.splitlines()[-1]


def test_a_numbered_cuda_device_is_that_one(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert [find_device(name).index for name in ("auto", "cuda", "cuda:1")] == [0, 0, 1]
    with pytest.raises(ValueError, match="torch sees 2 CUDA devices"):
        find_device("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device("cuda").index == 1
    with pytest.raises(ValueError, match="torchrun gives each process its own"):
        find_device("cuda:0")


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_cost_is_said_after_two_micro_steps_and_a_row_is_written_at_once(
    micro_batch, built, tmp_path, capsys
):
    run(built, tmp_path / "run", replace(TINY, micro_batch=micro_batch), steps=6, log_every=100)
    lines = capsys.readouterr().err.splitlines()
    (cost,) = [number for number, line in enumerate(lines) if "a step takes about" in line]
    (first,) = [number for number, line in enumerate(lines) if line.startswith("step 1/15")]
    assert (cost < first) == (micro_batch < 8)
    assert "all 6 about" in lines[cost]
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == 6
    assert rows[0]["images_per_s"] > 0


def test_hours_on_a_cpu_and_too_little_memory_are_warned_of(built, tmp_path, capsys, monkeypatch):
    (line,) = estimate.time_lines(0.5, 4, 100, CPU)
    assert line == "a step takes about 2 s, all 100 about 3 minutes"
    (line,) = estimate.time_lines(0.5, 4, 100, CPU, going_on=True)
    assert line == "a step takes about 2 s, the remaining 100 about 3 minutes"
    _, warning = estimate.time_lines(0.5, 4, 10_000, CPU)
    assert "--recipe demo" in warning
    assert len(estimate.time_lines(0.5, 4, 10_000, CUDA)) == 1
    assert 0 < estimate.memory_free(CPU) < 1e14
    monkeypatch.setattr(estimate, "memory_free", lambda device: 1e6)
    run(built, tmp_path / "run", steps=1)
    warning = next(line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "GB free; take a smaller model" in warning
    memory = estimate.Memory(1e9, 50e6)
    monkeypatch.setattr(estimate, "memory_free", lambda device: 8e9)
    (warning,) = estimate.memory_lines(memory, 256, CPU)
    assert warning.endswith("8.0 GB free; --micro-batch 99 fits")
    assert memory.needed(99) * estimate.SHARE < 8e9


def test_the_memory_needed_is_that_of_weights_and_of_what_the_backward_pass_keeps():
    class Squared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images, *hidden):
            return ((images * self.weight) ** 2).sum()  # keeps the images, and their product

    memory = estimate.memory_of(Squared(), (), 64, CPU)
    parts = [memory.needed(part) for part in (1, 10)]
    assert parts == [16 + part * 2 * 3 * 64 * 64 * 4 for part in (1, 10)]


def test_on_a_cpu_only_large_models_take_their_step_in_smaller_parts():
    small, base = find_recipe("small"), find_recipe("vit_base")
    with torch.device("meta"):
        flops = [model_flops(SimMIM(r.model, r.size, r.options), r.size) for r in (small, base)]
    assert estimate.largest_part(256, flops[0], CPU) == 256
    assert 1 <= estimate.largest_part(256, flops[1], CPU) <= 4
    assert estimate.largest_part(256, flops[1], CUDA) == 256


def interrupted_at(call, monkeypatch):
    """A Ctrl-C in the micro-step of that number."""
    calls, usual = [], WeightedCrops.forward

    def forward(self, batch):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, batch)

    monkeypatch.setattr(WeightedCrops, "forward", forward)
    return calls


def test_ctrl_c_in_the_middle_of_a_step_discards_it_and_saves_the_last_one(
    built, tmp_path, monkeypatch, signals, capsys
):
    recipe, out = replace(TINY, micro_batch=1), tmp_path / "parts"
    whole = run(built, tmp_path / "whole", recipe)
    with monkeypatch.context() as patch:
        calls = interrupted_at(3 * 8 + 4, patch)
        with pytest.raises(Stopped):
            run(built, out, recipe)
    # The rest of the step was not waited for; one more crops the images that a save shows.
    assert len(calls) == 3 * 8 + 4 + 1
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the second asks nothing
    assert checkpoint.load(checkpoint.newest(out / "checkpoints"))["step"] == 3
    assert losses(out) == whole[:3]
    assert "stopped after step 3, which is saved; go on with --resume" in capsys.readouterr().err
    assert run(built, out, recipe, resume=True) == whole


def test_ctrl_c_in_the_first_step_leaves_nothing_and_the_same_command_begins_anew(
    built, tmp_path, monkeypatch, signals, capsys
):
    recipe, out = replace(TINY, micro_batch=1), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupted_at(2, patch)
        with pytest.raises(Stopped):
            run(built, out, recipe)
    assert "the same command begins again" in capsys.readouterr().err
    assert checkpoint.newest(out / "checkpoints") is None
    assert len(run(built, out, recipe, steps=2)) == 2


def test_ctrl_c_cuts_a_pass_over_the_records_short(signals, capsys):
    stop = Stop()
    stop.listen()
    seen = []

    def look(batch):
        seen.append(batch)
        if batch == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        list(map(look, stop.heeded(range(9), 7, 1)))
    assert seen == [0, 1, 2, 3]
    assert "stopped after step 7, which is saved" in capsys.readouterr().err
    assert list(stop.heeded(range(9), 7, 2)) == list(range(9))  # several agree between steps


@pytest.mark.parametrize(
    ("words", "resume", "found"),
    [
        (["shards"], True, (["shards"], True)),
        (["shards"], False, (["shards"], False)),
        (["shards", "auto"], True, (["shards"], True)),
        (["auto", "shards", "more"], True, (["shards", "more"], True)),
        (["shards", "more", "no"], True, (["shards", "more"], False)),
        (["shards", "auto"], False, (["shards", "auto"], False)),
    ],
)
def test_resume_takes_no_word_and_still_knows_the_old_ones(words, resume, found):
    assert take_word(words, resume) == found


def times_of(folder):
    """When each file of `folder` was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_what_to_do(built, tmp_path, capsys):
    run(built, tmp_path / "run")
    assert f"look at {tmp_path / 'run' / 'reconstructions.png'}" in capsys.readouterr().err
    before = times_of(tmp_path / "run")
    run(built, tmp_path / "run", resume=True)
    assert times_of(tmp_path / "run") == before
    said = capsys.readouterr().err
    for words in ("is finished, 15 of 15 steps", "kamim probe", "kamim export", "--extend"):
        assert words in said
    run(built, tmp_path / "part", steps=4)
    before = times_of(tmp_path / "part")
    run(built, tmp_path / "part", steps=4, resume=True)
    assert "has done the 4 steps of --steps" in capsys.readouterr().err
    assert times_of(tmp_path / "part") == before


def test_a_finished_run_that_was_killed_before_its_pictures_gets_them(built, tmp_path):
    run(built, tmp_path / "run")
    (tmp_path / "run" / "reconstructions.png").unlink()
    run(built, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "reconstructions.png").exists()


@pytest.mark.parametrize(("epochs", "warned"), [(0.5, True), (1.5, False)])
def test_a_run_that_ends_before_its_random_epochs_is_warned_of(
    built, tmp_path, capsys, epochs, warned
):
    recipe = replace(TINY, sample_by="fast", random_epochs=1, epochs=epochs, warmup=0.1)
    run(built, tmp_path / "run", recipe, steps=1)
    assert ("all masks are at random: the first 1 epochs" in capsys.readouterr().err) == warned


def test_what_an_extension_and_a_long_warm_up_do_is_said(built, tmp_path, capsys):
    cooling = replace(TINY, temperature=1.0, temperature_end=0.25, epochs=1, warmup=10)
    run(built, tmp_path / "run", cooling)
    assert (
        "the warm-up takes 4 of 5 steps; shorten it by --set warmup=0.1" in capsys.readouterr().err
    )
    run(built, tmp_path / "run", replace(cooling, epochs=2), resume=True, extend=True)
    assert ", T from 0.25 to 0.69, as in a run of that length" in capsys.readouterr().err


def test_a_run_is_extended_only_when_asked_and_goes_on_to_the_last_bit(built, tmp_path, capsys):
    out, longer = tmp_path / "run", replace(TINY, epochs=5)
    short = run(built, out)
    with pytest.raises(ValueError, match="a run of 3 epochs, not of 5; add --extend"):
        run(built, out, longer, resume=True)
    with pytest.raises(ValueError, match="not of 1; go on with it by --resume --epochs 3"):
        run(built, out, replace(TINY, epochs=1), resume=True, extend=True)
    with pytest.raises(ValueError, match="holds no run to extend"):
        run(built, tmp_path / "none", longer, resume=True, extend=True)
    run(built, tmp_path / "parts")
    capsys.readouterr()
    whole = run(built, out, longer, resume=True, extend=True)
    rates = [row["lr"] for row in read_metrics(out)]
    assert rates[15:] == [learning_rate(s, 25, 2, 1.5e-3, 1e-5, 1e-6) for s in range(15, 25)]
    said = capsys.readouterr().err
    assert "extended from 15 to 25 steps: the learning rate goes from" in said
    assert f"from {rates[14]:.2e} to {rates[15]:.2e}" in said
    assert ", T from" not in said
    assert whole[:15] == short
    assert len(whole) == 25
    run(built, tmp_path / "parts", longer, resume=True, extend=True, steps=18)
    assert run(built, tmp_path / "parts", longer, resume=True) == whole
    state = checkpoint.load(checkpoint.newest(tmp_path / "parts" / "checkpoints"))
    assert state["run"]["extended"] == [[15, 3.0]]
    assert json.loads((out / "run.json").read_text())["extended"] == [[15, 3.0]]


def test_phases_of_sampling_that_would_have_begun_elsewhere_are_not_extended(tmp_path):
    asked = Run(shards=tmp_path, out=tmp_path, recipe=TINY, resume=True, extend=True)
    then = {"recipe.epochs": 10, "recipe.random_epochs": 1.0, "recipe.refresh_epochs": 5.0}
    now = {"recipe.epochs": 20, "recipe.random_epochs": 2.0, "recipe.refresh_epochs": 10.0}
    with pytest.raises(ValueError, match=r"its random_epochs of 1 would have been 2.*train again"):
        check_length(asked, then, now)


def test_weights_and_biases_without_a_login_is_one_line_before_training(
    built, tmp_path, monkeypatch
):
    class UsageError(Exception):  # as wandb 0.31 has it
        pass

    def init(**facts):
        raise UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ValueError, match=r"No API key.*type: wandb login") as caught:
        run(built, tmp_path / "run", wandb="project")
    assert "\n" not in str(caught.value)
    assert read_metrics(tmp_path / "run") == []


def test_a_terminal_shows_one_bar_and_a_log_lines(built, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(built, tmp_path / "run", steps=6, log_every=1)
    shown = terminal.getvalue()
    for words in ("making the model, 0 s", "step 6/15", "loss ", "img/s"):
        assert words in shown
    assert "waiting" not in shown  # a line of the log


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_what_takes_long_shows_signs_of_life(kind, monkeypatch):
    stream = kind()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LOG_PACE", 0.0)
    end = time.monotonic() + 300
    with progress.busy("hashing"):
        while stream.getvalue().count("hashing") < 3 and time.monotonic() < end:
            time.sleep(0.01)
    assert stream.getvalue().count("hashing, ") >= 3
    assert stream.getvalue().endswith("\r\x1b[K" if kind is Terminal else " s\n")


def test_a_long_step_is_told_of_in_a_log(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "LOG_PACE", 0.0)
    bar = progress.Progress(2, 5, 9, 64, True)
    end = time.monotonic() + 300
    with bar.running():
        bar.begin(3)
        bar.advance(16)
        while "\n" not in stream.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
    assert stream.getvalue().startswith("step 4/9: 16 of 64 images, ")


def test_the_list_of_recipes_tells_them_apart_and_is_there_as_json():
    def listed(*flags):
        line = [sys.executable, "-m", "kamim", "recipes", *flags]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout

    lines = dict(line.split(maxsplit=1) for line in listed().splitlines())
    assert lines["small"] != lines["small_mean"]
    assert "mean weight 1" in lines["small_mean"]
    assert set(lines) == set(recipe_names())
    assert json.loads(listed("--json"))["demo"]["size"] == 192
