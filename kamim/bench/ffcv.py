"""FFCV with square frames against FFCV as it comes; run by `make bench-ffcv`.

In: a source of photographs. Out: a table and results/ffcv.jsonl: images a second of FFCV's own
RandomResizedCrop on the same photos (short side 256, same quality) against our JPEG and raw sets,
with and without maps, and the time to the first batch at 0 % and at 90 % of an epoch.
"""

import sys
import tempfile
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

from kamim.bench.provenance import append, ratio, spread
from preprocess import build_shards, decode_image, detector_settings, open_source
from preprocess.building import shard_size_for
from preprocess.source import Source
from shards import Settings, ShardSet
from shards.beton import convert_to_ffcv
from shards.ffcv_loader import FfcvLoader
from shards.order import Plan

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
    """A function that runs our loader over several epochs and gives images a second."""
    count = len(records)
    plan, steps = Plan(count, BATCH), 6 * count // BATCH
    loader = FfcvLoader(records, plan, 0, steps, maps=detectors)

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
    loader = FfcvLoader(records, plan, int(at * steps), int(at * steps) + 1)
    next(iter(loader))  # compiles
    begin = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - begin


def main(where: str) -> None:
    """Build the three sets, measure interleaved, print and append."""
    source = open_source(where)
    count = len(source.entries)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        detectors = (detector_settings("fast"),)
        size = shard_size_for(count)
        build_shards(source, folder / "shards", Settings(detectors=detectors, shard_size=size))
        for frames in ("jpeg", "raw"):
            convert_to_ffcv(folder / "shards", folder / frames, frames)
        write_stock(source, folder / "stock.beton")
        jpeg, raw = ShardSet(folder / "jpeg"), ShardSet(folder / "raw")
        works = {
            "FFCV's RandomResizedCrop, JPEG": stock(folder / "stock.beton", count),
            "square JPEG, with maps": ours(jpeg, ["fast"]),
            "square JPEG, without maps": ours(jpeg, []),
            "square raw, with maps": ours(raw, ["fast"]),
            "square raw, without maps": ours(raw, []),
        }
        rates: dict[str, list[float]] = {name: [work()] for name, work in works.items()}
        for name in works:
            rates[name].clear()  # that was the warm-up: compiling, page cache
        for _ in range(REPEATS):
            for name, work in works.items():
                rates[name].append(work())
        resume = [first_batch(raw, 0.9) / first_batch(raw, 0.0) for _ in range(5)]
    row: dict[str, Any] = {"bench": "ffcv", "images": count, "n": REPEATS}
    base, with_maps, bare, raw_maps, raw_bare = rates.values()
    ratios = {
        "square JPEG / RandomResizedCrop": ratio(with_maps, base),
        "raw / JPEG": ratio(raw_maps, with_maps),
        "JPEG with maps / without": ratio(with_maps, bare),
        "raw with maps / without": ratio(raw_maps, raw_bare),
        "first batch at 90 % / at 0 %": spread(resume),
    }
    for name, figure in ({name: spread(v, 0) for name, v in rates.items()} | ratios).items():
        row[name] = figure
        print(f"{name:36s} {figure['median']:>9,} ({figure['min']:,} to {figure['max']:,})")
    print(append("ffcv", [row]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
