"""Several processes, on one machine or many: who am I, do all find the same, do all stop now.

If one process raises a UserError, all do, so that none waits for one that has gone.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import UserError
from train.progress import say

Answer = TypeVar("Answer")
Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Process:
    """This process among all of them, and among those of its machine."""

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    local_ranks: int = 1
    group: Any = None  # of all, for what is settled before the first step


def this_process() -> Process:
    """As torchrun set it; the only one without it."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    return Process(*(int(os.environ.get(name, default)) for name, default in names.items()))


def connect(process: Process, device: torch.device) -> Process:
    """Meet the other processes, if there are any; `process` with their group."""
    if process.ranks == 1:
        return process
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # Machines may take hours apart to hash their shards: longer than a step may hang.
    return replace(process, group=dist.new_group(backend="gloo", timeout=timedelta(days=1)))


def together(process: Process, ask: Callable[[], Answer]) -> Answer:
    """`ask()`, here. If it raises UserError on any process, all raise that of the first."""
    answer, problem = None, ""
    try:
        answer = ask()
    except UserError as error:
        problem = str(error)
    problem = next(filter(None, gathered(process, problem)), "")
    if problem:
        raise UserError(problem)
    return answer  # type: ignore[return-value]


def gathered(process: Process, fact: Answer) -> list[Answer]:
    """Every process's `fact`, by rank."""
    facts = [fact] * process.ranks
    if process.ranks > 1:
        dist.all_gather_object(facts, fact, process.group)
    return facts


def rows_of_all(part: Tensor, ranks: int) -> Tensor:
    """`part`, of one shape everywhere, of every process, one after the other."""
    if ranks == 1:
        return part
    whole = part.new_empty(ranks * len(part), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part)
    return whole


def agree(process: Process, out: Path, first: int, fingerprint: str | list[str]) -> None:
    """UserError unless all go on after step `first` with the shards of `fingerprint`."""
    host, step, shards = socket.gethostname(), first, fingerprint
    for other, its_step, its_shards in gathered(process, (host, step, shards)):
        if its_shards != shards:
            raise UserError(f"the shards on {other} are not those on {host}; copy them again")
        if its_step != step:
            raise UserError(
                f"{host} goes on after step {step}, {other} after step {its_step}: {out} must be "
                "one folder that all machines see"
            )


class Stopped(Exception):
    """A signal (its number is the argument) arrived; what is finished is saved."""


class Stop:
    """A wish to stop. Before `listen` is called, and from the second signal on, a signal ends the
    process at once, as it would without this.
    """

    def __init__(self) -> None:
        self.wished = 0  # the signal's number

    def listen(self) -> None:
        """From now on a signal is a wish."""
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._wish)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.wished = number
        for each in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(each) == self._wish:
                signal.signal(each, signal.SIG_DFL)

    def heeded(self, things: Iterable[Thing], done: int, ranks: int) -> Iterator[Thing]:
        """`things`, one by one. If there is one process, it ends here when it should, before the
        next thing.
        """
        for thing in things:
            if ranks == 1 and self.wished:
                self.end(done, 0)
            yield thing

    def end(self, done: int, rank: int) -> NoReturn:
        """Raise Stopped, after `done` steps of the run, which are saved."""
        if rank == 0:
            say(
                f"stopped after step {done}, which is saved; go on with --resume"
                if done
                else "stopped before a step was done; the same command begins again"
            )
        raise Stopped(self.wished)

    def agreed(
        self, late: bool, step: int, every: int, ranks: int, device: torch.device
    ) -> tuple[bool, bool]:
        """Whether to stop after `step`, and whether a checkpoint is `late` for any process. With
        several processes it costs a sync, every so often.
        """
        if ranks == 1:
            return bool(self.wished), late
        if (step + 1) % every:
            return False, False
        wishes = torch.tensor([self.wished, int(late)], device=device)
        dist.all_reduce(wishes, dist.ReduceOp.MAX)
        self.wished, any_late = wishes.tolist()
        return bool(self.wished), bool(any_late)
