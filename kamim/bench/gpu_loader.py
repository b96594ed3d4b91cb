"""The loader alone on the GPU's machine, by its threads, as if the set were as large as ImageNet.

Images per second into the buffers from which one process feeds its GPU, of each container and kind
of frame.
"""

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import joblib

from kamim.bench.ceiling import as_many
from kamim.bench.gpu import Bench, Case
from kamim.bench.gpu_page import IMAGENET
from kamim.bench.provenance import spread
from shards import Plan, ShardSet
from shards.beton import convert_to_ffcv

THREADS = (1, 2, 4, 8, 16)
BATCH = 256


def loader(bench: Bench) -> Iterator[Case]:
    """Each kind of set by each number of threads, up to the machine's cores."""

    @cache
    def raw() -> ShardSet:
        """The set's frames as they are decoded, in tars."""
        return bench.build(f"shards:{bench.records.folder}", "raw", ["fast"], quality=0)

    @cache
    def beton(frames: str) -> ShardSet:
        convert_to_ffcv(bench.records.folder, bench.folder / f"ffcv-{frames}", frames)
        return ShardSet(bench.folder / f"ffcv-{frames}")

    kinds: dict[str, Callable[[], ShardSet]] = {
        "WebDataset JPEG": lambda: as_many(bench.records, IMAGENET),
        "WebDataset raw": lambda: as_many(raw(), IMAGENET),
        "FFCV JPEG": lambda: beton("jpeg"),
        "FFCV raw": lambda: beton("raw"),
    }
    for kind, opened in kinds.items():
        if kind.startswith("FFCV") and find_spec("ffcv") is None:
            yield Case("loader", kind, lambda: {"n": 0, "missing": "FFCV is not installed"})
            continue
        for threads in THREADS:
            if threads <= joblib.cpu_count():
                work = partial(_measure, bench, opened, threads)
                yield Case("loader", f"{kind}, {threads} threads", work)


def _measure(bench: Bench, opened: Callable[[], ShardSet], threads: int) -> dict[str, Any]:
    """Rates of consecutive stretches of one stream, once its queue has been emptied."""
    records = opened()
    plan = Plan(len(records), BATCH)
    maps, kind = records.manifest.detectors[:1], bench.device.type
    stream = iter(records.loader(plan, 0, 1 << 30, maps=maps, workers=threads, device=kind))
    for _ in range(5):  # those in the queue, and one more
        next(stream)
    begin = time.perf_counter()
    next(stream)
    each = time.perf_counter() - begin
    batches = max(1, min(400, int(bench.seconds / 2 / each)))
    found, busy = [], []
    for _ in range(bench.repeats):
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(stream)
        spent = time.perf_counter() - begin
        found.append(batches * BATCH / spent)
        busy.append((time.process_time() - cpu) / spent)
    stream.close()  # type: ignore[attr-defined]
    return {
        "n": bench.repeats,
        "threads": threads,
        "records": len(records),
        "images_per_s": spread(found, 1),
        "cores_busy": spread(busy, 2),
    }
