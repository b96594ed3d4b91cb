"""JPEG frames decoded by the device against the loader's threads: equal pixels? faster?

`python -m kamim.bench.decode SHARDS` prints one row, and --save appends it: how far pixels differ
from simplejpeg's, images a second of the device's decoder alone, and of weighted crops by either.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
import torch

import shards
from kamim.bench.measuring import in_turn
from kamim.bench.provenance import append, ratio, spread
from shards import Plan, ShardSet, WeightedCrops, to_device
from shards.decoding import decode_files
from shards.device import find_device, pinned
from shards.loader import Loader
from shards.records import Decode

BATCH, STEPS, REPEATS = 256, 40, 5


def differences(records: ShardSet, device: torch.device, count: int) -> dict[str, float]:
    """How far the device's pixels are from simplejpeg's over `count` frames, in levels of 255."""
    found: list[np.ndarray] = []
    loader = Loader(records, Plan(len(records), 1, in_order=True), 0, count, coded=True)
    for batch in loader:
        (file,) = batch.frames
        ours = simplejpeg.decode_jpeg(file.tobytes(), "RGB").astype(np.int16)
        theirs = decode_files([file], device)[0].cpu().numpy()
        found.append(np.bincount(np.abs(ours - theirs).ravel(), minlength=256))
    levels = np.sum(found, axis=0)
    total, at = levels.sum(), np.arange(256)
    return {
        "most": int(np.flatnonzero(levels)[-1]),
        "mean": round(float((levels * at).sum() / total), 4),
        "share_differing": round(float(levels[1:].sum() / total), 4),
        "share_by_more_than_2": round(float(levels[3:].sum() / total), 6),
    }


def decoder_rate(records: ShardSet, device: torch.device) -> float:
    """Images a second of the device's decoder alone, a batch of files at a time."""
    files: Any = next(iter(Loader(records, Plan(len(records), BATCH), 0, 1, coded=True))).frames
    return _rate(lambda: decode_files(files, device), device)


def crops_rate(records: ShardSet, device: torch.device, decode: Decode) -> float:
    """Images a second of weighted crops on the device, nothing else to do."""
    name = records.manifest.detectors[0]
    crops = WeightedCrops(records, name, size=192).to(device)
    plan = Plan(len(records), BATCH)
    allocate = pinned if device.type == "cuda" else None
    loader = Loader(
        records, plan, 0, 1 << 30, maps=[name], coded=decode == "gpu", allocate=allocate
    )
    stream: Any = to_device(loader, device)
    for _ in range(loader.prefetch):
        next(stream)
    found = _rate(lambda: crops(next(stream)[1]), device)
    stream.close()
    return found


def _rate(work: Callable[[], object], device: torch.device) -> float:
    work()
    _wait(device)
    begin = time.perf_counter()
    for _ in range(STEPS):
        work()
    _wait(device)
    return STEPS * BATCH / (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(records: ShardSet, device: torch.device, repeats: int = REPEATS) -> dict[str, Any]:
    """The row; repeats are interleaved."""
    ways: dict[str, Callable[[], float]] = {
        "decoder alone": lambda: decoder_rate(records, device),
        "crops, decoded by threads": lambda: crops_rate(records, device, "cpu"),
        "crops, decoded by the device": lambda: crops_rate(records, device, "gpu"),
    }
    rates = in_turn(ways, repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    row: dict[str, Any] = {"bench": "decode", "device": name, "n": repeats, "batch": BATCH}
    row["difference"] = differences(records, device, min(len(records), 512))
    row |= {way: spread(values, 0) for way, values in rates.items()}
    _, threads, by_device = rates.values()
    row["device / threads"] = ratio(by_device, threads)
    return row


if __name__ == "__main__":
    row = measure(shards.open(sys.argv[1]), find_device("auto"))
    print(json.dumps(row, indent=1))
    if "--save" in sys.argv:
        print(append("decode", [row]), file=sys.stderr)
