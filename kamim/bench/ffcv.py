"""FFCV with square frames against FFCV as it comes; run by `make bench-ffcv`.

FFCV's own RandomResizedCrop on the same photos (short side 256, same quality) against our JPEG and
raw sets, with and without maps, and the time to the first batch at 0 % and at 90 % of an epoch.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader as Ffcv
from ffcv.loader import OrderOption
from ffcv.writer import DatasetWriter

from kamim.bench.measuring import figures, in_turn, keep, temporary_set
from kamim.bench.provenance import ratio, spread
from preprocess import decode_image, open_source
from preprocess.source import Source
from shards import Plan, ShardSet
from shards.beton import convert_to_ffcv

BATCH, REPEATS = 100, 7


class _Photos:
    """The photos with a short side of 256 px, as people write them for FFCV."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.entries)

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        entry = self.source.entries[number]
        rgb = decode_image(self.source.read(entry))
        scale = 256 / min(rgb.shape[:2])
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        rgb = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=interpolation)
        return np.ascontiguousarray(rgb), entry.label


def write_stock(source: Source, path: Path) -> None:
    """The photographs as FFCV's own writer stores them."""
    fields = {"image": RGBImageField("jpg", jpeg_quality=90), "label": IntField()}
    writer = DatasetWriter(str(path), fields, num_workers=joblib.cpu_count())
    writer.from_indexed_dataset(_Photos(source))


def ours(records: ShardSet, detectors: list[str]) -> Callable[[], float]:
    """A function that runs our loader over several epochs and gives images per second."""
    count = len(records)
    plan, steps = Plan(count, BATCH), 6 * count // BATCH
    loader = records.loader(plan, 0, steps, maps=detectors)

    def run() -> float:
        return _rate(iter(loader), steps)

    return run


def stock(path: Path, count: int) -> Callable[[], float]:
    """The same for FFCV's own loader with its RandomResizedCrop at 192 px."""
    decoder = RandomResizedCropRGBImageDecoder((192, 192), scale=(0.67, 1.0))
    loader = Ffcv(
        str(path),
        batch_size=BATCH,
        num_workers=joblib.cpu_count(),
        order=OrderOption.RANDOM,
        # Every photo six times in one epoch: FFCV allocates its buffers anew each epoch, which
        # a set of this size would pay for far more often than a large one.
        indices=np.tile(np.arange(count), 6),
        pipelines={"image": [decoder]},
    )

    def run() -> float:
        return _rate(iter(loader), 6 * count // BATCH)

    return run


def _rate(batches: Iterator[Any], steps: int) -> float:
    next(batches)  # starting a thread and filling the queue is not the steady state
    begin = time.perf_counter()
    seen = sum(1 for _ in batches)
    assert seen == steps - 1
    return seen * BATCH / (time.perf_counter() - begin)


def first_batch(records: ShardSet, at: float) -> float:
    """Seconds from a compiled loader to its first batch at the share `at` of an epoch."""
    plan = Plan(len(records), BATCH)
    steps = len(records) // BATCH
    loader = records.loader(plan, int(at * steps), int(at * steps) + 1)
    next(iter(loader))  # compiles
    begin = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - begin


def measure(where: str) -> list[dict[str, Any]]:
    """One row: build the three sets, measure in turn, print."""
    source = open_source(where)
    count = len(source.entries)
    with temporary_set(where) as records:
        folder = records.folder.parent
        for frames in ("jpeg", "raw"):
            convert_to_ffcv(records.folder, folder / frames, frames)
        write_stock(source, folder / "stock.beton")
        jpeg, raw = ShardSet(folder / "jpeg"), ShardSet(folder / "raw")
        works = {
            "FFCV's RandomResizedCrop, JPEG": stock(folder / "stock.beton", count),
            "square JPEG, with maps": ours(jpeg, ["fast"]),
            "square JPEG, without maps": ours(jpeg, []),
            "square raw, with maps": ours(raw, ["fast"]),
            "square raw, without maps": ours(raw, []),
        }
        rates = in_turn(works, REPEATS, warm=1)  # which compiles, and fills the page cache
        resume = [first_batch(raw, 0.9) / first_batch(raw, 0.0) for _ in range(5)]
    base, with_maps, bare, raw_maps, raw_bare = rates.values()
    ratios = {
        "square JPEG / RandomResizedCrop": ratio(with_maps, base),
        "raw / JPEG": ratio(raw_maps, with_maps),
        "JPEG with maps / without": ratio(with_maps, bare),
        "raw with maps / without": ratio(raw_maps, raw_bare),
        "first batch at 90 % / at 0 %": spread(resume),
    }
    return [{"bench": "ffcv", "images": count, "n": REPEATS, **figures(rates, ratios)}]


if __name__ == "__main__":
    keep("ffcv", measure)
