"""Pages of runs: what is on them, that they change no run, and how a browser has them."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from browser import look
from typed import kamim_process

torch = pytest.importorskip("torch")

from test_evaluate import typed
from test_pretrain import TINY, run

from kamim.compare import differing, grouped, names, whole
from train import checkpoint
from train.charts import Line, chart, ticks
from train.metrics import read_metrics
from train.page import Read, chosen, write_page
from train.recipes import mae


@pytest.fixture
def shards(built):
    return built


@pytest.fixture(scope="session")
def runs(tmp_path_factory, demo_images):
    """Three runs with looks and saves: a and b differ by their seed, c has another temperature."""
    from conftest import settings

    import preprocess
    from preprocess import build_shards, open_source

    root = tmp_path_factory.mktemp("runs")
    for number, picture in enumerate(demo_images[::7][:40]):
        path = root / "source" / f"a kind of thing {number % 4}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(picture, (96, 80))[:, :, ::-1])
    chosen = settings(frame=120, crop=96, detectors=(preprocess.detector_settings("fast"),))
    build_shards(open_source(str(root / "source")), root / "set", chosen, 1)
    for name, seed, temperature in (("a", 0, 0.25), ("b", 1, 0.25), ("c", 0, 1.0)):
        recipe = replace(TINY, temperature=temperature)
        run(root / "set", root / name, recipe, seed=seed, probe_every=3, save_every=5)
    return root


def sound(page, width, images, charts, picture=None):
    """A page as a browser has it: nothing beside its edge, nothing cut off, all that is on it."""
    found = look(page, width, picture)
    assert found["wide"] == 0
    assert found["out"] == found["cut"] == found["errors"] == []
    assert found["broken"] == 0
    assert (found["images"], found["charts"]) == (images, charts)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_all_of_every_page(runs, width, tmp_path):
    sound(runs / "a" / "index.html", width, 3 + 3, 11)
    words = [runs / "a", runs / "b", runs / "c", "--out", tmp_path / "compared"]
    assert typed("compare", *words)[0] == 0
    sound(tmp_path / "compared" / "index.html", width, 2, 7)
    words = [runs / "a", "random:swin_tiny_patch4_window7_224", runs / "set", "--images", "8"]
    status, _, error = typed("analyse", *words, "--out", tmp_path / "analysis")
    assert status == 0, error
    sound(tmp_path / "analysis" / "analysis.html", width, 0, 8)


def test_the_browser_test_can_fail(tmp_path):
    """A page that is too wide, whose picture is missing, whose figure is cut and that complains."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><div style='width:2000px'>x</div><img src='no.png'>"
        "<svg width='50' height='20'><text x='40' y='10'>beyond the edge</text></svg>"
        "<script>console.log('no')</script>"
    )
    found = look(bad, 360)
    assert found["wide"] > 0
    assert found["out"]
    assert found["cut"] == ["beyond the edge"]
    assert found["broken"] == 1
    assert found["errors"]


def test_the_page_of_a_run_shows_what_it_wrote_and_needs_no_other_file(runs):
    page = (runs / "a" / "index.html").read_text()
    assert "Step 15, epoch 3.00 of 3: finished" in page
    assert "for looks at the features" in page
    for title in ("loss", "top-1 on the held-out tenth", "images per second", "waiting for data"):
        assert title in page
    assert "<script" not in page
    assert "src='data:" in page
    assert page.count("src=") == page.count("src='data:")
    names = sorted(path.name for path in (runs / "a" / "pictures").iterdir())
    saves = [f"step-{step:08d}.jpg" for step in (5, 10, 15)]
    assert names == sorted(["crop.jpg", "visible.jpg", "weight.png", *saves])
    strips = [cv2.imread(str(runs / "a" / "pictures" / name)) for name in names]
    assert {strip.shape for strip in strips} == {(6 * 99, 96, 3)}
    assert np.abs(strips[1].astype(int) - strips[3]).mean() > 1  # the model has changed


@pytest.mark.parametrize(
    "method", ["simmim", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mae", "famt"))]
)
def test_pictures_at_every_save_change_no_loss_and_are_alike_after_a_stop(
    method, shards, tmp_path, small_source
):
    recipe = TINY
    if method == "mae":
        recipe = replace(mae(TINY), decoder=(32, 1, 2))
    if method == "famt":
        recipe = replace(TINY, sample_by="attention", throw_ratio=0.2, random_epochs=0.0)
    plain = run(shards, tmp_path / "plain", recipe, save_every=1000)
    assert run(shards, tmp_path / "saved", recipe, save_every=1) == plain
    run(shards, tmp_path / "parts", recipe, save_every=5, steps=5)
    assert run(shards, tmp_path / "parts", recipe, save_every=5, resume=True) == plain
    one, two = (tmp_path / name / "pictures" for name in ("saved", "parts"))
    for path in two.iterdir():
        assert path.read_bytes() == (one / path.name).read_bytes()
    assert len(list(one.glob("step-*"))) == 15


def test_a_kill_between_picture_and_checkpoint_costs_neither(shards, tmp_path, monkeypatch):
    """A picture came after its checkpoint, and a kill in between lost it, and left half of it."""
    run(shards, tmp_path / "run", save_every=5, steps=5)
    left = tmp_path / "run" / "pictures" / "step-00000010.jpg.0123456789ab.tmp"
    left.touch()
    drawn, save = [], checkpoint.save

    def saving(folder, step, state):
        drawn.append((folder.parent / "pictures" / f"step-{step:08d}.jpg").exists())
        return save(folder, step, state)

    monkeypatch.setattr(checkpoint, "save", saving)
    run(shards, tmp_path / "run", save_every=5, resume=True)
    assert drawn == [True, True]
    assert not left.exists()


def test_a_page_that_cannot_be_written_costs_no_checkpoint(shards, tmp_path, monkeypatch):
    def full(run):
        raise OSError(28, "No space left on device", str(run))

    monkeypatch.setattr("train.pictures.write_page", full)
    with pytest.raises(OSError, match="the disk is full"):
        run(shards, tmp_path / "run", steps=4)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000004.pt"


def test_compare_gives_means_and_deviations_over_seeds(runs, tmp_path):
    words = [runs / "a", runs / "b", runs / "c", "--out", tmp_path / "page", "--json"]
    status, printed, error = typed("compare", *words)
    assert status == 0, error
    two, one = json.loads(printed)
    assert (two["name"], one["name"]) == ("a", "c")
    assert (two["settings"], one["settings"]) == ({"temperature": "0.25"}, {"temperature": "1"})
    assert (two["seeds"], one["seeds"]) == ([0, 1], [0])
    values = [read_metrics(runs / name)[-1]["probe_top1"] for name in ("a", "b")]
    assert two["probe_top1"]["mean"] == pytest.approx(np.mean(values))
    assert two["probe_top1"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert one["probe_top1"]["deviation"] is None
    late = [row["loss"] for row in read_metrics(runs / "c") if row["epoch"] > 2]
    assert one["loss"]["mean"] == pytest.approx(np.mean(late))
    page = (tmp_path / "page" / "index.html").read_text()
    assert "<th>temperature<td class=n>0.25<td class=n>1" in page
    assert "same shards" not in page
    assert f"{two['loss']['mean']:.4f} ± {two['loss']['deviation']:.4f}" in page
    assert "is no run" in typed("compare", runs / "set")[2]
    status, printed, _ = typed("compare", runs / "a", "--out", tmp_path / "alone")
    assert printed.strip() == str(tmp_path / "alone" / "index.html")


def told(run, **recipe):
    return SimpleNamespace(run=Path(run), recipe=recipe, facts={"shards": recipe.pop("shards", "")})


def test_a_setting_of_0_is_told_from_none():
    runs = [told("a", clip=clip) for clip in (0.0, None)]
    assert differing([[run] for run in runs]) == [{"clip": "0"}, {"clip": "none"}]


def test_settings_that_differ_are_short_words():
    one = told("a", options={"depth": 2, "width": 8}, area=[0.5, 1.0], shards="a" * 64)
    two = told("b", options={"depth": 4, "width": 8}, area=[1.0, 1.0], shards=["b" * 64, "c" * 64])
    assert differing([[one], [two]]) == [
        {"options.depth": "2", "area": "0.5, 1", "shards": "a" * 8},
        {"options.depth": "4", "area": "1, 1", "shards": "b" * 8 + ", " + "c" * 8},
    ]


def test_runs_are_called_as_their_folders():
    def of(*groups):
        return names([[told(run) for run in group.split()] for group in groups])

    assert of("x/small", "x/s-select") == ["small", "s-select"]
    assert of("x/kamim-seed0 x/kamim-seed1", "mae-0 mae-1") == ["kamim", "mae"]
    assert of("seed-0 seed-1", "simmim_seed_10 simmim_seed_11") == ["seed", "simmim"]
    assert of("0 1", "vit_224 b") == ["0", "vit_224"]
    assert of("x/run-0", "y/run-0", "z") == ["run-0 A", "run-0 B", "z"]


def test_runs_on_other_shards_are_said_to_be(runs, tmp_path):
    shutil.copytree(runs / "c", tmp_path / "c")
    facts = tmp_path / "c" / "run.json"
    facts.write_text(facts.read_text().replace(Read(runs / "c").facts["shards"], "f" * 64))
    typed("compare", runs / "a", tmp_path / "c", "--out", tmp_path / "page")
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("Not all runs have the same shards") == 1
    assert "<td class=n>ffffffff" in page


def test_long_names_that_are_alike_are_told_apart_in_a_chart():
    ends = [f"vit_base_224_mae_kamim_{middle}_warmup" for middle in ("0.25", "1.00")]
    svg = chart("loss", [Line(name, [1, 2], [3, 4]) for name in ends])
    assert all(name in svg for name in ends)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({}, 1),
        ({"normalise": "batch"}, 2),
        ({"weights": "shuffled"}, 2),
        ({"weights": "inverse"}, 1),
    ],
)
def test_a_micro_batch_tells_runs_apart_only_if_weights_are_of_the_forward_pass(
    changes, rows, runs, tmp_path
):
    """It follows the free memory: a run on another GPU was no seed of the same row."""
    found = []
    for name, asked, part in (("a", 0, 8), ("b", 4, 4)):
        shutil.copytree(runs / name, tmp_path / name)
        facts = json.loads((runs / name / "run.json").read_text())
        facts |= {"recipe": facts["recipe"] | changes | {"micro_batch": asked}, "micro_batch": part}
        (tmp_path / name / "run.json").write_text(json.dumps(facts))
        found.append(Read(tmp_path / name))
    groups = grouped(found)
    told = [{}] if rows == 1 else [{"micro_batch": "8"}, {"micro_batch": "4"}]
    assert [group["settings"] for group in groups] == told


def test_a_whole_number_is_one_whether_a_file_says_10_or_10_point_0():
    assert whole({"epochs": 10.0, "area": [0.67, 1.0], "clip": None}) == {
        "epochs": 10,
        "area": [0.67, 1],
        "clip": None,
    }


def test_a_damaged_run_json_is_one_line(runs, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "a")
    for text in ("{", "[1]"):
        (tmp_path / "a" / "run.json").write_text(text)
        error = typed("compare", tmp_path / "a", "--out", tmp_path / "page")[2]
        assert "run.json is damaged; the run writes it again" in error


@pytest.mark.parametrize("recipe", ["none", "soup", {"salt": 1}, {"batch": 1, "epochs": 1}])
def test_a_run_json_of_another_program_is_one_line(recipe, runs, tmp_path):
    """It was a bug of ours: KeyError."""
    (tmp_path / "run.json").write_text(json.dumps({} if recipe == "none" else {"recipe": recipe}))
    status, _, error = typed("compare", runs / "a", tmp_path, "--out", tmp_path / "page")
    assert status
    assert f"{tmp_path}/run.json is not of `kamim pretrain`; name a folder of its runs" in error


def test_comparing_needs_no_torch(runs, tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('torch', name='torch')\n")
    path = f"{tmp_path}:{os.environ['PYTHONPATH']}"
    words = ["compare", runs / "a", runs / "c", "--out", tmp_path / "page"]
    done = kamim_process(*words, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr


def test_time_left_and_the_saves_that_are_shown(shards, tmp_path):
    run(shards, tmp_path / "run", steps=6, save_every=3)
    found, row = Read(tmp_path / "run"), read_metrics(tmp_path / "run")[-1]
    assert found.left() == pytest.approx(9 * 8 / row["images_per_s"])
    assert "left</b>" in (tmp_path / "run" / "index.html").read_text()
    assert chosen(list(range(5))) == [0, 1, 2, 3, 4]
    many = chosen(list(range(200)))
    assert (many[0], many[-1], len(many)) == (0, 199, 7)
    assert many[3] < 50
    shutil.rmtree(tmp_path / "run" / "pictures")
    assert "data:image" not in write_page(tmp_path / "run").read_text()  # as of an older run


def test_charts_have_round_ticks_and_keep_what_stands_out():
    assert ticks(0, 1) == [0, 0.25, 0.5, 0.75, 1]
    assert ticks(1, 12, 7, whole=True) == [0, 2, 4, 6, 8, 10, 12]
    assert ticks(1, 2, 7, whole=True) == [1, 2]
    assert len(ticks(5, 5)) > 1
    steps = np.arange(10_000)
    spiked = np.where(steps == 5000, 9.0, 1.0)
    svg = chart("<b>", [Line("", steps, spiked)])
    assert "<b>" not in svg
    assert "polygon" in svg
    assert ">10<" in svg  # the axis reaches the spike, which means over neighbours would hide
    assert "nan" not in chart("x", [Line("", [1, 2, 3], [1, float("nan"), 2])])
    assert chart("x", []).startswith("<svg")
