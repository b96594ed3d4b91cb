"""SIGTERM and Ctrl-C as a wish to stop, which all processes agree on.

In: signals. Out: whether to stop now. One process alone cuts its step short; several stop between
steps.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist


class Stopped(BaseException):
    """A signal (its number is the argument) arrived; what is finished is saved.

    No Exception: it is raised in the middle of a forward pass, where libraries catch those.
    """


class Stop:
    """Listens from its making on; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.wished = 0  # the signal's number
        self.cut = False  # whether the last block of `cutting` was left in the middle
        self._raises = False
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._wish)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.wished = number
        for each in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(each) == self._wish:
                signal.signal(each, signal.SIG_DFL)
        if self._raises:
            self._raises = False
            raise Stopped(number)

    @contextmanager
    def cutting(self, alone: bool) -> Iterator[None]:
        """Leave the block as soon as a signal arrives, if this process is `alone`; see `cut`.

        Only for blocks that change nothing which is saved.
        """
        self.cut = False
        try:
            self._raises = alone
            if alone and self.wished:
                raise Stopped(self.wished)
            yield
            self._raises = False
        except Stopped:
            self.cut = True
        finally:
            self._raises = False

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
