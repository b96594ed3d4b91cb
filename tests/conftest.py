"""Shared fixtures: real photographs where they are at hand, small sources made on the spot."""

import os
from pathlib import Path

import cv2
import hypothesis
import numpy as np
import pytest

import preprocess
import preprocess.sources
import shards
from preprocess import build_shards, open_source
from shards.convert import convert_to_ffcv

# A build server tries the same examples each time; everyone else finds new ones.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.get("KAMIM_DATA", REPOSITORY.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Paths of the 800 ImageNet photographs; skips, visibly, where they are absent."""
    found = sorted((DATA / "imagenet-sample").glob("*/*.JPEG"))
    if not found:
        pytest.skip(f"no photographs under {DATA}; set KAMIM_DATA to the folder that has them")
    return found


@pytest.fixture(scope="session")
def demo_images() -> list[np.ndarray]:
    """The 312 demo images as uint8 RGB; they need no data of anybody's."""
    source = preprocess.open_source("demo")
    return [
        preprocess.decode_image(preprocess.sources.read("demo", source.root, entry))
        for entry in source.entries
    ]


@pytest.fixture
def small_source(tmp_path: Path, demo_images: list[np.ndarray]) -> Path:
    """A folder of 4 classes with 10 small JPEGs each, cut from the demo images."""
    root = tmp_path / "source"
    for number, image in enumerate(demo_images[::7][:40]):
        path = root / f"class{number % 4}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(image, (96, 80))[:, :, ::-1])
    return root


def settings(**changes: object) -> shards.Settings:
    """Small, fast settings for builds in tests."""
    plain = {
        "frame": 64,
        "quality": 90,
        "crop": 64,
        "area": (0.67, 1.0),
        "map_crops": 1,
        "bank": 0,
        "grid": 16,
        "mark": "ring",
        "detect_on": "source",
        "detectors": (preprocess.detector_settings("fast"),),
        "shard_size": 4,
    }
    return shards.Settings(**(plain | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished set, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def built(small_source, tmp_path):
    detectors = tuple(preprocess.detector_settings(n) for n in ("fast", "orb"))
    chosen = settings(frame=120, detectors=detectors, crop=96, bank=2)
    build_shards(open_source(str(small_source)), tmp_path / "built", chosen, 1)
    return tmp_path / "built"


@pytest.fixture(params=["jpeg", "raw"])
def converted(request, built, tmp_path):
    convert_to_ffcv(built, tmp_path / request.param, request.param)
    return tmp_path / request.param
