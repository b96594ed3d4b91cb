"""The experiment of docs/results/keypoints in a tiny form: it goes on, and is judged as planned."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
from archives import tar_bytes
from conftest import REPOSITORY, settings
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

import preprocess
from kamim.bench.markdown import renewed_parts
from kamim.experiment import keypoints, page
from kamim.experiment.__main__ import app
from kamim.experiment.data import load_cifar, load_photos, pack
from kamim.experiment.keypoints import FULL, MAIN, TINY, key, read, tasks, tune
from kamim.experiment.measure import probe
from kamim.experiment.steps import make_order
from shards.errors import UserError
from train.probe import effective_rank, nearest_neighbours

RESULTS = REPOSITORY / "docs" / "results" / "keypoints"


@pytest.fixture
def data(small_source, tmp_path, build_once):
    """40 photos and 80 images of four classes in place of CIFAR-10's."""
    detectors = tuple(map(preprocess.detector_settings, ("fast", "orb", "sift")))
    chosen = settings(frame=128, crop=96, grid=24, detectors=detectors)
    build_once(small_source, tmp_path / "photos", chosen)
    for split in ("train", "test"):
        files = {}
        for path in sorted(small_source.glob("*/*.jpg")):
            small = cv2.resize(cv2.imread(str(path)), (32, 32))
            files[f"{split}/{path.parent.name}/{path.name}"] = cv2.imencode(".jpg", small)[
                1
            ].tobytes()
        (tmp_path / f"{split}.tar").write_bytes(tar_bytes(files.items()))
    pack(tmp_path / "photos", tmp_path, tmp_path / "data", 10, 10)
    return tmp_path / "data"


def command(data, out, *more):
    words = ["run", "--tiny", "--device", "cpu", "--data", data, "--out", out, *more]
    return [sys.executable, "-m", "kamim.experiment", *map(str, words)]


@pytest.mark.slow
def test_an_experiment_goes_on_after_whole_lines(data, tmp_path):
    out, size = tmp_path / "out", replace(TINY, methods=("mae",))
    for folder in ("out", "first", "again"):
        (tmp_path / folder).mkdir()
    keypoints.work(data, out, tmp_path / "first", size, "cpu", False, float("inf"))
    whole = (out / "runs.jsonl").read_text().splitlines(keepends=True)
    wanted = [*tune(size), *tasks(size, {"mae": 1e-3})]
    assert [key(row) for row in read(out / "runs.jsonl")] == [key(asdict(task)) for task in wanted]
    (out / "runs.jsonl").write_text("".join(whole[:2]) + whole[2][:30])  # what a kill may leave
    keypoints.work(data, out, tmp_path / "again", size, "cpu", False, float("inf"))
    again = (out / "runs.jsonl").read_text().splitlines(keepends=True)
    assert again[:2] == whole[:2]
    assert list(map(key, map(json.loads, again))) == [key(asdict(task)) for task in wanted]


def test_what_a_dead_process_had_claimed_is_free(tmp_path):
    line = "import sys, pathlib; from kamim.experiment.keypoints import claimed; "
    line += "print(claimed(pathlib.Path(sys.argv[1]), 'a'), flush=True); input()"
    words = [sys.executable, "-c", line, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"True\n"
        assert not keypoints.claimed(tmp_path, "a")
        process.kill()
    assert keypoints.claimed(tmp_path, "a")
    assert not keypoints.claimed(tmp_path, "a")


@pytest.mark.slow
def test_a_killed_experiment_goes_on_where_it_was(data, tmp_path):
    out = tmp_path / "out"
    running = subprocess.Popen(command(data, out), stderr=subprocess.PIPE, start_new_session=True)
    while len(read(out / "runs.jsonl")) < 2 and running.poll() is None:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    first = read(out / "runs.jsonl")
    with (out / "runs.jsonl").open("a") as file:
        file.write('{"stage": "main", "arm"')  # what a kill may leave
    done = subprocess.run(command(data, out), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = read(out / "runs.jsonl")
    assert rows[: len(first)] == first
    wanted = [*tune(TINY), *tasks(TINY, dict.fromkeys(TINY.methods, 1e-3))]
    assert sorted(map(key, rows)) == sorted(key(asdict(task)) for task in wanted)
    assert all(row["finite"] and len(row["looks"][-1]["attention"]) == 3 for row in rows)

    text = (out / "README.md").read_text()
    assert "Tuning, with uniform weights" in text
    facts = json.loads((out / "results.json").read_text())["provenance"]
    assert facts["runs"] == len(rows)
    assert facts["device"] == ["cpu"]
    with pytest.raises(UserError, match="another --out"):
        keypoints.check_same(replace(TINY, steps=5), out)


@pytest.mark.parametrize("method", keypoints.METHODS)
def test_arms_share_crops_and_masks_and_differ_by_their_weights(method, data):
    bench = keypoints.Bench(data, torch.device("cpu"), TINY, fast=False)
    logs = {}
    for arm in keypoints.ARMS:
        task = keypoints.Task("main", method, arm, 0, 1e-3, 3, 8, TINY.model)
        trainer, order = bench.make(task)
        trainer.train(order, keypoints.ARMS[arm], task.rate, {})
        logs[arm] = trainer.log.clone()
    assert bench.order[1] is order  # the first arm's still
    assert torch.isfinite(torch.stack(list(logs.values()))).all()
    first = {arm: float(log[0, 0]) for arm, log in logs.items()}
    assert first["times26"] == pytest.approx(26 * first["uniform"], rel=1e-4)
    assert len({round(value, 6) for value in first.values()}) == len(first)
    share = {arm: float(log[0, 2]) for arm, log in logs.items()}
    # The same weights in other places: as uneven.
    assert [share["contrast"], share["shuffled"]] == pytest.approx([share["fast"]] * 2, rel=1e-5)
    trainer.train(order, keypoints.ARMS["kamim"], 1e-3, {})
    assert torch.equal(trainer.log, logs["kamim"])  # every run begins anew


def test_photos_kept_out_are_in_no_step(data):
    photos = load_photos(data, 96, 12, torch.device("cpu"))
    kept, held = photos.split()
    assert (len(kept.frames), len(held.frames)) == (35, 5)
    frames = {each.numpy().tobytes() for each in kept.frames}
    assert not any(each.numpy().tobytes() in frames for each in held.frames)
    recipe = keypoints.recipe_of(tune(TINY)[0], TINY)
    order = make_order(kept, recipe, 0, 20)
    assert int(order.samples.max()) < 35
    assert len(order.samples.unique()) == 35
    heights, widths = (order.boxes[..., axis].flatten() for axis in (2, 3))
    assert ((heights * widths > 0.07) & (heights * widths < 0.31)).all()
    assert torch.equal(order.cells.long().sort(2).values, torch.arange(36).expand_as(order.cells))


def test_cifar_is_read_in_the_order_of_its_classes(data):
    train, test = load_cifar(data, torch.device("cpu"))
    assert train.images.shape == (40, 32, 32, 3)
    assert test.labels.tolist() == [label for label in range(4) for _ in range(10)]
    assert set(zipfile.ZipFile(data / "cifar.npz").namelist()) >= {
        "train_bytes.npy",
        "test_ends.npy",
    }


def test_probes_find_what_is_there_and_no_more():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    noise = torch.randn(600, 16, generator=generator)
    told = noise + 6 * torch.nn.functional.one_hot(labels, 16)
    train, test = slice(0, 400), slice(400, 600)
    for features, least, most in ((told, 0.95, 1), (noise, 0.2, 0.5)):
        known, asked = (features[train], labels[train]), (features[test], labels[test])
        assert least <= probe(known, asked)["top1"] <= most
        assert least <= nearest_neighbours(known, asked, 3) <= most
    assert effective_rank(noise) > 14
    assert effective_rank(torch.outer(noise[:, 0], noise[0])) == pytest.approx(1, abs=0.01)


def row(method, arm, seed, top1, **changes):
    """A made-up main run."""
    attention = [{"block": 1, "distance": 40.0, "uniform": 49.0, "nmi": 0.2}]
    look = {
        "step": 100,
        "top1": top1,
        "knn": 0.3,
        "retrieval": 0.1,
        "rank": 9.0,
        "held_loss": 1.0,
        "held_loss_fast": 0.9 if arm == "fast" else 1.1,
        "attention": attention,
    }
    untrained = [look | {"step": 0, "top1": 0.2}] if arm == "uniform" else []
    return {
        "stage": "main",
        "method": method,
        "arm": arm,
        "seed": seed,
        "finite": True,
        "looks": [*untrained, look],
        **changes,
    }


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((1.0, 1.2, 0.9, 1.1, 1.0), "yes"),
        ((0.2, 0.22, 0.21, 0.2, 0.19), "yes, by less than 0.5 points"),
        ((0.0, 0.1, -0.1, 0.0, 0.05), "no"),
        ((-1.0, -1.2, -0.9, -1.1, -1.0), "no: it hurts"),
        ((2.0, -2.0, 3.0, -1.0, 0.0), "undecided"),
        ((1.0, 1.01), "undecided"),
    ],
)
def test_verdicts_are_those_of_the_plan(gains, said):
    rows = []
    for seed, gain in enumerate(gains):
        rows += [row("mae", arm, seed, 0.4) for arm in MAIN if arm != "fast"]
        rows.append(row("mae", "fast", seed, 0.4 + gain / 100))
    found = page.verdicts(rows)
    assert {each["verdict"] for each in found} == {said}
    # A run that diverged takes its pair with it.
    worse = [*rows, row("mae", "uniform", 9, 0.9, finite=False), row("mae", "fast", 9, 0.1)]
    assert page.verdicts(worse) == found
    assert "it cannot answer" not in page.able(rows, "mae")[0]
    assert "the weights did nothing" not in page.able(rows, "mae")[0]
    poor = [row("mae", "uniform", 0, 0.205), row("mae", "fast", 0, 0.3)]
    assert "it cannot answer" in page.able(poor, "mae")[0]


def tuned(size, best=1e-3):
    """Made-up tuning runs, of which `best` is."""
    look = {"chosen_on": 0.1}
    return [
        asdict(task) | {"looks": [look | {"chosen_on": 0.2}] if task.rate == best else [look]}
        for task in tune(size)
    ]


@pytest.mark.parametrize("out", [[], ["--out", str(RESULTS)]])
def test_a_tiny_check_does_not_replace_the_kept_one(out, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(keypoints, "checked", lambda *_: pytest.fail("it checked"))
    result = CliRunner().invoke(app, ["check", "--tiny", *out])
    assert isinstance(result.exception, UserError)
    assert "check.json, by which runs choose their steps; add --out" in str(result.exception)


def test_a_tiny_check_in_another_folder_is_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(keypoints, "checked", lambda *_: {"steps": 7})
    words = ["check", "--tiny", "--device", "cpu", "--out", str(tmp_path / "new")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert json.loads((tmp_path / "new" / "check.json").read_text()) == {"steps": 7}


def test_tuning_of_another_length_does_not_count(tmp_path):
    short, rates = replace(FULL, steps=1000), dict.fromkeys(FULL.methods, 1e-3)
    assert keypoints.chosen(tuned(short), short) == rates
    assert keypoints.chosen(tuned(short), FULL) == {}
    for row in tuned(short):
        keypoints.write(tmp_path / "runs.jsonl", row)
    assert len(list(keypoints.todo(short, tmp_path))) == len(tasks(short, rates))
    assert list(keypoints.todo(FULL, tmp_path)) == tune(FULL)
    keypoints.check_same(short, tmp_path)
    for other in (FULL, replace(short, batch=8), replace(short, model="vit_small_patch16_224")):
        with pytest.raises(UserError, match="another --out, or the same --steps") as raised:
            keypoints.check_same(other, tmp_path)
        assert "tune simmim uniform 99, 500 steps of 512 at a rate of 0.0005;" in str(raised.value)


def test_runs_at_another_rate_than_the_chosen_one_are_refused(tmp_path):
    path, rates = tmp_path / "runs.jsonl", dict.fromkeys(FULL.methods, 1e-3)
    for row in [*tuned(FULL), *map(asdict, tasks(FULL, rates))]:  # of all stages
        keypoints.write(path, row)
    keypoints.check_same(FULL, tmp_path)
    keypoints.write(path, asdict(tasks(FULL, rates)[0]) | {"rate": 5e-4})
    with pytest.raises(UserError, match=r"main simmim uniform 0, .* at a rate of 0\.0005;"):
        keypoints.check_same(FULL, tmp_path)


def test_the_runs_that_are_kept_are_of_the_plan():
    steps = json.loads((RESULTS / "check.json").read_text())["steps"]
    keypoints.check_same(replace(FULL, steps=steps), RESULTS)


def test_runs_that_diverged_are_not_in_the_means_on_the_way():
    rows = [row("mae", "fast", 0, 0.4), row("mae", "fast", 1, 0.5)]
    worse = [*rows, row("mae", "fast", 2, 0.1, finite=False)]
    assert page.early(worse) == page.early(rows)
    assert page.early(worse[2:]) == ""


def test_ratios_of_losses_are_those_of_pairs():
    pair = [row("mae", "uniform", 0, 0.4), row("mae", "fast", 0, 0.5)]
    single = row("mae", "uniform", 1, 0.4)
    single["looks"][-1]["held_loss_fast"] = 9.0
    assert page.able([*pair, single], "mae") == page.able(pair, "mae")
    assert page.able([single, pair[1]], "mae") == []


@pytest.mark.parametrize(
    ("best", "said"),
    [
        (5e-4, "- MAE: the best rate, 0.0005, is the lowest tried; a lower one may be better."),
        (1e-3, ""),
        (2e-3, "- MAE: the best rate, 0.002, is the highest tried; a higher one may be better."),
    ],
)
def test_a_rate_at_the_edge_of_what_was_tried_is_told(best, said):
    only = replace(FULL, methods=("mae",))
    assert page.tuning(tuned(only, best)).partition(" |\n\n")[2] == said
    assert "tried" not in page.tuning(tuned(replace(only, rates=(best,)), best))
    assert page.tuning([]) == ""


def test_the_page_is_rendered_from_the_runs():
    text, rows = (RESULTS / "README.md").read_text(), read(RESULTS / "runs.jsonl")
    assert renewed_parts(text, {"results": f"{page.tables(rows)}\n"}) == text
    results = json.loads((RESULTS / "results.json").read_text())
    assert (results["verdicts"], results["runs"]) == (page.verdicts(rows), rows)


def test_the_plan_is_what_is_run():
    wanted = tasks(FULL, {"simmim": 1e-3, "mae": 2e-3})
    main = [task for task in wanted if task.stage == "main"]
    assert len(main) == 50
    assert {task.rate for task in main if task.method == "mae"} == {2e-3}
    assert [task.seed for task in main] == sorted(task.seed for task in main)
    assert len(set(wanted)) == len(wanted) == 50 + 3 + 12 + 12
    assert [task.stage for task in wanted] == sorted(
        (task.stage for task in wanted), key=keypoints.STAGES.index
    )
    assert np.prod([FULL.steps, FULL.batch]) == 1_024_000
