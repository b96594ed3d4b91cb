"""What a run reads, in order: the batches of its steps, and between steps each record once.

A loader reads one plan. A run that draws other samples anew has one loader after another.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from shards import Batch, to_device
from train.distributed import Process, Stop
from train.progress import Doing
from train.setup import Data


class Stream:
    """The batches of a run of `micro_steps` a step, for this process.

    stop: a wish to end, which a pass over the records heeds.
    """

    def __init__(
        self, data: Data, micro_steps: int, process: Process, device: torch.device, stop: Stop
    ) -> None:
        self.data, self.micro_steps, self.device, self.stop = data, micro_steps, device, stop
        self.ranks = {"rank": process.rank, "ranks": process.ranks}
        self._damaged: list[set[int]] = []

    @property
    def damaged(self) -> int:
        """How many records were damaged, and skipped, so far."""
        return len(set().union(*self._damaged))

    def batches(self, first: int, last: int) -> Generator[tuple[Batch, dict[str, Any]], None, None]:
        """Each micro-step's batch, and its tensors on the device, from step `first` to `last`.

        What cannot be loaded is said here, unless the samples of `first` are yet to be drawn.
        """
        selection = self.data.selection
        return self._each(first, last, None if selection.due(first) else self._load(first, last))

    def _each(
        self, step: int, last: int, loader: Any
    ) -> Generator[tuple[Batch, dict[str, Any]], None, None]:
        while step < last:
            if loader is None:
                loader = self._load(step, last)
            self._damaged.append(loader.damaged)
            yield from to_device(loader, self.device)
            loader, step = None, self.data.selection.end(step)

    def _load(self, step: int, last: int) -> Any:
        """The loader from `step` on, to the next draw of samples or the end."""
        selection = self.data.selection
        plan = replace(selection.plan(step), micro_steps=self.micro_steps)
        end = min(last, selection.end(step))
        return self.data.load(plan, step, end, maps=self.data.maps, **self.ranks)

    def every_record(self, step: int, looking: Doing, maps: Sequence[str] = ()) -> Iterator[Batch]:
        """Each record once, for a look at it before `step`; crops are not used."""
        whole, ranks = self.data.plan, self.ranks["ranks"]
        order = whole.mixture.by_size() if whole.mixture else None
        part = whole.batch // self.micro_steps
        once = replace(whole, batch=part, micro_steps=1, mixture=order)
        steps = -(-len(self.data.records) // part)
        loader = self.data.load(once, 0, steps, maps=maps, **self.ranks)
        for batch in self.stop.heeded(loader, step, ranks):
            yield batch
            looking.update(part)
