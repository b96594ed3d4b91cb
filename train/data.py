"""Where a run's samples come from: its set, here or remote, the order they come in, the loader.

In: a Run. Out: a ShardSet, a Plan, a loader of the set's container, or one clear ValueError.
"""

from typing import Any

import joblib
import torch

from shards import ShardSet
from shards.ffcv_loader import FfcvLoader
from shards.loader import Loader
from shards.order import Plan
from shards.remote.storage import is_url
from shards.remote.streaming import open_remote
from shards.weighting import pinned
from shards.windows import Windows
from train.distributed import find_place
from train.setup import Run

WINDOW = 64  # shards: 64,000 samples, or all of a set whose source has no more


def open_records(run: Run) -> ShardSet:
    """The set to train on, from its folder or through the cache; ValueError if it cannot be."""
    if not is_url(run.shards):
        if run.cache:
            raise ValueError(f"--cache is for shards at a URL; {run.shards} is read where it is")
        return ShardSet(run.shards)
    if run.cache is None:
        raise ValueError(f"{run.shards} needs --cache FOLDER, for copies on a fast local disk")
    url, limit = str(run.shards), run.cache_limit
    return open_remote(url, run.cache, limit, patience=run.patience, checksum=run.checksum)


def make_plan(run: Run, records: ShardSet, micro_steps: int) -> Plan:
    """The plan of the run; ValueError if the cache cannot hold its windows."""
    recipe, shards = run.recipe, len(records.shards)
    window = run.window or (WINDOW if records.copies else shards)
    windows = None
    if window < shards:
        windows = Windows([shard.count for shard in records.shards], window, run.seed)
    if records.copies:
        records.copies.check(min(window, shards))
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
    records: ShardSet,
    plan: Plan,
    steps: tuple[int, int],
    place: tuple[int, int],
    maps: list[str],
    device: torch.device,
) -> Loader | FfcvLoader:
    """The loader of the set's container, of `steps` (first, end), `place` (rank, ranks), `maps`."""
    workers = run.workers or max(1, joblib.cpu_count() // find_place().local_ranks)
    common: dict[str, Any] = {"rank": place[0], "ranks": place[1], "workers": workers}
    common |= {"detectors": maps, "bank": run.bank}
    if records.manifest.container == "ffcv":
        return FfcvLoader(records, plan, *steps, **common)
    allocate = pinned if device.type == "cuda" else None
    return Loader(records, plan, *steps, skip=run.skip_damaged, allocate=allocate, **common)
