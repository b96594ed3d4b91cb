"""The benchmark: its baseline is the published way to the last pixel, its arithmetic adds up."""

import io
import json
import os
import resource
import time
from dataclasses import replace

import numpy as np
import oracle
import pytest
import simplejpeg
from conftest import errors
from PIL import Image
from typed import kamim as typed
from typed import kamim_process
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

import kamim.bench.provenance
from kamim.__main__ import app
from kamim.bench import ceiling, experiments, loader, meaning, measuring, plots, rivals, versus
from kamim.bench.gpu_steps import Training
from kamim.bench.loader import step_seconds
from kamim.bench.measuring import figures, in_turn, keep, temporary_set
from kamim.bench.online import AUGMENT, Optimised, Published
from kamim.bench.provenance import provenance
from kamim.bench.readme import kept
from preprocess import build_shards, detector_settings, open_source
from shards import Plan, Settings, ShardSet, UserError, decode_frame, to_device
from train.recipes import find_recipe
from train.step import Pace


def published_weights(
    marks: torch.Tensor, w_ps: int = 8, temperature: float = 0.25
) -> torch.Tensor:
    """Weights [b, c, c] of marks [b, 1, S, S], as the published training step makes them: a mean
    over w_ps x w_ps pixels by convolution, then exp over its minimum (KAMIM utils/KAMIM.py).
    """
    kernel = torch.full((1, 1, w_ps, w_ps), 1 / w_ps**2)
    density = torch.nn.functional.conv2d(marks, kernel, stride=w_ps)[:, 0]
    raw = torch.exp(torch.clamp(density / temperature, -20, 20))
    return raw / raw.amin(dim=(1, 2), keepdim=True)


@pytest.mark.parametrize("name", ["fast", "orb", "sift"])
@pytest.mark.parametrize("drawing", [True, False])
def test_the_published_baseline_has_the_oracles_weights(name, drawing):
    source = open_source("demo")
    dataset = Published(source, name, drawing=drawing)
    for number in (3, 77, 200):
        torch.manual_seed(number)
        image, marks = dataset[number]
        torch.manual_seed(number)
        data = source.read(source.entries[number])
        crop = AUGMENT(Image.open(io.BytesIO(data)).convert("RGB")).permute(1, 2, 0).numpy()
        crop = np.ascontiguousarray(crop)
        np.testing.assert_array_equal(marks[0].numpy(), oracle.rings(crop, name))
        ours = published_weights(marks[None])[0].numpy()
        np.testing.assert_allclose(ours, oracle.weights(oracle.crop_density(crop, name)), rtol=1e-5)
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        expected = ((crop / 255 - mean) / std).transpose(2, 0, 1)
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)


def test_the_optimised_baseline_detects_on_the_plans_crop(small_source, tmp_path):
    chosen = Settings(detectors=(detector_settings("fast"),), shard_size=20)
    build_shards(open_source(str(small_source)), tmp_path / "set", chosen, 1)
    records = ShardSet(tmp_path / "set")
    for number in (0, 21, 39):
        crop, counts = Optimised(records, "fast")[number]
        expected = oracle.crop_density(crop.numpy(), "fast") * 64
        np.testing.assert_array_equal(counts.numpy(), expected)
        boxes, flips = Plan(40, 1).boxes(*(np.array([v]) for v in (0, number, 80, 96)))
        frame = decode_frame(records[number].frame)
        frame = frame[:, ::-1] if flips[0, 0] else frame
        frame = frame[::-1] if flips[0, 1] else frame
        middle = np.abs(crop.numpy().mean((0, 1)) - frame.mean((0, 1)))
        assert (middle < 40).all()
        assert boxes.shape == (1, 4)


def found(noisy=False):
    """Made-up rates of every loader, three repeats each."""
    names = {f"{loader}: {d}": 100.0 for loader in versus.CEILING for d in ("fast", "None")}
    names |= {name: 50.0 for _, *pair in versus.CHAIN for name in pair}
    names |= dict.fromkeys(versus.CEILING.values(), 1000.0)
    names |= {"online, published: fast": 20.0, "offline, WebDataset: fast": 700.0}
    rates = {name: [rate, rate * 1.01, rate * 0.99] for name, rate in names.items()}
    if noisy:
        rates["decode only, frames"] = [1000.0, 500.0, 990.0]
    return rates


def test_the_factors_multiply_to_the_whole():
    rows = versus.rows_of(found(), dict.fromkeys(found(), 1.0), 40)
    (chain,) = [row for row in rows if row["loader"] == "chain"]
    assert chain["total"]["median"] == 35
    assert chain["product"] == pytest.approx(35)
    assert tuple(chain["factors"]) == plots.FACTORS
    assert tuple(meaning.WAYS) == plots.WAYS
    ours = next(r for r in rows if (r["loader"], r["detector"]) == ("offline, WebDataset", "fast"))
    assert ours["times_published"]["median"] == 35
    assert ours["of_ceiling"]["median"] == 0.7
    assert ours["n"] == 3


def test_noise_is_told():
    assert versus.noise(found()) == ""
    assert "too noisy to trust: 'decode only, frames' varied 2.00-fold" in versus.noise(found(True))


def test_what_it_means_is_computed_from_the_rates():
    """Ours is one process: cores are multiplied up to its ceiling."""
    rates = {"online, published: fast": 200.0, "offline, WebDataset: fast": 8000.0}
    rows = meaning.rows_of(rates, 2, {"vit_base": 2500.0})
    base = next(row for row in rows if row["recipe"] == "vit_base")
    assert base["gpu_is"] == "measured"
    assert base["delivered_by_16_cores"] == {"published": 1600, "WebDataset": meaning.ONE_PROCESS}
    hours = 1_281_167 * 100 / 3600
    assert base["hours_100_epochs"] == {
        "published": round(hours / 1600, 1),
        "WebDataset": round(hours / 2500, 1),
    }
    assert all("computed" in row["gpu_is"] for row in rows if row is not base)


def test_the_ceiling_is_of_the_loader_and_not_of_decoding(small_source, tmp_path):
    """Stand-ins are there for as long as they are asked for, in processes of the loader too."""
    chosen = Settings(detectors=(detector_settings("fast"),), shard_size=20)
    build_shards(open_source(str(small_source)), tmp_path / "set", chosen, 1)
    many = ceiling.as_many(ShardSet(tmp_path / "set"), 3000)
    real = simplejpeg.decode_jpeg, os.preadv
    with ceiling.replaced(decode=0.0):
        assert simplejpeg.decode_jpeg is not real[0]
        assert min(ceiling.rate(many, 2, 0.1)) > 0
        assert min(ceiling.rate(many, 2, 0.1, processes=True)) > 0
    with ceiling.replaced(decode=0.0, read=1e-5):
        assert os.preadv is not real[1]
        assert min(ceiling.rate(many, 2, 0.1)) > 0
    assert (simplejpeg.decode_jpeg, os.preadv) == real
    assert ceiling.samples_ms(5000, 100) > 0


def test_processes_are_timed_on_what_they_do_not_on_what_they_had_done(monkeypatch):
    """40 images that take 20 ms each: more than 100 a second were made before the clock began."""

    class Slow(list):
        def __getitem__(self, number):
            time.sleep(0.02)
            return torch.zeros(1), torch.zeros(1)

    monkeypatch.setattr(loader, "_Frames", Slow)
    monkeypatch.setattr(loader, "BATCH", 20)
    monkeypatch.setattr(loader, "STEPS", 10)
    assert 0 < loader.processes_rate(range(40), 2) < 125


def test_rates_end_with_the_last_batch():
    def batches():
        for _ in range(5):
            time.sleep(0.01)
            yield (range(10),)
        time.sleep(1)

    assert rivals.timed(batches(), skip=2) > 100
    assert rivals.timed(batches(), skip=5) == 0


def test_stock_webdataset_decodes_what_a_stock_user_has(small_source, monkeypatch):
    autodecode = pytest.importorskip("webdataset.autodecode")
    real, seen = autodecode.Decoder.decode1, set()

    def noted(self, key, data):
        seen.add(key)
        return real(self, key, data)

    def here(items, *_, **__):  # in this process, where `seen` is
        return ([image] for image, label in items if label >= 0)

    monkeypatch.setattr(autodecode.Decoder, "decode1", noted)
    monkeypatch.setattr(torch.utils.data, "DataLoader", here)
    with temporary_set(str(small_source), jobs=1) as records:
        assert rivals.stock_webdataset(records, 1)(1) > 0
    assert seen == {"jpg", "cls"}


def test_threads_and_processes_read_the_same_set_without_a_bank(small_source, monkeypatch):
    monkeypatch.setattr(loader, "REPEATS", 1)
    monkeypatch.setattr(loader, "decode_rate", lambda *_: 1.0)
    monkeypatch.setattr(loader, "step_seconds", lambda *_: {"weighted": [1], "unweighted": [1]})
    found = {"raw": [], "bank": [], "plain": [], "processes": []}

    def threads(records, maps, bank=False, steps=0, workers=0):
        chosen = records.manifest.settings
        found["bank" if bank else "plain" if chosen.quality else "raw"].append(chosen.bank)
        return 1.0

    def processes(records, cores):
        found["processes"].append(records.manifest.settings.bank)
        return 1.0

    monkeypatch.setattr(loader, "loader_rate", threads)
    monkeypatch.setattr(loader, "processes_rate", processes)
    (row,) = loader.measure_all(str(small_source))
    assert found == {"raw": [0] * 4, "bank": [4], "plain": [0] * 6, "processes": [0]}
    assert row["threads / processes"]["median"] == 1


def test_what_cores_are_multiplied_up_to_was_measured():
    rates = [
        row["images_per_s"]["median"]
        for row in kept("gpu")
        if row["case"].startswith("WebDataset JPEG")
    ]
    assert max(rates) == pytest.approx(meaning.ONE_PROCESS, rel=0.001)


def test_pictures_are_drawn(tmp_path):
    for path in plots.draw_all(versus.rows_of(found(), dict.fromkeys(found(), 1.0), 40), tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_line():
    for arguments, words in (
        (["--only", "loader"], "there are loaders, step, build, meaning"),
        (["--only", "meaning"], "needs the loaders' rates"),
        (["nowhere"], "nowhere"),
    ):
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert words in str(result.exception)
    done = typed("bench", "--only", "x")
    assert done.returncode == 2
    assert errors(done) == 1


@pytest.mark.release
@pytest.mark.timeout(1200)
def test_quick_needs_no_data_and_three_minutes():
    """In seconds of the processors: other work on them does not make them more."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = kamim_process("bench", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["bench"] for row in rows} == {"versus", "step", "build", "meaning"}


def test_tables_of_small_experiments_are_those_of_their_results():
    for path in sorted(experiments.FOLDER.glob("cifar10*/results.json")):
        text = (path.parent / "README.md").read_text()
        assert experiments.renewed(text, json.loads(path.read_text())) == text


def test_a_small_experiment_is_gathered_seed_by_seed(tmp_path):
    blocks = [{"block": 1, "distance": 40.0, "uniform": 44.0, "nmi": 0.1, "frequency": -2.0}]
    diagnoses = {"x/random:small": {"blocks": blocks}}
    for seed, top1 in enumerate(([0.4, 0.5], [0.3, 0.4])):
        run = tmp_path / f"small-seed-{seed}"
        (run / "probe").mkdir(parents=True)
        probe = {"top1": top1, "top5": top1, "knn": 0.3}
        (run / "probe" / "probe.json").write_text(json.dumps(probe))
        recipe = {"size": 96, "epochs": 2.0, "batch": 128}
        (run / "run.json").write_text(json.dumps({"recipe": recipe}))
        (run / "metrics.jsonl").write_text(json.dumps({"step": 9, "mean_weight": 2.0}) + "\n")
        diagnoses[str(run)] = {"blocks": blocks, "psnr_masked": 17.0, "ssim_masked": 0.3}
    for name in ("random", "analysis"):
        (tmp_path / name).mkdir()
    (tmp_path / "random" / "probe.json").write_text(json.dumps(probe))
    (tmp_path / "analysis" / "analysis.json").write_text(json.dumps(diagnoses))
    rows = experiments.gather(tmp_path)
    assert [(row["method"], row["top1"]) for row in rows] == [
        ("small", [0.45, 0.35]),
        ("random", [0.35]),
    ]
    page = experiments.render({"rows": rows, **provenance()})
    assert "| KAMIM, FAST, T 0.25, least weight 1 (published) | 2 | 2 |  | 40.00 ± 7.07 |" in page


def test_the_scaling_page_is_rendered_from_the_results():
    from kamim.bench import scaling

    assert scaling.renewed(scaling.PAGE.read_text()) == scaling.PAGE.read_text()


def test_the_sizes_of_the_scaling_page_are_those_of_the_objects(tmp_path):
    """Computed records against built ones; the driver's objects against the constants."""
    import pickle
    import tracemalloc
    from dataclasses import asdict

    from kamim.bench import scaling
    from preprocess.source import Entry
    from shards.spec import File

    fast, orb = (detector_settings(name) for name in ("fast", "orb"))
    source = replace(open_source("demo"), entries=open_source("demo").entries[:4])
    sizes = {}
    for detectors, bank in (((fast,), 0), ((fast, orb), 2)):
        chosen = replace(Settings(detectors=detectors, shard_size=4), bank=bank, map_crops=0)
        out = tmp_path / str(bank)
        build_shards(source, out, chosen, 1)
        sizes[len(detectors), bank] = np.mean(ShardSet(out).index["bytes"])
    grown = scaling.record_bytes(2, 2) - scaling.record_bytes(1, 0)
    assert abs(sizes[2, 2] - sizes[1, 0] - grown) <= 512  # tar pads to 512 bytes

    def each(make):
        tracemalloc.start()
        kept = [make(number) for number in range(5000)]
        size = tracemalloc.get_traced_memory()[0] / len(kept)
        tracemalloc.stop()
        return size

    name = "n{0:08d}/n{0:08d}_{0:08d}.JPEG"
    entry = each(lambda n: Entry(name.format(n), 1000 + n, 110_000 + n, 0, 10**18 + n))
    file = each(lambda n: File(f"shard-{n:06d}.tar", 1000 + n, 29_000_000 + n, f"{n:064x}"))
    assert entry == pytest.approx(scaling.ENTRY, rel=0.25)
    assert file == pytest.approx(scaling.FILE, rel=0.25)
    row = json.dumps(asdict(File("shard-000001.tar", 1000, 29_000_000, "a" * 64)), indent=6)
    assert len(row) == pytest.approx(scaling.MANIFEST_ROW, rel=0.1)
    listed = [Entry(name.format(n), 7, 110_000 + n, 0, 10**18 + n) for n in range(1000)]
    assert len(pickle.dumps(listed)) == pytest.approx(65_000, rel=0.1)
    assert scaling._time(89) == "89 s"
    assert scaling._time(7200) == "2.0 h"


def test_quick_measures_fast_alone(tmp_path):
    source = replace(open_source("demo"), entries=open_source("demo").entries[:4])
    assert versus.prepare_set(source, tmp_path / "quick", True).manifest.detectors == ["fast"]
    assert versus.prepare_set(source, tmp_path / "all").manifest.detectors == versus.DETECTORS


def test_works_are_measured_in_turn_and_the_warm_up_does_not_count():
    seen = []
    works = {name: lambda name=name: seen.append(name) or len(seen) for name in "ab"}
    assert in_turn(works, 2, warm=1) == {"a": [3, 5], "b": [4, 6]}
    assert seen == list("ababab")


def test_figures_are_the_row_and_the_table(capsys):
    rates, ratios = {"fast": [2.0, 4.0, 3.0]}, {"fast / slow": {"median": 2, "min": 1, "max": 3}}
    found = figures(rates, ratios)
    assert found == {"fast": {"median": 3, "min": 2, "max": 4}, **ratios}
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["fast", "3.0", "(2.0", "to", "4.0)"],
        ["fast", "/", "slow", "2", "(1", "to", "3)"],
    ]


def test_what_is_kept_is_of_one_commit_and_source(monkeypatch, tmp_path):
    measured = []

    def measure(where, folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = measuring.once(folder / "x.json", lambda: measured.append(where) or len(measured))
        return [{"found": found}]

    monkeypatch.setattr(kamim.bench.provenance, "RESULTS", tmp_path)
    for commit, where in [("a", "one"), ("a", "one"), ("a", "two"), ("b", "one"), ("a", "one")]:
        monkeypatch.setattr(measuring, "provenance", lambda commit=commit: {"commit": commit})
        monkeypatch.setattr("sys.argv", ["bench", where, str(tmp_path / "work")])
        keep("kept", measure, needs_folder=True)
    rows = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [row["found"] for row in rows] == [1, 1, 2, 3, 1]
    assert measured == ["one", "two", "one"]


def test_results_outside_a_checkout_are_refused_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(kamim.bench.provenance, "RESULTS", tmp_path / "none")
    line = f"results are kept in a checkout of kamim, and there is no {tmp_path / 'none'}; "
    result = CliRunner().invoke(app, ["bench", "nowhere", "--save"])
    assert str(result.exception).startswith(line)
    assert len(str(result.exception).splitlines()) == 1
    with pytest.raises(UserError, match="results are kept in a checkout"):
        keep("none", lambda where: pytest.fail("it measured"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_cost_a_step_the_same_everywhere(small_source):
    """Both benchmarks of a weighted step run the same one, with weights and without."""
    with temporary_set(str(small_source), map_crops=0, frame=96, jobs=1) as records:
        recipe = replace(find_recipe("small"), batch=4)
        training = Training(recipe, records, torch.device("cpu"))
        batches = records.loader(Plan(len(records), 4), 0, 3, maps=["fast"])
        pace = Pace(to_device(batches, torch.device("cpu")), torch.device("cpu"))
        for micro in (None, training.plain):
            spent, waited = training.timed(pace, 1, micro)
            assert 0 <= waited < spent
        seconds = step_seconds(records, 1, warm=0)
        assert {name: len(each) for name, each in seconds.items()} == {
            "weighted": 1,
            "unweighted": 1,
        }
    assert not records.folder.exists()


def test_the_time_left_is_said_before_repeats(capsys):
    versus.measure({"a": lambda count: float(count)}, 3, versus.Effort(30, 2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2:] == ["repeat 1 of 2, about 60 s left", "repeat 2 of 2, about 30 s left"]


def test_doctor_speaks_json():
    done = typed("doctor", "--json")
    assert done.returncode == 0, done.stderr
    parts = {row["part"]: row for row in json.loads(done.stdout)}
    assert parts["Python"]["type"] == ""
    assert {"torch", "OpenCV", "FFCV"} <= set(parts)
