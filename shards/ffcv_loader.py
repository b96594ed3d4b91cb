"""The loader of an FFCV set: the same interface and the same batches as shards.loader, by FFCV.

plan -> order -> [FFCV's compiled threads: copy or decode from the memory map] -> batch
No crop on the CPU and no order of FFCV's own; a pipeline thread that dies is noticed, not awaited.
"""

import threading
from collections import deque
from collections.abc import Iterator
from queue import Empty
from typing import Any

import joblib
import numpy as np

from shards.beton import BETON
from shards.loader import Batch, wanted_rows
from shards.plan import Plan
from shards.reader import ShardSet

HINT = "type: make ffcv, or see `kamim doctor`"


class FfcvLoader:
    """As shards.loader.Loader, for a set whose container is FFCV.

    A batch's arrays stay as they are until the next batch is asked for. FFCV decodes without
    telling damage: the checksum before training does. Raises ValueError if FFCV is not installed.
    """

    def __init__(
        self,
        records: ShardSet,
        plan: Plan,
        first: int,
        last: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        detectors: list[str] | None = None,
        workers: int = 0,
        prefetch: int = 3,
    ) -> None:
        try:
            import ffcv
            from ffcv.fields.basics import IntDecoder
            from ffcv.fields.ndarray import NDArrayDecoder
            from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        except ImportError as error:
            raise ValueError(
                f"{records.folder} is an FFCV set and FFCV is not usable ({error}); {HINT}"
            ) from None
        self.rows = wanted_rows(records, plan, detectors)
        self.records, self.plan, self.damaged = records, plan, set[int]()
        self.first, self.last, self.rank, self.ranks = first, last, rank, ranks
        self.size = len(plan.samples(first, 0, rank, ranks)[0])
        maps = [NDArrayDecoder()] if self.rows else None
        self.loader = ffcv.loader.Loader(
            str(records.folder / BETON),
            batch_size=self.size,
            num_workers=workers or joblib.cpu_count(),
            batches_ahead=prefetch,
            pipelines={
                "frame": [SimpleRGBImageDecoder()],
                "maps": maps,
                "label": [IntDecoder()],
                "index": [IntDecoder()],
            },
        )

    def __iter__(self) -> Iterator[Batch]:
        """Batches of one endless FFCV epoch: its buffers are allocated, and touched, once."""
        planned: deque[tuple[int, Any, Any]] = deque()
        running = self._start(planned)
        try:
            for _ in range((self.last - self.first) * self.plan.micro_steps):
                frames, *maps, labels, numbers = self._next(running)
                step, epochs, samples = planned.popleft()
                assert np.array_equal(numbers.ravel(), samples)
                chosen = maps[0] if maps else np.empty((self.size, 0, 0, 0), np.uint8)
                if self.rows != list(range(chosen.shape[1])):
                    chosen = chosen[:, self.rows]
                rows = self.records.index[samples]
                sizes = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
                boxes, flips = self.plan.boxes(epochs, samples, *sizes)
                label = labels.ravel()
                yield Batch(step, frames, chosen, label, samples, epochs, boxes, flips)
        finally:
            running.close()
            running.join(timeout=10)

    def _start(self, planned: deque[tuple[int, Any, Any]]) -> Any:
        """FFCV's thread, running on the plan's order; what it has taken is noted in `planned`."""
        from ffcv.loader.epoch_iterator import EpochIterator

        class Stream(EpochIterator):  # type: ignore[misc]
            """An FFCV epoch that is told its batches one by one, not all of them beforehand."""

            def start(self) -> None:
                """Not yet: __init__ would start the thread on an order that is not there."""

        def order() -> Iterator[Any]:
            for part in self.plan.parts(self.first, self.last, self.rank, self.ranks):
                planned.append(part)
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
                raise ValueError(
                    "FFCV's reading thread died; verify the set by `kamim shards verify`"
                ) from None
            if item is None:
                raise ValueError("FFCV ended its epoch early; verify the set")
            if hasattr(running, "cuda_streams") and running.cuda_streams[item[0]] is not None:
                running.current_stream.wait_stream(running.cuda_streams[item[0]])
            return item[1]
