"""SIGTERM and Ctrl-C as a wish to stop, which all processes agree on.

In: signals. Out: whether to stop now. One process alone stops between micro-steps, several between
steps.
"""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

from train.progress import say

Thing = TypeVar("Thing")


class Stopped(Exception):
    """A signal (its number is the argument) arrived; what is finished is saved."""


class Stop:
    """A wish to stop. Until `listen` is called, and from the second signal on, a signal ends the
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
        """`things`, one by one; one process alone ends in place of the next when it should."""
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
                else "stopped before a step was done; the same command begins anew"
            )
        raise Stopped(self.wished)

    def agreed(self, step: int, every: int, ranks: int, device: torch.device) -> bool:
        """Whether to stop after `step`. With several processes it costs a sync, every so often."""
        if ranks == 1:
            return bool(self.wished)
        if (step + 1) % every:
            return False
        wish = torch.tensor(self.wished, device=device)
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        self.wished = int(wish.item())
        return bool(self.wished)
