"""The loader of WebDataset shards: a stream of constant-shape uint8 batches, as the plan says.

plan -> locate -> [threads: read at offset, decode straight into the batch's buffer] -> batch
Threads, because reading and decoding release the interpreter lock: no copies between processes,
nothing in shared memory to go stale. All randomness is the plan's; workers have none.
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

import joblib
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.crops import Ints
from shards.dataset import Held, ShardSet
from shards.errors import UserError
from shards.order import Plan
from shards.record import COUNTS, DENSITY, decode_frame, key_of, npy_header
from shards.remote.prefetch import Prefetch, windows_of
from shards.tar import padded

CHUNK = 16  # samples a task: fine enough to share out a batch, coarse enough to cost nothing
OPEN_FILES = 256
READ_JSON = json.JSONDecoder().raw_decode  # measured: 2.5 us, loads 6.3; it stops before padding
FEW = 8  # of a remote set read in order: an open shard cannot be evicted
# The index fields that a read needs.
PLACES = ("start", "frame", "frame_bytes", "arrays", "height", "width")


class Batch(NamedTuple):
    """One process's part of a step, or of a micro-step, in arrays that the loader uses again.

    step; frames uint8 [b, F, F, 3] RGB; maps: by detector, uint8 [b, G, G];
    labels, samples, epochs int64 [b]; boxes float32 [b, 4] (top, left, height, width in the unit
    square); flips bool [b, 2] (horizontal, vertical). From the bank instead: boxes and flips are
    those stored, and counts, by detector, uint8 [b, c, c], are the crops' as flipped.
    """

    step: int
    frames: NDArray[np.uint8]
    maps: dict[str, NDArray[np.uint8]]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    epochs: NDArray[np.int64]
    boxes: NDArray[np.float32]
    flips: NDArray[np.bool_]
    counts: dict[str, NDArray[np.uint8]]


Part = tuple[int, Ints, Ints]  # step, epochs, samples
Maps = dict[str, NDArray[np.uint8]]


def planned(
    records: ShardSet, plan: Plan, part: Part, frames: NDArray[np.uint8], maps: Maps, counts: Maps
) -> tuple[Batch, NDArray[np.void]]:
    """The batch of `part` with the plan's boxes around `frames`, `maps` and `counts`, whose first
    rows are its samples; and its rows of the index.
    """
    step, epochs, samples = part
    rows, count = records.index[samples], len(samples)
    size = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    boxes, flips = plan.boxes(epochs, samples, *size)
    labels = rows["label"].astype(np.int64)
    maps, counts = ({name: a[:count] for name, a in each.items()} for each in (maps, counts))
    return Batch(step, frames[:count], maps, labels, samples, epochs, boxes, flips, counts), rows


class RecordLoader:
    """As Loader, of a set in any container, one record at a time, by threads.

    For looking at an FFCV set once without FFCV, whose own loader wants batches of one size.
    """

    def __init__(
        self, records: ShardSet, plan: Plan, first: int, last: int, maps: Sequence[str] = ()
    ) -> None:
        check_plan(records, plan)
        self.damaged: set[int] = set()
        self.records, self.plan, self.first, self.last = records, plan, first, last
        records.find_maps(maps)
        self.names = list(maps)

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(thread_name_prefix="reader") as pool:
            for part in self.plan.parts(self.first, self.last):
                found = list(pool.map(self.records.__getitem__, part[2].tolist()))
                frames = np.stack(list(pool.map(decode_frame, (r.frame for r in found))))
                maps = {
                    name: np.stack([record.maps[name] for record in found]) for name in self.names
                }
                yield planned(self.records, self.plan, part, frames, maps, {})[0]


def check_plan(records: ShardSet, plan: Plan) -> None:
    """Raise UserError unless the plan is for the set."""
    if plan.count != len(records):
        raise UserError(f"the plan is for {plan.count} samples, the set has {len(records)}")


class Loader:
    """Iterates over the batches of steps `first` to `last` - 1 of `plan`, for one process.

    A batch's arrays stay as they are until the next batch is asked for. `maps` names the detectors
    wanted. With `bank`, crops are those stored, their slots the plan's, and counts come in place of
    maps. `allocate(shape)` gives a uint8 buffer (pinned, say). Memory: prefetch + 1 batches. With
    `skip`, a record that does not decode is replaced by the next sample and noted in `damaged`;
    otherwise it raises UserError, naming shard and key.
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
        skip: bool = False,
        allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] | None = None,
    ) -> None:
        if records.manifest.container != "webdataset":
            raise UserError(f"{records.folder} is an FFCV set; load it by ShardSet.loader")
        check_plan(records, plan)
        self.records, self.plan, self.skip = records, plan, skip
        self.damaged: set[int] = set()
        self.ahead: Callable[[], Prefetch | None] = lambda: None
        if records.copies and not plan.in_order:
            windows = windows_of(records, plan)
            self.ahead = lambda: Prefetch(records, windows, plan.batch, first, last)
        self.open: Callable[[int], Held] = lru_cache(FEW if records.copies else OPEN_FILES)(
            records.hold
        )
        self.first, self.last, self.rank, self.ranks = first, last, rank, ranks
        self.workers, self.prefetch = workers or joblib.cpu_count(), prefetch
        settings = records.manifest.settings
        size = len(plan.samples(first, 0, rank, ranks)[0])
        side = settings.frame
        records.find_maps(maps, bank)
        kind = COUNTS if bank else DENSITY
        self.arrays = {name: records.places[f"{name}.{kind}"] for name in maps}
        self.slots = settings.bank if bank else 0
        allocate = allocate or (lambda shape: np.empty(shape, np.uint8))

        def buffers() -> tuple[NDArray[np.uint8], Maps, Maps]:
            shapes = {name: array.shape[-2:] for name, (array, _) in self.arrays.items()}
            densities = {name: allocate((size, *shape)) for name, shape in shapes.items()}
            pictures = allocate((size, side, side, 3))
            return (pictures, {}, densities) if bank else (pictures, densities, {})

        self.buffers = [buffers() for _ in range(prefetch + 1)]
        self.raw = settings.quality == 0
        self.frame_header = npy_header((side, side, 3))
        # Of a record all up to the end of the last array wanted is read, by one call.
        self.upto = max((at + array.bytes for array, at in self.arrays.values()), default=0)

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
        part: Part,
        ahead: Prefetch | None,
    ) -> tuple[Batch, list[Future[None]], Any]:
        """Plan a batch and hand its samples to the threads, in chunks."""
        if ahead:
            ahead.begin(part[0])
        batch, _ = planned(self.records, self.plan, part, *buffer)
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
                raise UserError(
                    f"{path}: record {key_of(int(row['key']))} {problem}; find all damage with "
                    "`kamim shards verify --level decode`, or train on with --on-error skip"
                )
            self.damaged.add(number)
            number = (number + 1) % len(self.records)
            _, row = self.records.locate(number)
            shard = self.records.shard_of(number)
            slot = self.plan.slots(batch.epochs[[place]], np.array([number]), max(1, self.slots))
            where = [*(int(row[name]) for name in PLACES), int(slot[0])]
            problem = self._read(shard, where, batch, place)
            # The plan's box stays: it is a crop of the unit square, of any sample.
            batch.samples[place], batch.labels[place] = number, row["label"]

    def _read(self, shard: int, where: Sequence[int], batch: Batch, place: int) -> str:
        """Put the record at `where` (PLACES, slot) into its place. Returns what is wrong."""
        start, frame, frame_bytes, arrays, height, width, slot = where
        end = arrays + self.upto if self.arrays or self.slots else frame + frame_bytes
        file = self.open(shard)  # held here: the cache may let go of it under our read
        data = os.pread(file.descriptor, end - start, start)
        if len(data) != end - start:
            return f"is cut short: {len(data)} of {end - start} bytes"
        for name, (array, at) in self.arrays.items():
            at += arrays - start
            if not data.startswith(array.header, at - len(array.header)):
                return f"has an array {array.name} that is not as the manifest says"
            out = (batch.counts if self.slots else batch.maps)[name][place].reshape(-1)
            out[:] = np.frombuffer(data, np.uint8, out.size, at + slot * out.size)
        if self.slots:
            at = padded(frame - start + frame_bytes) + BLOCKSIZE
            try:
                meta, _ = READ_JSON(str(data[at : arrays - start], "ascii"))
                top, left, tall, wide = meta["boxes"][slot]
                batch.boxes[place] = top / height, left / width, tall / height, wide / width
                batch.flips[place] = meta["flips"][slot]
            except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                return "has a bank that is not as the manifest says"
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
