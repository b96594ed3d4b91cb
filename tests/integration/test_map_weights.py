"""Weights read off maps: their edges at any size of crop, and their correction, against detection
on the crops themselves.
"""

import math
import warnings
from dataclasses import replace

import numpy as np
import oracle
import pytest

torch = pytest.importorskip("torch")

from preprocess import build_shards, detector_settings, measure_fidelity, open_source
from preprocess.fidelity import weighing
from shards import Plan, Settings, ShardSet, WeightedCrops
from shards.correction import AT, SPREADS, STEPS, correction, expected
from shards.crops import weights
from shards.errors import UserError
from shards.weighting import _between


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Maps of half of the demo for crops of 192 px."""
    out = tmp_path_factory.mktemp("parity") / "demo"
    detectors = tuple(map(detector_settings, ("fast", "orb", "sift")))
    source = open_source("demo")
    half = replace(source, entries=source.entries[::2])
    build_shards(half, out, Settings(detectors=detectors, shard_size=64), 2)
    return ShardSet(out)


def by_ring(density: np.ndarray) -> np.ndarray:
    """Mean over images and cells, by a cell's distance from the crop's edge."""
    side = density.shape[-1]
    along = np.minimum(np.arange(side), np.arange(side)[::-1])
    ring = np.minimum.outer(along, along)
    mean = density.mean(0)
    return np.array([mean[ring == number].mean() for number in range(side // 2)])


def test_crops_of_another_size_have_the_edges_that_detection_has_there(demo, demo_images):
    plan = Plan(len(demo), len(demo))
    numbers = np.arange(len(demo))
    sizes = demo.index["height"].astype(int), demo.index["width"].astype(int)
    boxes, _ = plan.boxes(numbers * 0, numbers, *sizes)
    for name in ("orb", "sift"):
        found = []
        for image, (top, left, height, width) in zip(demo_images[::2], boxes.tolist(), strict=True):
            tall, wide = image.shape[:2]
            begin, end = round(top * tall), round((top + height) * tall)
            cut = image[begin:end, round(left * wide) : round((left + width) * wide)]
            found.append(oracle.rings(oracle.resized(cut, 96), name))
        truth = np.stack(found).reshape(-1, 12, 8, 12, 8).mean((2, 4))
        crops = WeightedCrops(demo, name, size=96, rule=lambda density, *_: density)
        read = crops.weigh(batch_of(demo, name), torch.empty(0)).numpy()
        true, ours = by_ring(truth), by_ring(read)
        assert true[3:].min() > 0.01
        if name == "orb":  # nothing within 27 px of the edge
            assert true[:3].max() == 0
            assert ours[:3].max() == 0
        assert abs(true[0] / true[4] - ours[0] / ours[4]) < 0.1


def beta_binomial(mean: float, deviation: float, pixels: int) -> list[float]:
    """Chances of 0 to `pixels` marked pixels, by the textbook's formula."""
    alike = (deviation**2 / (mean * (1 - mean)) - 1 / pixels) / (1 - 1 / pixels)
    a, b = mean * (1 / alike - 1), (1 - mean) * (1 / alike - 1)

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    return [
        math.comb(pixels, k) * math.exp(log_beta(k + a, pixels - k + b) - log_beta(a, b))
        for k in range(pixels + 1)
    ]


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.25, 1.0])
def test_the_expected_weight_is_that_of_a_beta_binomial(temperature):
    cases = [(0.05, 0.1, 64), (0.4, 0.2, 64), (0.9, 0.1, 64), (0.3, 0.1, 256)]
    for mean, deviation, pixels in cases:
        chances = beta_binomial(mean, deviation, pixels)
        density = np.arange(pixels + 1) / pixels
        assert sum(chances) == pytest.approx(1)
        assert np.dot(chances, density) == pytest.approx(mean)
        assert np.dot(chances, (density - mean) ** 2) == pytest.approx(deviation**2)
        raw = np.exp(np.clip(density / temperature, -20, 20))
        found = expected(np.array([mean]), np.array([deviation]), pixels, temperature)[0]
        assert found == pytest.approx(temperature * math.log(np.dot(chances, raw)))


@pytest.mark.parametrize(("w_ps", "temperature"), [(8, 0.25), (16, 0.1), (32, 1.0), (64, 0.02)])
def test_a_correction_rises_with_density_and_stays_above_it_by_less_for_larger_cells(
    w_ps, temperature
):
    for name in ("fast", "orb", "sift"):
        found = correction(detector_settings(name), "ring", temperature, w_ps, 192 // w_ps)
        assert np.isfinite(found.likely).all()
        assert (np.diff(found.likely) > -1e-3).all()
        assert (found.least <= found.likely).all()
        assert (found.least >= 0).all()
        wider = correction(detector_settings(name), "ring", temperature, 2 * w_ps, 96 // w_ps)
        if temperature > 0.05:  # below, exp is clipped, and less spread means less of that
            assert (wider.likely <= found.likely + 2e-3).all()
    assert correction(detector_settings("fast"), "disc", 0.25, 8, 24) is None
    assert correction(detector_settings("gftt"), "ring", 0.25, 8, 24) is None


def test_a_cell_of_one_pixel_is_full_or_empty():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = correction(detector_settings("fast"), "ring", 0.25, 1, 48).likely
    mean = np.interp(np.linspace(0, 1, STEPS + 1), AT, [*map(float, SPREADS["fast"].mean.split())])
    mean = np.clip(mean, 1e-5, 1 - 1e-5)
    np.testing.assert_allclose(found, 0.25 * np.log(1 - mean + mean * np.exp(1 / 0.25)), rtol=1e-6)


def batch_of(records: ShardSet, name: str) -> dict:
    plan, numbers = Plan(len(records), len(records)), np.arange(len(records))
    sizes = records.index["height"].astype(int), records.index["width"].astype(int)
    boxes, flips = plan.boxes(numbers * 0, numbers, *sizes)
    maps = torch.from_numpy(np.stack([records[n].maps[name] for n in numbers]))
    return {
        "maps": {name: maps},
        "boxes": torch.from_numpy(boxes),
        "flips": torch.from_numpy(flips),
    }


@pytest.mark.parametrize("w_ps", [8, 16])
def test_crops_are_weighed_by_the_correction_and_without_it_as_published(demo, w_ps):
    settings = demo.manifest.settings
    for detector in settings.detectors:
        batch, name = batch_of(demo, detector.name), detector.name
        choose = {"size": 192, "w_ps": w_ps, "temperature": 0.1}
        plain = WeightedCrops(demo, name, **choose, rule=lambda density, *_: density)
        density = plain.weigh(batch, torch.empty(0)).double().numpy()
        with pytest.raises(UserError, match="by a rule, which needs the images of the crops"):
            plain.weigh(batch)
        weigh = weighing(detector, settings, w_ps)
        found = WeightedCrops(demo, name, **choose).weigh(batch).numpy()
        as_it_is = WeightedCrops(demo, name, **choose, correct=False).weigh(batch).numpy()
        for each, mine, bare in zip(density, found, as_it_is, strict=True):
            np.testing.assert_allclose(mine, weigh(each, 0.1), rtol=1e-3)
            np.testing.assert_allclose(bare, weights(each, 0.1), rtol=1e-3)
        assert found.min() >= 1
        mean = WeightedCrops(demo, name, **choose, normalise="mean").weigh(batch)
        torch.testing.assert_close(mean.mean((1, 2)), torch.ones(len(mean)))


def test_a_table_is_linear_between_its_entries_and_ends_with_them():
    """Sums of cells may be a rounding above one, or below nought."""
    table = torch.arange(STEPS + 1.0) ** 2
    at = torch.tensor([-0.1, 0, 0.5 / STEPS, 1 / STEPS, 2.25 / STEPS, 1, 1.1])
    expected = torch.tensor([0, 0, 0.5, 1, 5.25, STEPS**2, STEPS**2])
    torch.testing.assert_close(_between(table, at), expected, rtol=1e-3, atol=1e-3)


def test_a_banks_weights_are_as_they_are(demo):
    counts = torch.randint(0, 65, (5, 24, 24), dtype=torch.uint8)
    batch = {"counts": {"fast": counts}}
    crops = WeightedCrops(demo, "fast", size=192, temperature=0.1)
    for each, mine in zip(counts.numpy() / 64, crops.weigh(batch).numpy(), strict=True):
        np.testing.assert_allclose(mine, weights(each, 0.1), rtol=1e-4)


@pytest.mark.slow
def test_other_photos_than_those_it_was_measured_on_are_weighed_better(demo):
    """The demo's are of another camera and another compression: wider bounds than on photos."""
    source = open_source("demo")
    half = replace(source, entries=source.entries[::2])
    found = measure_fidelity(demo, half, jobs=1)
    for name, errors in found.items():
        for each in ("0.1", "0.25", "1"):
            before, after = (
                abs(errors[what][f"bias at {each}"]) for what in ("uncorrected", "map")
            )
            assert after < max(0.015, 0.6 * before), (name, each, before, after)
        assert errors["map"]["wrong at 0.25"] <= errors["uncorrected"]["wrong at 0.25"] + 0.002


@pytest.mark.release
def test_bias_and_misplaced_weight_on_photos_that_it_was_not_measured_on(photos, tmp_path):
    source = tmp_path / "source"
    for path in photos[1::2]:
        (source / path.parent.name).mkdir(parents=True, exist_ok=True)
        (source / path.parent.name / path.name).write_bytes(path.read_bytes())
    detectors = tuple(map(detector_settings, ("fast", "orb", "sift")))
    listed, chosen = open_source(str(source)), Settings(detectors=detectors, shard_size=100)
    build_shards(listed, tmp_path / "set", chosen, 2)
    found = measure_fidelity(ShardSet(tmp_path / "set"), listed)
    for name, most in (("fast", 0.097), ("orb", 0.15), ("sift", 0.248)):
        errors = found[name]["map"]
        assert abs(errors["bias at 0.25"]) < 0.03
        assert abs(errors["bias at 0.1"]) < 0.08
        assert errors["wrong at 0.25"] <= most
