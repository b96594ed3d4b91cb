"""A training step from shards against the same step on a batch that never changes.

Images per second end to end and synthetic, their ratio, what weights cost, the share of time spent
waiting, and model FLOP utilisation. Run by `make bench-step`; made for a CUDA device, where it
compiles and uses bf16.
"""

import statistics
import sys
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from kamim.bench.gpu_steps import Training, always
from kamim.bench.measuring import in_turn, keep, temporary_set
from shards import ShardSet
from train.cuda import peak_flops
from train.recipes import find_recipe
from train.setup import device_name, find_device
from train.step import Pace

WARM, STEPS, REPEATS = 8, 40, 5


def measure(
    records: ShardSet,
    name: str,
    device: torch.device,
    batch: int,
    steps: int = STEPS,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """One row for recipe `name` with `batch` samples per step: `repeats` in turn of `steps`."""
    training = Training(replace(find_recipe(name), batch=batch), records, device)
    batches = training.stream(records)
    frozen = always(deepcopy(next(batches)), device)
    stream, warm = Pace(batches, device), min(WARM, steps)
    for pace, micro in ((frozen, None), (frozen, training.plain), (stream, None)):
        training.timed(pace, warm, micro)
    works = {
        "synthetic": lambda: training.timed(frozen, steps),
        "unweighted": lambda: training.timed(frozen, steps, training.plain),
        "end to end": lambda: training.timed(stream, steps),
    }
    found = in_turn(works, repeats)
    batches.close()
    synthetic, unweighted, whole = ([spent for spent, _ in each] for each in found.values())
    waiting = [waited / spent for spent, waited in found["end to end"]]

    def rate(seconds: list[float]) -> float:
        return statistics.median(steps * batch / spent for spent in seconds)

    def quotient(above: list[float], below: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)

    peak = peak_flops(device_name(device))
    row = {
        "bench": "step",
        "recipe": name,
        "device": device_name(device) or device.type,
        "batch": batch,
        "n": repeats,
        "images_per_s": round(rate(whole), 1),
        "images_per_s_synthetic": round(rate(synthetic), 1),
        "end_to_end_over_synthetic": quotient(synthetic, whole),  # of images per second
        "weighted_over_unweighted": quotient(synthetic, unweighted),  # of the time of a step
        "waiting": round(statistics.median(waiting), 4),
        "mfu": round(rate(whole) * training.flops / peak, 3) if peak else None,
    }
    line = "  ".join(f"{key} {value}" for key, value in row.items())
    print(line, file=sys.stderr, flush=True)
    return row


def measure_all(where: str) -> list[dict[str, Any]]:
    """A row per recipe that was typed behind the source."""
    device = find_device("auto")
    cuda = device.type == "cuda"
    names = sys.argv[2:] or ["vit_base" if cuda else "small"]
    with temporary_set(where) as records:
        return [measure(records, name, device, 256 if cuda else 64) for name in names]


if __name__ == "__main__":
    keep("step", measure_all)
