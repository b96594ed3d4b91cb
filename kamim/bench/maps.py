"""How fast densities are looked up by name in a set without frames as large as ImageNet-1K.

The set is synthetic: true names, maps of noise, one detector. Opening and look-ups are measured in
a process of their own, which has nothing else in memory.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import shards
from kamim.bench.gpu_page import IMAGENET
from kamim.bench.provenance import append, check_checkout, spread
from shards import Detector, File, Ledger, Manifest, Record, Settings, spec
from shards.maps import MapsWriter
from shards.names import write_names
from shards.record import key_of, npy_bytes
from shards.tar import shard_name

CLASSES, SHARD, LOOKUPS, REPEATS = 1000, 10_000, 100_000, 7
SETTINGS = Settings(
    frame=0, quality=0, detectors=(Detector("fast", {"threshold": 10}),), shard_size=SHARD
)


def name_of(number: int, images: int) -> str:
    """As long as ImageNet's names are."""
    return f"n{number * CLASSES // images:08d}/n{number:08d}_{number % 50_000}.JPEG"


def _records(first: int, images: int) -> Iterator[Record]:
    noise = np.random.default_rng(first).integers(0, 256, (64, 54, 54), np.uint8)
    for number in range(first, min(first + SHARD, images)):
        maps = {"fast": np.roll(noise[number % 64], number, axis=1)}
        yield Record(key_of(number), b"", number * CLASSES // images, 375, 500, "", maps)


def write_set(folder: Path, images: int) -> Manifest:
    """Write a set of `images` maps; returns its manifest, which lacks the names."""
    files: list[File] = []
    indexes = []
    for number, first in enumerate(range(0, images, SHARD)):
        with MapsWriter(folder / shard_name(number, SETTINGS), SETTINGS) as writer:
            for record in _records(first, images):
                writer.add(record)
        files.append(writer.file)
        indexes.append(writer.index)
    return Manifest(
        format_version=spec.FORMAT_VERSION,
        container="maps",
        settings=SETTINGS,
        source={"inputs": images, "ignored": 0, "sha256": ""},
        classes=[f"n{n:08d}" for n in range(CLASSES)],
        versions={"opencv": ""},
        fingerprint="synthetic",
        ledger=Ledger(images, images, {}),
        shards=files,
        index=spec.write_file(folder / spec.INDEX, npy_bytes(np.concatenate(indexes)), images),
        rejected=spec.write_file(folder / spec.REJECTED, b"", 0),
        fidelity={},
    )


def finish(folder: Path, bare: Manifest, kind: str) -> int:
    """Finish the set, as of a source of `kind`; returns its bytes."""
    names = write_names(folder, [name_of(n, bare.count) for n in range(bare.count)], kind)
    spec.write(folder, replace(bare, source={**bare.source, "kind": kind}, names=names))
    return sum(path.stat().st_size for path in folder.iterdir())


def _resident() -> float:
    """MB of this process in memory, files that it maps among them."""
    status = Path("/proc/self/status").read_text()
    return round(int(status.partition("VmRSS:")[2].split()[0]) / 1000, 1)


def measure(folder: Path, lookups: int) -> dict[str, Any]:
    """What a process that opens the set and looks densities up at random finds."""
    begin = time.perf_counter()
    records = shards.open(folder)
    images = len(records)
    records.density(name_of(0, images), "fast")
    opened = time.perf_counter() - begin
    one_by_one, batched, waited = [], [], []
    for seed in range(REPEATS):
        rng = random.Random(seed)
        names = [name_of(rng.randrange(images), images) for _ in range(lookups)]
        begin, wall = time.process_time(), time.perf_counter()
        for name in names:
            records.density(name, "fast")
        one_by_one.append(lookups / (time.process_time() - begin))
        waited.append(lookups / (time.perf_counter() - wall))
        begin = time.process_time()
        for at in range(0, lookups, 256):
            records.densities(names[at : at + 256], "fast")
        batched.append(lookups / (time.process_time() - begin))
    return {
        "open and first look-up, s": round(opened, 3),
        "look-ups per second of processor time": spread(one_by_one, 0),
        "look-ups per second of processor time, batches of 256": spread(batched, 0),
        "look-ups per second of wall time": spread(waited, 0),
        "resident MB after them": _resident(),
        "lookups": lookups * REPEATS * 2,
    }


def synthetic(images: int = IMAGENET, lookups: int = LOOKUPS) -> list[dict[str, Any]]:
    """The rows of a set of `images`, as of a folder and of a tar, whose names have keys, too."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        bare = write_set(Path(name), images)
        for kind in ("folder", "tar"):
            size = finish(Path(name), bare, kind)
            line = [sys.executable, "-m", "kamim.bench.maps", name, str(lookups)]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            facts = {"bench": "maps", "images": images, "kind": kind}
            rows.append({**facts, "GB on disk": round(size / 1e9, 3), **json.loads(done.stdout)})
    return rows


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
    else:
        check_checkout()
        rows = synthetic()
        for row in rows:
            print(json.dumps(row, indent=2))
        print(append("maps", rows))
