"""How fast batches come from shards, and what weights cost a step; run by `make bench-loader`.

In: a finished set of shards (by default one built from DATA, else from the demo). Out: a table and
results/loader.jsonl: the loader against decoding alone, threads against processes, with maps
against without, the weighted step against the unweighted one; interleaved, medians.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import simplejpeg
import torch

from kamim.bench.provenance import append, ratio, spread
from preprocess import build_shards, detector_settings, open_source
from preprocess.building import shard_size_for
from shards import Settings, ShardSet, decode_frame
from shards.loader import Loader
from shards.order import Plan
from shards.weighting import to_device
from train.loss import masked_l1
from train.masking import block_masks
from train.models import CELL, SimMIM
from train.recipes import find_recipe
from train.setup import weighted_crops

REPEATS = 9
BATCH = 200


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
    """Images a second of one thread that does nothing but decode."""
    begin = time.perf_counter()
    for frame in frames:
        decode(frame)
    return len(frames) / (time.perf_counter() - begin)


def loader_rate(
    records: ShardSet, detectors: list[str], bank: bool = False, steps: int = 24
) -> float:
    """Images a second of our loader once its buffers have been used."""
    plan = Plan(len(records), BATCH)
    loader = Loader(records, plan, 0, steps, maps=detectors, bank=bank)
    begin = 0.0
    for number, _ in enumerate(loader):
        if number == loader.prefetch:
            begin = time.perf_counter()
    return (steps - loader.prefetch - 1) * BATCH / (time.perf_counter() - begin)


def processes_rate(records: ShardSet, cores: int) -> float:
    """Images a second of a DataLoader with a process a core, its start left out."""
    loader = torch.utils.data.DataLoader(
        _Frames(records), BATCH, shuffle=True, num_workers=cores, prefetch_factor=3
    )
    count, begin = 0, 0.0
    for number, (frames, _) in enumerate(loader):
        begin = time.perf_counter() if number == 0 else begin
        count += len(frames) if number else 0
    return count / (time.perf_counter() - begin)


def step_seconds(records: ShardSet, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of training steps on one batch with and without weights, interleaved."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = find_recipe("vit_base" if device.type == "cuda" else "vit_tiny")
    batch = 256 if device.type == "cuda" else 16
    model = SimMIM(recipe.model, recipe.size).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    detector = records.manifest.detectors[0]
    loader = records.loader(Plan(len(records), batch), 0, 1, maps=[detector])
    _, tensors = next(to_device(loader, device))
    mask = block_masks(0, 0, batch, recipe.size // CELL, recipe.mask_ratio, device)
    ways = [weighted_crops(recipe, records, name).to(device) for name in (detector, None)]
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 2):
        for taken, crops in zip(times, ways, strict=True):
            begin = time.perf_counter()
            images, weights, *_ = crops(tensors)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                reconstruction = model(images, mask)
            masked_l1(reconstruction, images, mask, weights).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                taken.append(time.perf_counter() - begin)
    return times


def main(where: str) -> None:
    """Measure, print and append."""
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(where)
        detectors = (detector_settings("fast"),)
        size = shard_size_for(len(source.entries))
        settings = Settings(detectors=detectors, shard_size=size, bank=4)
        build_shards(source, Path(folder) / "shards", settings)
        build_shards(source, Path(folder) / "raw", replace(settings, quality=0, bank=0))
        row = measure(ShardSet(Path(folder) / "shards"), ShardSet(Path(folder) / "raw"))
    print(append("loader", [row]))


def measure(records: ShardSet, raw: ShardSet) -> dict[str, Any]:
    """One row of results, printed as a table. `raw` is the same set with raw frames."""
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
        "loader, threads, from the bank": lambda: loader_rate(records, ["fast"], bank=True),
        "loader, threads, raw frames": lambda: loader_rate(raw, ["fast"], steps=120),
        "DataLoader, processes, with maps": lambda: processes_rate(records, cores),
    }
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            rates[name].append(work())
    ceiling = [cores * rate for rate in rates["decode alone, simplejpeg"]]
    threads, bare = rates["loader, threads, with maps"], rates["loader, threads, without maps"]
    stored = rates["loader, threads, from the bank"]
    processes = rates["DataLoader, processes, with maps"]
    weighted, plain = step_seconds(records, REPEATS * 2)
    ratios = {
        "loader / (cores x decode alone)": ratio(threads, ceiling),
        "with maps / without": ratio(threads, bare),
        "from the bank / without maps": ratio(stored, bare),
        "raw frames / JPEG frames": ratio(rates["loader, threads, raw frames"], threads),
        "threads / processes": ratio(threads, processes),
        "weighted step / unweighted": ratio(weighted, plain),
    }
    row: dict[str, Any] = {"bench": "loader", "images": len(records), "n": REPEATS}
    for name, figure in ({name: spread(v, 0) for name, v in rates.items()} | ratios).items():
        row[name] = figure
        print(f"{name:36s} {figure['median']:>9,} ({figure['min']:,} to {figure['max']:,})")
    return row


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
