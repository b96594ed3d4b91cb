"""The loader of an FFCV set: the same interface and the same batches as shards.loader, by FFCV.

plan -> order -> [FFCV's compiled threads: copy or decode from the memory map] -> batch
No crop on the CPU and no order of FFCV's own; a pipeline thread that dies is noticed, not awaited.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from queue import Empty
from typing import Any

import joblib
import numpy as np

from shards.beton import BETON, field_of
from shards.crops import unit_boxes
from shards.dataset import ShardSet
from shards.errors import UserError, install
from shards.loader import Batch, Part, check_plan, planned
from shards.order import Plan
from shards.record import COUNTS, DENSITY, fields_of


def _ffcv() -> Any:
    """FFCV, kept from setting torch's number of threads.

    It sets that to 1 when it is imported, to its own number when a loader begins, and again from
    its thread, in the middle of a step. The number decides how the sums of a step are shared out,
    and so their last bits.
    """
    import torch

    threads = torch.get_num_threads()
    import ffcv
    import numba
    from ffcv.pipeline.compiler import Compiler

    def of_numba_alone(cls: Any, count: int) -> None:
        cls.num_threads = count
        numba.set_num_threads(count)

    Compiler.set_num_threads = classmethod(of_numba_alone)
    torch.set_num_threads(threads)
    return ffcv


class FfcvLoader:
    """As shards.loader.Loader, for a set whose container is FFCV.

    A batch's arrays stay as they are until the next batch is asked for. FFCV decodes without
    telling damage: the checksum before training does. Raises UserError if FFCV is not installed.
    """

    def __init__(
        self,
        records: ShardSet,
        plan: Plan,
        first: int,
        last: int,
        *,
        maps: Sequence[str] = (),
        bank: bool = False,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        prefetch: int = 3,
    ) -> None:
        try:
            ffcv = _ffcv()
            from ffcv.fields.basics import IntDecoder
            from ffcv.fields.ndarray import NDArrayDecoder
            from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        except ImportError as error:
            raise UserError(
                f"{records.folder} is an FFCV set and FFCV is not usable ({error}); "
                f"{install('ffcv')}"
            ) from None
        check_plan(records, plan, first, last)
        records.find_maps(maps, bank)
        self.names, self.bank = list(maps), bank
        self.records, self.plan, self.damaged = records, plan, set[int]()
        self.first, self.last, self.rank, self.ranks = first, last, rank, ranks
        self.size = len(plan.samples(first, 0, rank, ranks)[0])
        kind = COUNTS if bank else DENSITY
        wanted = {f"{name}.{kind}" for name in maps}
        wanted |= {"bank.boxes", "bank.flips"} if bank else set()
        arrays = fields_of(records.manifest.settings)
        self.arrays = [array for array in arrays if array.name in wanted]
        pipelines = {
            field_of(array): [NDArrayDecoder()] if array.name in wanted else None
            for array in arrays
        }
        self.loader = ffcv.loader.Loader(
            str(records.folder / BETON),
            batch_size=self.size,
            num_workers=workers or joblib.cpu_count(),
            batches_ahead=prefetch,
            pipelines={
                "frame": [SimpleRGBImageDecoder()],
                **pipelines,
                "label": None,
                "index": [IntDecoder()],
                "height": None,
                "width": None,
            },
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one endless FFCV epoch: its buffers are allocated, and touched, once."""
        parts: deque[Part] = deque()
        running = self._start(parts)
        steps = self.last - self.first
        try:
            for _ in range(steps * self.plan.micro_steps):
                frames, *arrays, numbers = self._next(running)
                part = parts.popleft()
                assert np.array_equal(numbers.ravel(), part[2])
                yield self._batch(part, frames, arrays)
        finally:
            running.close()
            running.join(timeout=10)

    def _batch(self, part: Part, frames: Any, arrays: list[Any]) -> Batch:
        """FFCV's outputs as a Batch; with the bank, the plan's slot of each sample."""
        found = {array.name: values for array, values in zip(self.arrays, arrays, strict=True)}
        if not self.bank:
            maps = {name: found[f"{name}.{DENSITY}"] for name in self.names}
            return planned(self.records, self.plan, part, frames, maps, {})[0]
        batch, rows = planned(self.records, self.plan, part, frames, {}, {})
        _, epochs, samples = part
        slots = self.plan.slots(epochs, samples, found["bank.boxes"].shape[1])
        chosen = {name: values[np.arange(len(samples)), slots] for name, values in found.items()}
        size = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        boxes = unit_boxes(chosen["bank.boxes"].astype(np.int64), *size)
        counts = {name: chosen[f"{name}.{COUNTS}"] for name in self.names}
        return batch._replace(boxes=boxes, flips=chosen["bank.flips"].astype(bool), counts=counts)

    def _start(self, taken: deque[Part]) -> Any:
        """FFCV's thread, running on the plan's order; what it has taken is noted in `taken`."""
        from ffcv.loader.epoch_iterator import EpochIterator

        class Stream(EpochIterator):  # type: ignore[misc]
            """An FFCV epoch that is told its batches one by one, not all of them beforehand."""

            def start(self) -> None:
                """Does nothing yet: __init__ would start the thread before its order is there."""

        def order() -> Iterator[Any]:
            for part in self.plan.parts(self.first, self.last, self.rank, self.ranks):
                taken.append(part)
                yield part[2].astype(np.uint64)

        running = Stream(self.loader, np.empty(0, np.uint64))
        running.iter_ixes = order()
        threading.Thread.start(running)
        return running

    @staticmethod
    def _next(running: Any) -> Any:
        """The next outputs; FFCV's own `next` waits for ever when its thread has died."""
        while True:
            try:
                item = running.output_queue.get(timeout=0.5)
            except Empty:
                if running.is_alive():
                    continue
                raise UserError(
                    "FFCV's reading thread died; verify the set by `kamim shards verify`"
                ) from None
            if item is None:
                raise UserError("FFCV ended its epoch early; verify the set")
            if hasattr(running, "cuda_streams") and running.cuda_streams[item[0]] is not None:
                running.current_stream.wait_stream(running.cuda_streams[item[0]])
            return item[1]
