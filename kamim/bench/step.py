"""A training step from shards against the same step on a batch that never changes.

Images a second end to end and synthetic, their ratio, what weights cost, the share of time spent
waiting, and model FLOP utilisation. Run by `make bench-step`; made for a CUDA device, where it
compiles and uses bf16.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from kamim.bench.measuring import in_turn, keep, temporary_set
from shards import Plan, ShardSet, to_device
from train.cuda import peak_flops
from train.masking import block_masks
from train.models import CELL, Cells, make_model, model_flops
from train.recipes import Recipe, find_recipe
from train.setup import clipped, device_name, find_device, weighted_crops
from train.step import Pace, Step, compiled

WARM, STEPS, REPEATS = 8, 40, 5
Run = Callable[[Pace, int, bool], tuple[float, float]]


def training(recipe: Recipe, records: ShardSet, device: torch.device) -> Run:
    """`run(pace, steps, weighted)` trains on the next `steps` batches of a loader, as to_device
    gives them.

    It returns the seconds that took, and those of them in which the device waited for batches.
    Weights are by the first detector of the set; every benchmark of a weighted step is this one.
    """
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    model: Any = make_model(recipe).to(device)
    plain, weighing = (
        Step(model, weighted_crops(recipe, records, detector).to(device))
        for detector in (None, records.manifest.detectors[0])
    )
    works: dict[bool, Any] = {False: plain, True: weighing}
    if cuda:
        works = {weighted: compiled(step) for weighted, step in works.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    cells = recipe.size // CELL

    def run(pace: Pace, steps: int, weighted: bool) -> tuple[float, float]:
        pace.take()
        begin = time.perf_counter()
        for step in range(steps):
            _, tensors = pace.next()
            mask = block_masks(0, step, recipe.batch, cells, recipe.mask_ratio, device)
            loss, _ = works[weighted](tensors, Cells(mask))
            loss.backward()
            clipped(model, recipe)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin, pace.take()

    return run


def always(batch: Any, device: torch.device) -> Pace:
    """The same batch, over and over."""
    batches: Iterator[Any] = iter(lambda: batch, None)
    return Pace(batches, device)


def measure(
    records: ShardSet,
    name: str,
    device: torch.device,
    batch: int,
    steps: int = STEPS,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """One row for recipe `name` with `batch` samples a step: `repeats` in turn of `steps`."""
    recipe = replace(find_recipe(name), batch=batch)
    run = training(recipe, records, device)
    warm = min(WARM, steps)
    maps, last = records.manifest.detectors[:1], warm + repeats * steps
    loader = records.loader(Plan(len(records), batch), 0, last, maps=maps, device=device.type)
    batches = to_device(loader, device)
    frozen = always(deepcopy(next(batches)), device)
    stream = Pace(batches, device)
    run(frozen, warm, True)
    run(frozen, warm, False)
    run(stream, warm - 1, True)
    works = {
        "synthetic": lambda: run(frozen, steps, True),
        "unweighted": lambda: run(frozen, steps, False),
        "end to end": lambda: run(stream, steps, True),
    }
    found = in_turn(works, repeats)
    synthetic, unweighted, whole = ([spent for spent, _ in each] for each in found.values())
    waiting = [waited / spent for spent, waited in found["end to end"]]

    def rate(seconds: list[float]) -> float:
        return statistics.median(steps * batch / spent for spent in seconds)

    def quotient(above: list[float], below: list[float]) -> float:
        return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)

    peak = peak_flops(device_name(device))
    flops = model_flops(make_model(recipe), recipe.size)
    row = {
        "bench": "step",
        "recipe": name,
        "device": device_name(device) or device.type,
        "batch": batch,
        "n": repeats,
        "images_per_s": round(rate(whole), 1),
        "images_per_s_synthetic": round(rate(synthetic), 1),
        "end_to_end_over_synthetic": quotient(synthetic, whole),  # of images a second
        "weighted_over_unweighted": quotient(synthetic, unweighted),  # of the time of a step
        "waiting": round(statistics.median(waiting), 4),
        "mfu": round(rate(whole) * flops / peak, 3) if peak else None,
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
