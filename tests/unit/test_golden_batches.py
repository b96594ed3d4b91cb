"""Golden batches: what a seed shows must not change unasked, or runs do not go on as they began."""

import hashlib

import numpy as np
import pytest
from conftest import settings

import shards
from preprocess import detector_settings
from shards.crops import read_crop
from shards.rng import Purpose

PURPOSES = (
    "ORDER CROP MASK SLOT BANK VIEW TRIAL SHARDS WINDOW RACE AUGMENT LAYERS BLEND SET FEW CHOICE"
)


def test_purposes_keep_their_numbers():
    numbers = {name: purpose.value for name, purpose in Purpose.__members__.items()}
    for number, name in enumerate(PURPOSES.split(), start=1):
        assert numbers[name] == number
    assert len(set(numbers.values())) == len(numbers)  # no two decide by the same numbers


@pytest.mark.parametrize(("window", "digest"), [(0, "f696f03a1ca3ac1f"), (3, "4fe60158e77a594f")])
def test_the_first_three_steps_of_a_seed(window, digest, built):
    """Samples, labels, boxes and flips: of the whole order, and of windows of three shards."""
    records = shards.open(built)
    windows = shards.Windows([s.count for s in records.shards], window, 0) if window else None
    plan = shards.Plan(len(records), 12, windows=windows)
    assert plan.seed == 0
    found = hashlib.sha256()
    for batch in records.loader(plan, 0, 3):
        for array in (batch.samples, batch.labels, batch.boxes, batch.flips):
            found.update(np.round(array.astype(np.float64), 6).tobytes())
    assert found.hexdigest()[:16] == digest


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_a_map_is_read_as_the_crop_is_flipped(flips):
    density = (np.arange(54 * 54, dtype=np.uint32) ** 2 % 256).astype(np.uint8).reshape(54, 54)
    chosen, box = settings(crop=192, detectors=(detector_settings("fast"),)), (0.1, 0.2, 0.7, 0.6)
    plain = read_crop(density, chosen.detectors[0], chosen, box, (False, False), 24)
    read = read_crop(density, chosen.detectors[0], chosen, box, flips, 24)
    assert read.shape == (24, 24)
    horizontal, vertical = flips
    turned = plain[:, ::-1] if horizontal else plain
    np.testing.assert_array_equal(read, turned[::-1] if vertical else turned)
    assert not np.array_equal(plain, plain[::-1])
