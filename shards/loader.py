"""The loader: a set of shards and a plan in, a stream of constant-shape uint8 batches out.

plan -> locate -> [threads: read at offset, decode straight into the batch's buffer] -> batch
Threads, because reading and decoding release the interpreter lock: no copies between processes,
nothing in shared memory to go stale. All randomness is the plan's; workers have none.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from struct import Struct
from typing import Any

import joblib
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.bank import BANK_CELL, row_bytes
from shards.batch import Batch, planned, wanted_rows
from shards.dataset import Held, ShardSet
from shards.order import InOrder, Plan
from shards.record import key_of, npy_header
from shards.remote.prefetch import Ahead, windows_of

CHUNK = 16  # samples a task: fine enough to share out a batch, coarse enough to cost nothing
OPEN_FILES = 256
FEW = 8  # of a remote set read in order: an open shard cannot be evicted
SLOT = Struct("<4I2B")  # shards.bank.CROP, for reading one: NumPy would take longer
# The index fields that a read needs.
PLACES = ("start", "frame", "frame_bytes", "maps", "maps_bytes", "bank_bytes", "height", "width")


class Loader:
    """Iterates over the batches of steps `first` to `last` - 1 of `plan`, for one process.

    A batch's arrays stay as they are until the next batch is asked for. `detectors` names the
    maps wanted, in order; none reads no maps. With `bank`, crops are those stored, their slots
    the plan's, and counts come in place of maps. `allocate(shape)` gives a uint8 buffer (pinned,
    say). Memory: prefetch + 1 batches. With `skip`, a record that does not decode is replaced by
    the next sample and noted in `damaged`; otherwise it raises ValueError, naming shard and key.
    """

    def __init__(
        self,
        records: ShardSet,
        plan: Plan | InOrder,
        first: int,
        last: int,
        *,
        rank: int = 0,
        ranks: int = 1,
        detectors: list[str] | None = None,
        bank: bool = False,
        workers: int = 0,
        prefetch: int = 3,
        skip: bool = False,
        allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] | None = None,
    ) -> None:
        if records.manifest.container != "webdataset":
            raise ValueError(f"{records.folder} is an FFCV set; load it by shards.ffcv_loader")
        self.rows = wanted_rows(records, plan, detectors, bank)
        self.slots = records.manifest.settings.bank if bank else 0
        self.records, self.plan, self.skip = records, plan, skip
        self.damaged: set[int] = set()
        self.ahead: Callable[[], Ahead | None] = lambda: None
        if records.copies and isinstance(plan, Plan):
            windows = windows_of(records, plan)
            self.ahead = lambda: Ahead(records, windows, plan.batch, first, last)
        self.open: Callable[[int], Held] = lru_cache(FEW if records.copies else OPEN_FILES)(
            records.hold
        )
        self.first, self.last, self.rank, self.ranks = first, last, rank, ranks
        self.workers, self.prefetch = workers or joblib.cpu_count(), prefetch
        settings = records.manifest.settings
        size = len(plan.samples(first, 0, rank, ranks)[0])
        frames = (size, settings.frame, settings.frame, 3)
        cells = settings.crop // BANK_CELL
        self.bank_cells, self.bank_row = cells, row_bytes(len(settings.detectors), cells)
        self.bank_header = npy_header((settings.bank, self.bank_row)) if bank else b""
        maps = (size, 0 if bank else len(self.rows), settings.grid, settings.grid // 2)
        counts = (size, len(self.rows) if bank else 0, cells, cells)
        allocate = allocate or (lambda shape: np.empty(shape, np.uint8))
        shapes = (frames, maps, counts)
        self.buffers = [tuple(allocate(shape) for shape in shapes) for _ in range(prefetch + 1)]
        self.raw = settings.quality == 0
        halves = settings.grid // 2
        self.map_header = npy_header((len(settings.detectors), settings.grid, halves))
        self.cells = settings.grid * halves if self.rows and not bank else 0
        self.depth = max(self.rows, default=0) + 1  # maps to read: up to the last one wanted
        self.frame_header = npy_header(frames[1:])

    def __iter__(self) -> Iterator[Batch]:
        parts = self.plan.parts(self.first, self.last, self.rank, self.ranks)
        free = deque(self.buffers)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        waiting: deque[tuple[Batch, list[Future[None]], Any]] = deque()
        ahead = self.ahead()
        if ahead:
            self.open = ahead.open
        try:
            for part in islice(parts, self.prefetch):
                waiting.append(self._start(pool, free.popleft(), part, ahead))
            while waiting:
                batch, tasks, buffer = waiting.popleft()
                if ahead:
                    ahead.wait_for(batch.step)
                for part in islice(parts, 1):
                    waiting.append(self._start(pool, free.popleft(), part, ahead))
                for task in tasks:
                    task.result()
                yield batch
                free.append(buffer)
        finally:
            if ahead:
                ahead.close()
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(
        self,
        pool: ThreadPoolExecutor,
        buffer: tuple[Any, ...],
        part: tuple[int, Any, Any],
        ahead: Ahead | None,
    ) -> tuple[Batch, list[Future[None]], Any]:
        """Plan a batch and hand its samples to the threads, in chunks."""
        frames, maps, counts = buffer
        if ahead:
            ahead.begin(part[0])
        batch, _ = planned(self.records, self.plan, part, (frames, maps, counts))
        chunks = range(0, len(batch.samples), CHUNK)
        return batch, [pool.submit(self._fill, batch, at) for at in chunks], buffer

    def _fill(self, batch: Batch, begin: int) -> None:
        """Read and decode up to CHUNK samples into their places of the batch."""
        samples = batch.samples[begin : begin + CHUNK]
        rows = self.records.index[samples]
        shards = np.searchsorted(self.records.ends, samples, side="right").tolist()
        fields = [rows[name].tolist() for name in PLACES]
        slots = batch.epochs[begin : begin + CHUNK], samples, max(1, self.slots)
        fields.append(self.plan.slots(*slots).tolist())
        for place, (shard, *where) in enumerate(zip(shards, *fields, strict=True), start=begin):
            problem = self._read(shard, where, batch, place)
            if problem:
                self._replace(batch, place, problem)

    def _replace(self, batch: Batch, place: int, problem: str) -> None:
        """Raise for the damaged record at `place`, or put the next sound one there."""
        number = first = int(batch.samples[place])
        while problem:
            path, row = self.records.locate(number)
            if not self.skip or (number + 1) % len(self.records) == first:
                raise ValueError(
                    f"{path}: record {key_of(int(row['key']))} {problem}; find all damage with "
                    "`kamim shards verify --level decode`, or train on with --on-error skip"
                )
            self.damaged.add(number)
            number = (number + 1) % len(self.records)
            _, row = self.records.locate(number)
            shard = int(np.searchsorted(self.records.ends, number, side="right"))
            slot = self.plan.slots(batch.epochs[[place]], np.array([number]), max(1, self.slots))
            where = [*(int(row[name]) for name in PLACES), int(slot[0])]
            problem = self._read(shard, where, batch, place)
            # The plan's box stays: it is a crop of the unit square, of any sample.
            batch.samples[place], batch.labels[place] = number, row["label"]

    def _read(self, shard: int, where: Sequence[int], batch: Batch, place: int) -> str:
        """Put the record at `where` (PLACES, slot) into its place. Returns what is wrong."""
        start, frame, frame_bytes, maps, maps_bytes, bank_bytes, height, width, slot = where
        cells, end = self.cells, frame + frame_bytes
        if cells:
            end = maps + len(self.map_header) + cells * self.depth
        elif self.slots:
            end = maps + maps_bytes + bank_bytes
        file = self.open(shard)  # held here: the cache may let go of it under our read
        data = os.pread(file.descriptor, end - start, start)
        if len(data) != end - start:
            return f"is cut short: {len(data)} of {end - start} bytes"
        if cells:
            begin = maps - start
            if not data.startswith(self.map_header, begin):
                return "has maps that are not as the manifest says"
            begin += len(self.map_header)
            for column, row in enumerate(self.rows):
                density = np.frombuffer(data, np.uint8, cells, begin + row * cells)
                batch.maps[place, column].reshape(-1)[:] = density
        elif self.slots:
            at = maps - start + maps_bytes
            if not data.startswith(self.bank_header, at):
                return "has a bank that is not as the manifest says"
            at += len(self.bank_header) + slot * self.bank_row
            top, left, tall, wide, *flips = SLOT.unpack_from(data, at)
            batch.boxes[place] = top / height, left / width, tall / height, wide / width
            batch.flips[place] = flips
            cells = self.bank_cells**2
            for column, row in enumerate(self.rows):
                counts = np.frombuffer(data, np.uint8, cells, at + SLOT.size + row * cells)
                batch.counts[place, column].reshape(-1)[:] = counts
        begin = frame - start
        return self._decode(memoryview(data)[begin : begin + frame_bytes], batch.frames[place])

    def _decode(self, picture: memoryview, out: NDArray[np.uint8]) -> str:
        if self.raw:
            header = len(self.frame_header)
            if len(picture) != header + out.size or picture[:header] != self.frame_header:
                return "has a raw frame of another shape"
            out.reshape(-1)[:] = np.frombuffer(picture, np.uint8, offset=header)
            return ""
        try:
            # Measured: 1.2 times OpenCV, which cannot decode into a given buffer.
            pixels = simplejpeg.decode_jpeg(picture, "RGB", buffer=out)
        except ValueError as error:
            return f"has a frame that does not decode ({error})"
        return "" if pixels.shape == out.shape else f"has a frame of {pixels.shape}"
