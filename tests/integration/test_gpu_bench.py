"""`kamim bench --gpu` in small, on a CPU: lines as they are measured, what is there is left out."""

import importlib.util
import json
from dataclasses import replace

import pytest
from conftest import errors
from typed import kamim

torch = pytest.importorskip("torch")

from kamim.bench import ceiling, gpu, gpu_device, gpu_loader, gpu_page, gpu_steps
from shards import ShardSet
from shards.order import Plan
from train.recipes import find_recipe

PARTS = ("ceilings", "step", "end to end", "weights", "methods", "loader")


@pytest.fixture
def bench(small_source, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_loader, "THREADS", (1,))
    monkeypatch.setattr(gpu_loader, "find_spec", lambda name: None)  # FFCV compiles for seconds
    for part in gpu.BUDGETS:  # a busy machine is slow, not wrong
        monkeypatch.setitem(gpu.BUDGETS, part, 1e5)
    few = lambda name: replace(find_recipe(name), batch=4)  # noqa: E731
    monkeypatch.setattr(gpu_steps, "find_recipe", few)
    (tmp_path / "made").mkdir()
    device = torch.device("cpu")
    small = {"recipes": ("demo",), "methods": ("demo_mae",), "killed": "demo", "steps": 8}
    return gpu.Bench(str(small_source), tmp_path / "made", device, 1e-3, 1, **small)


def cases_in(path):
    return [(row["part"], row["case"]) for row in gpu_page.rows_of(path)]


def not_again(*arguments):
    raise AssertionError("it was measured already")


@pytest.mark.slow
def test_each_case_is_a_line_and_is_measured_once(bench, tmp_path, capsys, monkeypatch):
    out = tmp_path / "results" / "gpu.jsonl"
    assert gpu.run(bench, out, PARTS) == 1  # what needs CUDA
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "CUDA" in line] == ["ceilings: needs a CUDA device"]
    measured = cases_in(out)
    assert {("step", "demo"), ("end to end", "demo"), ("methods", "demo_mae")} < set(measured)
    assert ("loader", "WebDataset raw, 1 threads") in measured
    for row in gpu_page.rows_of(out):
        assert {"gpu", "driver", "cuda", "date", "commit", "cpu", "versions", "n"} <= set(row)
        assert "missing" in row or row["images_per_s"]["median"] > 0
    (weights,) = [row for row in gpu_page.rows_of(out) if row["part"] == "weights"]
    assert weights["weighted_over_unweighted"]["median"] > 0

    monkeypatch.setattr(gpu_steps, "Measured", not_again)
    assert gpu.run(bench, out, PARTS) == 1
    assert cases_in(out) == measured


def test_what_was_cut_off_goes_on(bench, tmp_path):
    out = tmp_path / "gpu.jsonl"
    assert gpu.run(bench, out, ["step"]) == 0
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0])
    assert gpu.run(bench, out, ["step"]) == 0
    assert cases_in(out) == [("step", "demo"), ("step", "demo, eager")]
    assert out.read_text().splitlines(keepends=True)[0] == lines[0]
    assert gpu.run(bench, out, ["methods"], again=True) == 0
    assert len(cases_in(out)) == 3


@pytest.mark.slow
def test_a_case_that_fails_or_is_late_is_one_line(bench, tmp_path, capsys, monkeypatch):
    def broken(measured):
        raise RuntimeError("no such kernel\nwith advice")

    monkeypatch.setattr(gpu_steps, "step", broken)
    monkeypatch.setitem(gpu.BUDGETS, "end to end", 0.0)
    out = tmp_path / "gpu.jsonl"
    assert gpu.run(bench, out, ["step", "end to end", "loader"]) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
    assert said[0] == "step, demo: RuntimeError: no such kernel"
    assert said[1].startswith("end to end, demo: TimeoutError: the part's time is spent")
    assert {part for part, _ in cases_in(out)} == {"loader"}


@pytest.mark.slow
def test_ffcv_is_measured_where_it_is_installed(bench, tmp_path, monkeypatch):
    pytest.importorskip("ffcv")
    monkeypatch.setattr(gpu_loader, "find_spec", importlib.util.find_spec)
    gpu.run(bench, tmp_path / "gpu.jsonl", ["loader"])
    rates = {row["case"]: row["images_per_s"] for row in gpu_page.rows_of(tmp_path / "gpu.jsonl")}
    assert {"FFCV JPEG, 1 threads", "FFCV raw, 1 threads"} < set(rates)


@pytest.mark.release
def test_a_run_is_killed_and_goes_on_with_the_same_losses(bench, tmp_path):
    out = tmp_path / "gpu.jsonl"
    gpu.run(bench, out, ["deterministic"])
    rows = {row["case"]: row for row in gpu_page.rows_of(out)}
    killed = rows["demo, killed"]
    assert killed["equal"]
    assert 2 <= killed["losses_when_killed"] < killed["steps"] == 8


def test_a_line_that_a_kill_cut_short_is_left_out(bench, tmp_path):
    out = tmp_path / "gpu.jsonl"
    gpu.run(bench, out, ["weights"])
    rows = gpu_page.rows_of(out)
    with out.open("a") as file:
        file.write('{"part": "st')
    gpu.run(bench, out, ["weights"], again=True)
    assert len(gpu_page.rows_of(out)) == 2 * len(rows) > 0


def test_crops_of_frames_that_the_device_decodes_are_timed_beside_the_threads(bench):
    row = gpu_device.crops_by_decoder(bench, batch=8)
    assert row["n"] == bench.repeats
    assert min(row[name]["min"] for name in ("images_per_s", "images_per_s_by_threads")) > 0
    rows = {("decode", "nvJPEG, 64 at once"): row, ("decode", "weighted crops"): row}
    lines = gpu_page.TABLES["decode"](rows)
    assert len([line for line in lines if line.startswith("|")]) == 3
    assert lines[-1].startswith("Weighted crops from frames decoded on the GPU")


def test_a_set_is_as_large_as_it_is_asked_to_be(bench):
    records = bench.records
    many = ceiling.as_many(records, 2500)
    assert len(many) == 2500
    assert [shard.count for shard in many.shards] == [1000, 1000, 500]
    assert many.shard_of(2499) == 2
    first, each = records.shards[0].count, records.shards[1].count
    assert many[1999].frame == records[first + 999 % each].frame
    loader = many.loader(Plan(2500, 500), 0, 5, maps=["fast"])
    seen = [number for batch in loader for number in batch.samples.tolist()]
    assert sorted(seen) == list(range(2500))
    assert len(ShardSet(records.folder)) == len(records) == 40


def test_finished_shards_are_taken_as_they_are(bench, built):
    bench.where = str(built)
    assert bench.records.folder == built
    assert bench.records.manifest.detectors == ["fast", "orb"]


def test_the_page_has_what_was_measured_and_says_what_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_page, "RESULTS", tmp_path)
    for render in gpu_page.PARTS.values():
        assert render() == "Not measured yet: `make bench-gpu`.\n"
    origin = {
        "bench": "gpu",
        "gpu": "A100",
        "driver": "1",
        "cuda": "13.0",
        "cores": 8,
        "cpu": "C",
        "versions": {"torch": "2.11.0"},
        "date": "2026-11-26",
        "n": 5,
    }
    rates = {"median": 2000.0, "min": 1.0, "max": 3.0}
    rows = [
        {"part": "end to end", "case": "vit_base", "images_per_s": rates | {"median": 5.0}},
        {
            "part": "end to end",
            "case": "vit_base",
            "images_per_s": rates,
            "end_to_end_over_synthetic": {"median": 0.98},
            "waiting": {"median": 0.01},
        },
        {"part": "loader", "case": "FFCV", "n": 0, "missing": "FFCV is not installed"},
        {
            "part": "loader",
            "case": "WebDataset JPEG, 2 threads",
            "threads": 2,
            "images_per_s": rates,
        },
    ]
    lines = [json.dumps(origin | row) for row in [*rows, rows[0] | {"gpu": ""}]]
    (tmp_path / "gpu.jsonl").write_text("\n".join(lines) + "\n")
    page = gpu_page.PARTS["gpu-end-to-end"]()
    assert "| vit_base | 2,000 | 0.980 | 1.0% | 19.6 |" in page  # 110 x 1,281,167 / 2,000 / 3,600
    assert "| swin_base | not measured |" in page
    assert page.count("driver 1") == 1
    assert "| FFCV | FFCV is not installed |" in gpu_page.PARTS["gpu-loader"]()
    assert "| WebDataset JPEG | 2,000 |" in gpu_page.PARTS["gpu-loader"]()
    assert gpu_page.PARTS["gpu-steps"]() == "Not measured yet: `make bench-gpu`.\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_mistakes_are_one_line():
    for arguments, words in (
        (["--quick", "--out", "x"], "--out, --again and --micro-batch are for --gpu"),
        (["--gpu"], "torch sees no CUDA device"),
        (["--gpu", "--only", "steps"], "--only 'steps': with --gpu there are ceilings"),
    ):
        done = kamim("bench", *arguments)
        assert done.returncode == 2
        assert errors(done) == 1
        assert words in done.stderr
