"""SIGTERM and Ctrl-C as a wish to stop between steps, which all processes agree on.

In: signals. Out: whether to stop now.
"""

import signal
from types import FrameType

import torch
import torch.distributed as dist


class Stopped(Exception):
    """A signal (its number is the argument) arrived; the run was saved and can be resumed."""


class Stop:
    """Listens from its making on; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.wished = 0  # the signal's number
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._wish)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.wished = number
        signal.signal(number, signal.SIG_DFL)

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
