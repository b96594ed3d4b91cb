"""A training step from shards against the same step on a batch that never changes.

In: a source of photographs, recipe names. Out: a table and results/step.jsonl: images a second end
to end and synthetic, their ratio, the share of time spent waiting and model FLOP utilisation.
Run by `make bench-step`; made for a CUDA device, where it compiles and uses bf16.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kamim.bench.provenance import append
from preprocess import build_shards, detector_settings, open_source
from preprocess.building import shard_size_for
from shards import Settings, ShardSet
from shards.order import Plan
from shards.weighting import to_device
from train.cuda import peak_flops
from train.masking import block_masks
from train.models import CELL, Cells, make_model, model_flops
from train.recipes import find_recipe
from train.setup import device_name, find_device, weighted_crops
from train.step import Pace, Step, compiled

WARM, STEPS, REPEATS = 8, 40, 5


def measure(
    records: ShardSet,
    name: str,
    device: torch.device,
    batch: int,
    steps: int = STEPS,
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """One row for recipe `name` with `batch` samples a step: interleaved `repeats` of `steps`."""
    recipe = replace(find_recipe(name), batch=batch)
    cuda = device.type == "cuda"
    detector = records.manifest.detectors[0]
    weighing, plain = (weighted_crops(recipe, records, d).to(device) for d in (detector, None))
    torch.manual_seed(0)
    model: Any = make_model(recipe).to(device)
    weighted, unweighted = (
        compiled(each) if cuda else each for each in (Step(model, weighing), Step(model, plain))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)

    def run(pace: Pace, steps: int, micro: Any = weighted) -> tuple[float, float]:
        """Images a second and the share of time in which the device waited for batches."""
        pace.take()
        begin = time.perf_counter()
        for step in range(steps):
            _, tensors = pace.next()
            mask = block_masks(0, step, batch, recipe.size // CELL, recipe.mask_ratio, device)
            loss, _ = micro(tensors, Cells(mask))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - begin
        return steps * batch / spent, pace.take() / spent

    plan = Plan(len(records), batch)
    warm = min(WARM, steps)
    steps_in_all = warm + repeats * steps
    loader = records.loader(plan, 0, steps_in_all, maps=[detector], device=device.type)
    batches = to_device(loader, device)
    still = deepcopy(next(batches))
    always: Iterator[Any] = iter(lambda: still, None)
    stream, frozen = Pace(batches, device), Pace(always, device)
    run(frozen, warm)
    run(frozen, warm, unweighted)
    run(stream, warm - 1)
    ends, synthetics, plains, waits = [], [], [], []
    for _ in range(repeats):
        synthetics.append(run(frozen, steps)[0])
        plains.append(run(frozen, steps, unweighted)[0])
        rate, wait = run(stream, steps)
        ends.append(rate)
        waits.append(wait)
    peak = peak_flops(device_name(device))
    rate, middle = statistics.median(ends), statistics.median
    row = {
        "bench": "step",
        "recipe": name,
        "device": device_name(device) or device.type,
        "batch": batch,
        "n": repeats,
        "images_per_s": round(rate, 1),
        "images_per_s_synthetic": round(middle(synthetics), 1),
        "end_to_end_over_synthetic": round(
            middle(a / b for a, b in zip(ends, synthetics, strict=True)), 3
        ),
        "weighted_over_unweighted": round(  # time of a step
            middle(b / a for a, b in zip(synthetics, plains, strict=True)), 3
        ),
        "waiting": round(middle(waits), 4),
        "mfu": round(rate * model_flops(model, recipe.size) / peak, 3) if peak else None,
    }
    line = "  ".join(f"{key} {value}" for key, value in row.items())
    print(line, file=sys.stderr, flush=True)
    return row


def main(where: str, names: list[str], batch: int) -> None:
    """Build shards of `where`, measure each recipe, append the rows."""
    device = find_device("auto")
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(where)
        detectors = (detector_settings("fast"),)
        size = shard_size_for(len(source.entries))
        settings = Settings(detectors=detectors, shard_size=size)
        build_shards(source, Path(folder) / "shards", settings)
        records = ShardSet(Path(folder) / "shards")
        rows = [measure(records, name, device, batch) for name in names]
    print(append("step", rows))


if __name__ == "__main__":
    chosen = sys.argv[2:] or (["vit_base"] if torch.cuda.is_available() else ["small"])
    main(sys.argv[1] if len(sys.argv) > 1 else "demo", chosen,
         256 if torch.cuda.is_available() else 64)  # fmt: skip
