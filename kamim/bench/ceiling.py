"""What one process can read where cores are free, at ImageNet's size; run by `make bench-ceiling`.

Decoding a JPEG, or reading a raw frame, is replaced by a sleep of SLEEP, which takes neither a core
nor the interpreter lock. What is left is the loader's own work, and the rate at which more threads
no longer help is its ceiling, however many cores a machine has. The set is a stand-in: the records
at hand again and again, so that plan, index and open files are as many as ImageNet's.
"""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import joblib
import numpy as np
import simplejpeg

from kamim.bench.gpu_page import IMAGENET
from kamim.bench.measuring import keep, temporary_set
from kamim.bench.provenance import spread
from shards import ShardSet, processes, reading, turbojpeg, vectored
from shards.crops import Ints
from shards.loader import AT_ONCE
from shards.order import Plan
from shards.reading import Buffers

SHARD = 1000
SLEEP = 250e-6  # seconds, in place of a decode
THREADS, PROCESSES = (1, 4, 16, 32, 64), (4, 8, 16)  # a process wants a core, even to sleep on
BATCH, SECONDS, REPEATS = 256, 2.0, 3
FOR_GOOD = ExitStack()


def as_many(records: ShardSet, count: int = IMAGENET) -> ShardSet:
    """`records` again and again, as a set of `count` in shards of SHARD. The plan, finding a sample
    and the open files then cost what they do in a set of that size.
    """
    many, manifest = ShardSet(records.folder), records.manifest
    firsts = records.ends - [shard.count for shard in records.shards]
    full = np.flatnonzero(firsts < records.ends).tolist()
    files, rows = [], []
    for number, begin in enumerate(range(0, count, SHARD)):
        at = full[number % len(full)]
        files.append(replace(records.shards[at], count=min(SHARD, count - begin)))
        rows.append(np.resize(records.index[firsts[at] : records.ends[at]], files[-1].count))
    ledger = replace(manifest.ledger, written=count)
    many.shards, many.index = files, np.concatenate(rows)
    many.manifest = replace(manifest, ledger=ledger, shards=files)
    many.ends = np.cumsum([file.count for file in files], dtype=np.int64)
    return many


@contextmanager
def replaced(decode: float | None = None, read: float | None = None) -> Iterator[None]:
    """While the block runs, decoding or reading only sleeps, for so many seconds."""

    def decoded(data: Any, colorspace: str, buffer: Any) -> Any:
        if decode:
            time.sleep(decode)
        return buffer

    def preadv(descriptor: int, targets: list[memoryview], start: int) -> int:
        if read:
            time.sleep(read)
        return sum(map(len, targets))

    wait, pause = ctypes.CDLL(None).usleep, round(1e6 * (read or 0))
    wait.argtypes, wait.restype = [ctypes.c_uint32], ctypes.c_int
    length = round(1e6 * (decode or 0))

    def decoded_at_once(jpeg: int, size: int, pixels: int, side: int) -> int:
        if length:
            wait(length)
        return 0

    def at_once(descriptors: Ints, starts: Ints, vectors: Ints, counts: Ints) -> None:
        for at in range(len(starts)):
            if pause:
                wait(pause)
            counts[at] = vectors[at, :, 1].sum()

    with ExitStack() as stack:
        if decode is not None:
            if turbojpeg.compiled():  # looked at before what it compares with is replaced
                loop = turbojpeg.without_lock(decoded_at_once)
                stack.enter_context(patch.object(reading, "compiled_decoder", lambda: loop))
            stack.enter_context(patch.object(simplejpeg, "decode_jpeg", decoded))
        if read is not None:  # and what was not read is not looked at
            compiled = vectored.without_lock(at_once)
            stack.enter_context(patch.object(os, "preadv", preadv))
            stack.enter_context(patch.object(reading, "compiled", lambda: compiled))
            stack.enter_context(patch.object(Buffers, "flaws", lambda *_: {}))
        line = f"from kamim.bench.ceiling import begin_replaced; begin_replaced({decode}, {read}); "
        start = processes.START.replace("from ", line + "from ", 1)
        stack.enter_context(patch.object(processes, "START", start))
        yield


def begin_replaced(decode: float | None, read: float | None) -> None:
    """As `replaced`, without an end, in a process of the loader."""
    FOR_GOOD.enter_context(replaced(decode, read))


def rate(
    records: ShardSet, workers: int, seconds: float = SECONDS, processes: bool = False
) -> tuple[float, float]:
    """Images per second of the loader with `workers`, with maps; and the cores that it took."""
    plan = Plan(len(records), BATCH)
    ahead = max(3, 2 * workers * AT_ONCE // BATCH + 2)  # two chunks for each worker
    names = records.manifest.detectors[:1]
    loader = records.loader(
        plan, 0, 1 << 30, maps=names, workers=workers, prefetch=ahead, processes=processes
    )
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


def samples_ms(count: int = IMAGENET, batch: int = 2048) -> float:
    """Milliseconds of `Plan.samples`, the best of many."""
    plan, best = Plan(count, batch), float("inf")
    for step in range(40):
        begin = time.perf_counter()
        plan.samples(step)
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


def measure(where: str, seconds: float = SECONDS) -> list[dict[str, Any]]:
    """The row of the source `where`, printed as a table."""
    row: dict[str, Any] = {"bench": "ceiling", "images": IMAGENET, "n": REPEATS, "batch": BATCH}
    row["samples of 2,048, ms"] = round(samples_ms(), 2)
    for kind, quality, what in (("JPEG", 90, "decode"), ("raw", 0, "read")):
        with temporary_set(where, quality=quality) as small:
            records = as_many(small)
            if what == "decode":
                row["decode, us"] = round(min(decode_seconds(small) for _ in range(9)) * 1e6)
            with replaced(**{what: 0.0}):
                own = [cores / found * 1e6 for found, cores in _rates(records, 1, seconds)]
            row[f"{kind}, own work per sample, us"] = spread(own, 1)
            with replaced(**{what: SLEEP}):
                for threads in THREADS:
                    found = [found for found, _ in _rates(records, threads, seconds)]
                    row[f"{kind}, images/s by {threads} threads"] = spread(found, 0)
                for count in PROCESSES if max(PROCESSES) <= joblib.cpu_count() else ():
                    found = [found for found, _ in _rates(records, count, seconds, True)]
                    row[f"{kind}, images/s by {count} processes"] = spread(found, 0)
    own_work = row["JPEG, own work per sample, us"]["median"]
    row["JPEG, own work / decode"] = round(own_work / row["decode, us"], 3)
    for name, value in row.items():
        print(f"{name:36s} {value['median'] if isinstance(value, dict) else value}")
    return [row]


def _rates(
    records: ShardSet, workers: int, seconds: float, processes: bool = False
) -> list[tuple[float, float]]:
    return [rate(records, workers, seconds, processes) for _ in range(REPEATS)]


if __name__ == "__main__":
    keep("ceiling", measure)
