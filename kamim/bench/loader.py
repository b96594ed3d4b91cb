"""How fast batches come from shards, and what weights cost a step; run by `make bench-loader`.

The loader against decoding alone, threads against processes, with maps against without, the
weighted step against the unweighted one.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import cv2
import joblib
import numpy as np
import simplejpeg
import torch

from kamim.bench.gpu_steps import Training, always
from kamim.bench.measuring import figures, in_turn, keep, temporary_set
from kamim.bench.provenance import ratio
from kamim.bench.rivals import by_processes, timed
from shards import Plan, ShardSet, decode_frame, loader, reading, turbojpeg, vectored
from shards.errors import UserError
from train.recipes import find_recipe

REPEATS, BATCH, STEPS, LONG, AHEAD = 9, 200, 24, 120, 3


class _Frames(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same records for a DataLoader of processes: what threads are measured against."""

    def __init__(self, records: ShardSet) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        record = self.records[number]
        frame = simplejpeg.decode_jpeg(record.frame, "RGB")
        return torch.from_numpy(frame), torch.from_numpy(np.array(record.maps["fast"]))


def decode_rate(frames: list[bytes], decode: Callable[[bytes], Any]) -> float:
    """Images per second of one thread that does nothing but decode."""
    begin = time.perf_counter()
    for frame in frames:
        decode(frame)
    return len(frames) / (time.perf_counter() - begin)


def loader_rate(
    records: ShardSet, detectors: list[str], bank: bool = False, steps: int = STEPS, **how: Any
) -> float:
    """Images per second of our loader once its buffers have been used."""
    plan = Plan(len(records), BATCH)
    stream = records.loader(plan, 0, steps, maps=detectors, bank=bank, prefetch=AHEAD, **how)
    return timed(((batch.frames,) for batch in stream), skip=AHEAD + 1)


def compiled_rate(records: ShardSet, compiled: bool, steps: int, workers: int = 0) -> float:
    """Images per second with maps, a chunk by one compiled call or record by record."""
    raw = records.manifest.settings.quality == 0
    name, there = ("compiled", vectored) if raw else ("compiled_decoder", turbojpeg)
    if compiled and there.compiled() is None:
        where = "numba" if raw else "numba or libturbojpeg"
        raise UserError(f"{where} is not installed, or broken; see kamim doctor")
    with ExitStack() as stack:
        stack.enter_context(patch.object(loader, "LONG", 0))
        if not compiled:
            stack.enter_context(patch.object(reading, name, lambda: None))
        return loader_rate(records, ["fast"], steps=steps, workers=workers)


def processes_rate(records: ShardSet, cores: int) -> float:
    """Images per second of a DataLoader with a process per core once its queues have been used."""
    return by_processes(_Frames(records), cores, BATCH)(STEPS * BATCH)


def step_seconds(records: ShardSet, repeats: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of training steps on one batch with and without weights, in turn, behind `warm`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, batch = ("vit_base", 256) if device.type == "cuda" else ("vit_tiny", 16)
    training = Training(replace(find_recipe(name), batch=batch), records, device)
    stream = training.stream(records)
    still = always(deepcopy(next(stream)), device)
    stream.close()
    works = {
        "weighted": lambda: training.timed(still, 1)[0],
        "unweighted": lambda: training.timed(still, 1, training.plain)[0],
    }
    return in_turn(works, repeats, warm)


def measure(records: ShardSet, banked: ShardSet, raw: ShardSet) -> dict[str, Any]:
    """One row of results, printed as a table. `banked` and `raw` are the same set with a bank and
    with raw frames. `records` must not have a bank: processes would parse it.
    """
    cores = joblib.cpu_count()
    cv2.setNumThreads(1)
    frames = [records[n].frame for n in range(len(records))]
    buffer = np.empty((256, 256, 3), np.uint8)
    works: dict[str, Callable[[], float]] = {
        "decode alone, simplejpeg": lambda: decode_rate(
            frames, lambda frame: simplejpeg.decode_jpeg(frame, "RGB", buffer=buffer)
        ),
        "decode alone, OpenCV": lambda: decode_rate(frames, decode_frame),
        "loader, threads, with maps": lambda: loader_rate(records, ["fast"]),
        "loader, threads, without maps": lambda: loader_rate(records, []),
        "loader, threads, from the bank": lambda: loader_rate(banked, ["fast"], bank=True),
        "loader, threads, raw frames": lambda: compiled_rate(raw, True, LONG),
        "the same without numba": lambda: compiled_rate(raw, False, LONG),
        "16 threads, raw frames": lambda: compiled_rate(raw, True, LONG, 16),
        "16 threads, the same without numba": lambda: compiled_rate(raw, False, LONG, 16),
        "JPEG frames, by one call": lambda: compiled_rate(records, True, LONG),
        "JPEG frames, one by one": lambda: compiled_rate(records, False, LONG),
        "16 threads, JPEG frames, by one call": lambda: compiled_rate(records, True, LONG, 16),
        "16 threads, JPEG frames, one by one": lambda: compiled_rate(records, False, LONG, 16),
        "DataLoader, processes, with maps": lambda: processes_rate(records, cores),
    }
    rates = in_turn(works, REPEATS)
    simple, _, threads, bare, stored, *compiled, processes = rates.values()
    of_raw, single, of_16, single_16, jpeg, jpeg_single, jpeg_16, jpeg_single_16 = compiled
    step = step_seconds(records, REPEATS * 2)
    ratios = {
        "loader / (cores x decode alone)": ratio(threads, [cores * rate for rate in simple]),
        "with maps / without": ratio(threads, bare),
        "from the bank / without maps": ratio(stored, bare),
        "raw frames / JPEG frames": ratio(of_raw, threads),
        "raw frames, with numba / without": ratio(of_raw, single),
        "16 threads, raw frames, with numba / without": ratio(of_16, single_16),
        "JPEG frames, by one call / one by one": ratio(jpeg, jpeg_single),
        "16 threads, JPEG frames, by one call / one by one": ratio(jpeg_16, jpeg_single_16),
        "threads / processes": ratio(threads, processes),
        "weighted step / unweighted": ratio(step["weighted"], step["unweighted"]),
    }
    return {"bench": "loader", "images": len(records), "n": REPEATS, **figures(rates, ratios)}


def measure_all(where: str) -> list[dict[str, Any]]:
    """The row of the source `where`."""
    with (
        temporary_set(where) as records,
        temporary_set(where, bank=4) as banked,
        temporary_set(where, quality=0) as raw,
    ):
        return [measure(records, banked, raw)]


if __name__ == "__main__":
    keep("loader", measure_all)
