"""Where a run's samples come from: its set, here or at a URL, their order, the loader."""

from collections.abc import Sequence

import joblib
import torch

import shards
from shards.ffcv_loader import FfcvLoader
from shards.loader import Loader, RecordLoader
from shards.order import Plan, Windows
from train.distributed import find_place
from train.setup import Run

WINDOW = 64  # shards: 64,000 samples, or all of a set whose source has no more


def open_records(run: Run) -> shards.ShardSet:
    """The set to train on, from its folder or through the cache. UserError if it cannot be."""
    return shards.open(
        run.shards, cache=run.cache, cache_limit=run.cache_limit, patience=run.patience,
        checksum=run.checksum,
    )  # fmt: skip


def make_plan(run: Run, records: shards.ShardSet, micro_steps: int) -> Plan:
    """The plan of the run; UserError if the cache cannot hold its windows."""
    recipe, count = run.recipe, len(records.shards)
    window = run.window or (WINDOW if records.copies else count)
    windows = None
    if window < count:
        windows = Windows([shard.count for shard in records.shards], window, run.seed)
    if records.copies:
        records.copies.check(min(window, count))
    return Plan(
        len(records),
        recipe.batch,
        run.seed,
        micro_steps,
        recipe.area,
        vertical=recipe.vertical,
        windows=windows,
    )


def open_loader(
    run: Run,
    records: shards.ShardSet,
    plan: Plan,
    steps: tuple[int, int],
    place: tuple[int, int],
    maps: Sequence[str],
    device: torch.device,
) -> Loader | RecordLoader | FfcvLoader:
    """The loader of `steps` (first, end) for `place` (rank, ranks), with the densities `maps`."""
    return records.loader(
        plan, *steps, maps=maps, bank=run.bank, rank=place[0], ranks=place[1],
        workers=run.workers or max(1, joblib.cpu_count() // find_place().local_ranks),
        skip=run.skip_damaged, device=device.type,
    )  # fmt: skip
