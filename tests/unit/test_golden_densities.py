"""Golden densities: maps and banks of ten photographs by each detector of OpenCV.

`python tests/unit/test_golden_densities.py` prints how far the OpenCV that it finds is from them,
and `... write` writes them anew. They are OpenCV 5.0.0's; of detectors that it lacks, 4.12.0's.
"""

import sys

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY

import preprocess
import shards
from preprocess.detectors import DEFAULTS

GOLDEN = REPOSITORY / "tests" / "golden" / "densities.npz"
MSER = "5"  # OpenCV 4's finds 2.7 times the density, by other defaults
PHOTOGRAPHS, BOXES = 10, 2


def detectors():
    """All that this OpenCV has: 5.0's main wheel lacks some."""
    for name in DEFAULTS:
        try:
            yield preprocess.detector_settings(name)
        except shards.UserError:
            continue


def found(images, detector):
    """Levels of the maps uint8 [10, 54, 54], and counts of the banks uint8 [10, 2, 24, 24]."""
    chosen = shards.Settings(detectors=(detector,), bank=BOXES)
    maps, counts = [], []
    for number, image in enumerate(images):
        maps.append(preprocess.density_maps(image, number, chosen)[detector.name])
        counts.append(preprocess.bank_of(image, number, chosen).counts[detector.name])
    return np.stack(maps), np.stack(counts)


def apart(images):
    """Per detector: shares of cells that differ from the golden ones, and mean densities' ratio."""
    with np.load(GOLDEN) as golden:
        for detector in detectors():
            if f"{detector.name}.maps" in golden:
                maps, counts = found(images, detector)
                was, had = golden[f"{detector.name}.maps"], golden[f"{detector.name}.counts"]
                ratio = max(maps.mean() / was.mean(), counts.mean() / had.mean(), key=distance)
                yield detector.name, (maps != was).mean(), (counts != had).mean(), ratio


def distance(ratio):
    return abs(ratio - 1)


@pytest.fixture
def photographs(demo_images):
    return demo_images[:: len(demo_images) // PHOTOGRAPHS][:PHOTOGRAPHS]


def test_densities_are_the_golden_ones(photographs):
    rows = list(apart(photographs))
    assert len(rows) >= 6
    for name, maps, counts, ratio in rows:
        if name == "mser" and not cv2.__version__.startswith(MSER):
            continue
        # OpenCV resizes and smooths in other instructions on other processors: a few roundings.
        assert max(maps, counts) < 0.02, (name, maps, counts)
        assert distance(ratio) < 0.002, (name, ratio)


if __name__ == "__main__":
    source = preprocess.open_source("demo")
    images = [preprocess.decode_image(source.read(entry)) for entry in source.entries]
    images = images[:: len(images) // PHOTOGRAPHS][:PHOTOGRAPHS]
    if sys.argv[1:] == ["write"]:
        arrays = dict(np.load(GOLDEN)) if GOLDEN.exists() else {}
        for detector in detectors():
            if cv2.__version__.startswith(MSER) or f"{detector.name}.maps" not in arrays:
                for kind, array in zip(("maps", "counts"), found(images, detector), strict=True):
                    arrays[f"{detector.name}.{kind}"] = array
        np.savez_compressed(GOLDEN, **arrays)
    for name, maps, counts, ratio in apart(images):
        print(f"{cv2.__version__} {name:9} {maps:.4f} {counts:.4f} {ratio:.4f}")
