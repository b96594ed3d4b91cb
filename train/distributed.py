"""Several processes, on one machine or many: who am I, and do all of us find the same.

In: what torchrun says in the environment. Out: places, and answers that hold on every process: a
UserError on one is raised on all, so that none waits for one that has gone.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shards.errors import UserError

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Place:
    """This process among all of them, and among those of its machine."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    group: Any = None  # of all, for what is settled before the first step


def find_place() -> Place:
    """As torchrun set it; alone without it."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Place(*(int(os.environ.get(name, default)) for name, default in names.items()))


def connect(place: Place, device: torch.device) -> Place:
    """Meet the other processes, if there are any; `place` with their group."""
    if place.ranks == 1:
        return place
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # Machines may take hours apart to hash their shards: longer than a step may hang.
    return replace(place, group=dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def together(place: Place, ask: Callable[[], Answer]) -> Answer:
    """`ask()`, here. Raises UserError on every process if it does on any: the first one's."""
    answer, problem = None, ""
    try:
        answer = ask()
    except UserError as error:
        problem = str(error)
    problem = next(filter(None, gathered(place, problem)), "")
    if problem:
        raise UserError(problem)
    return answer  # type: ignore[return-value]


def gathered(place: Place, fact: Answer) -> list[Answer]:
    """Every process's `fact`, by rank."""
    facts = [fact] * place.ranks
    if place.ranks > 1:
        dist.all_gather_object(facts, fact, place.group)
    return facts


def agree(place: Place, out: Path, first: int, fingerprint: str) -> None:
    """UserError unless all go on after step `first` with the shards of `fingerprint`."""
    host, step, shards = socket.gethostname(), first, fingerprint
    for other, its_step, its_shards in gathered(place, (host, step, shards)):
        if its_shards != shards:
            raise UserError(f"the shards on {other} are not those on {host}; copy them again")
        if its_step != step:
            raise UserError(
                f"{host} goes on after step {step}, {other} after step {its_step}: {out} must be "
                "one folder that all machines see"
            )
