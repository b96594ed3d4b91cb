"""What one process can read where decoding costs nothing: at ImageNet's size, by threads.

Decoding is replaced by a sleep of SLEEP, which takes neither a core nor the interpreter lock. What
is left is the loader's own work, and the rate at which more threads no longer help is its ceiling,
however many cores a machine has. The set is a stand-in: an index of IMAGENET records over links to
one shard, so that the plan, the index and the open files are as large as they would be.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from preprocess import build_shards, detector_settings, open_source
from preprocess.defaults import default_settings
from shards import ShardSet
from shards.files import MANIFEST
from shards.order import Plan
from shards.record import npy_bytes
from shards.spec import to_json, write_file

IMAGENET, SHARD = 1_281_167, 1000
SLEEP = 250e-6  # seconds, in place of a decode
BATCH, SECONDS, REPEATS = 256, 2.0, 3


def enlarged(records: ShardSet, folder: Path, count: int = IMAGENET) -> ShardSet:
    """A set of `count` records: those of the first shard of `records`, over and over."""
    first = records.shards[0]
    files = []
    for number, begin in enumerate(range(0, count, SHARD)):
        name = f"shard-{number:06d}.tar"
        (folder / name).symlink_to(records.folder.absolute() / first.name)
        files.append(replace(first, name=name, count=min(SHARD, count - begin)))
    rows = np.concatenate(
        [np.resize(np.array(records.index[: first.count]), file.count) for file in files]
    )
    rows["key"] = np.arange(count)
    index = write_file(folder / records.manifest.index.name, npy_bytes(rows), count)
    ledger = replace(records.manifest.ledger, inputs=count, written=count, rejected={})
    manifest = replace(records.manifest, shards=files, index=index, ledger=ledger)
    (folder / MANIFEST).write_bytes(to_json(manifest))
    return ShardSet(folder)


@contextmanager
def sleeping(seconds: float) -> Iterator[None]:
    """While the block runs, decoding a JPEG takes that long and decodes nothing."""

    def decode(data: Any, colorspace: str, buffer: Any) -> Any:
        time.sleep(seconds)
        return buffer

    real, simplejpeg.decode_jpeg = simplejpeg.decode_jpeg, decode
    try:
        yield
    finally:
        simplejpeg.decode_jpeg = real


def rate(records: ShardSet, threads: int, seconds: float = SECONDS) -> tuple[float, float]:
    """Images a second of the loader with `threads`, with maps; and the cores that it took."""
    plan = Plan(len(records), BATCH)
    ahead = max(3, 2 * threads * 16 // BATCH + 2)
    names = records.manifest.detectors[:1]
    loader = records.loader(plan, 0, 1 << 30, maps=names, workers=threads, prefetch=ahead)
    stream: Any = iter(loader)
    for _ in range(2 * ahead):
        next(stream)
    begin, cpu, batches = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begin < seconds:
        next(stream)
        batches += 1
    spent, cpu = time.perf_counter() - begin, time.process_time() - cpu
    stream.close()
    return batches * BATCH / spent, cpu / spent


def decode_seconds(records: ShardSet) -> float:
    """Seconds that one thread takes to decode a frame."""
    frames = [records[number].frame for number in range(min(200, len(records)))]
    side = records.manifest.settings.frame
    out = np.empty((side, side, 3), np.uint8)
    begin = time.perf_counter()
    for frame in frames:
        simplejpeg.decode_jpeg(frame, "RGB", buffer=out)
    return (time.perf_counter() - begin) / len(frames)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind, quality in (("jpeg", 90), ("raw", 0)):
        small, large = folder / f"{kind}-small", folder / f"{kind}-large"
        if not large.exists():
            settings = default_settings((detector_settings("fast"),), 400)
            build_shards(open_source("demo"), small, replace(settings, quality=quality))
            large.mkdir()
            enlarged(ShardSet(small), large)
        records = ShardSet(large)
        plan = Plan(len(records), 2048)
        best = 9.0
        for step in range(40):
            begin = time.perf_counter()
            plan.samples(step)
            best = min(best, time.perf_counter() - begin)
        print(kind, f"samples of 2048 {best * 1e3:.2f} ms")
        if kind == "jpeg":
            print(f"decode {decode_seconds(records) * 1e6:.0f} us")
        with sleeping(SLEEP):
            for threads in map(int, sys.argv[2:]):
                found, cores = rate(records, threads)
                print(kind, threads, f"threads: {found:.0f} images/s, {cores:.2f} cores")
