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
from typing import Any, NamedTuple

import joblib
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.plan import Plan
from shards.reader import ShardSet
from shards.record import key_of, npy_bytes

CHUNK = 16  # samples a task: fine enough to share out a batch, coarse enough to cost nothing
OPEN_FILES = 256
PLACES = ("start", "frame", "frame_bytes", "maps")  # the index fields a read needs


class Batch(NamedTuple):
    """One process's part of a step, or of a micro-step, in arrays that the loader reuses.

    step; frames uint8 [b, F, F, 3] RGB; maps uint8 [b, D, G, G] for the chosen detectors; labels,
    samples, epochs int64 [b]; boxes float32 [b, 4] (top, left, height, width in the unit square);
    flips bool [b, 2] (horizontal, vertical).
    """

    step: int
    frames: NDArray[np.uint8]
    maps: NDArray[np.uint8]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    epochs: NDArray[np.int64]
    boxes: NDArray[np.float32]
    flips: NDArray[np.bool_]


def wanted_rows(records: ShardSet, plan: Plan, detectors: list[str] | None) -> list[int]:
    """Which of the set's maps `detectors` are (None: all). ValueError if one is not there."""
    if plan.count != len(records):
        raise ValueError(f"the plan is for {plan.count} samples, the set has {len(records)}")
    known = records.manifest.detectors
    for name in detectors or []:
        if name not in known:
            raise ValueError(
                f"{records.folder} has no maps of {name!r}, only of {', '.join(known)}; "
                f"build it with --detector {name}"
            )
    return list(range(len(known))) if detectors is None else [known.index(d) for d in detectors]


class Loader:
    """Iterates over the batches of steps `first` to `last` - 1 of `plan`, for one process.

    A batch's arrays stay as they are until the next batch is asked for. `detectors` names the
    maps wanted, in order; none reads no maps. `allocate(shape)` gives a uint8 buffer (pinned,
    say). Memory: prefetch + 1 batches. With `skip`, a record that does not decode is replaced by
    the next sample and noted in `damaged`; otherwise it raises ValueError, naming shard and key.
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
        skip: bool = False,
        allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] | None = None,
    ) -> None:
        if records.manifest.container != "webdataset":
            raise ValueError(f"{records.folder} is an FFCV set; load it by shards.ffcv_loader")
        self.rows = wanted_rows(records, plan, detectors)
        self.records, self.plan, self.skip = records, plan, skip
        self.damaged: set[int] = set()
        paths = [str(records.folder / shard.name) for shard in records.shards]
        self.open = lru_cache(OPEN_FILES)(lambda shard: _Shard(paths[shard]))
        self.first, self.last, self.rank, self.ranks = first, last, rank, ranks
        self.workers, self.prefetch = workers or joblib.cpu_count(), prefetch
        settings = records.manifest.settings
        size = len(plan.samples(first, 0, rank, ranks)[0])
        frames = (size, settings.frame, settings.frame, 3)
        maps = (size, len(self.rows), settings.grid, settings.grid)
        allocate = allocate or (lambda shape: np.empty(shape, np.uint8))
        self.buffers = [(allocate(frames), allocate(maps)) for _ in range(prefetch + 1)]
        self.raw = settings.quality == 0
        grid = (len(settings.detectors), settings.grid, settings.grid)
        self.map_header = npy_bytes(np.zeros(grid, np.uint8))[: -int(np.prod(grid))]
        self.cells = settings.grid**2 if self.rows else 0
        self.depth = max(self.rows, default=0) + 1  # maps to read: up to the last one wanted
        self.frame_header = npy_bytes(np.zeros(frames[1:], np.uint8))[: -int(np.prod(frames[1:]))]

    def __iter__(self) -> Iterator[Batch]:
        parts = self.plan.parts(self.first, self.last, self.rank, self.ranks)
        free = deque(self.buffers)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        waiting: deque[tuple[Batch, list[Future[None]], Any]] = deque()
        try:
            for step, epochs, samples in islice(parts, self.prefetch):
                waiting.append(self._start(pool, free.popleft(), step, epochs, samples))
            while waiting:
                batch, tasks, buffer = waiting.popleft()
                for step, epochs, samples in islice(parts, 1):
                    waiting.append(self._start(pool, free.popleft(), step, epochs, samples))
                for task in tasks:
                    task.result()
                yield batch
                free.append(buffer)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _start(
        self,
        pool: ThreadPoolExecutor,
        buffer: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        step: int,
        epochs: NDArray[np.int64],
        samples: NDArray[np.int64],
    ) -> tuple[Batch, list[Future[None]], Any]:
        """Plan a batch and hand its samples to the threads, in chunks."""
        frames, maps = buffer
        rows = self.records.index[samples]
        size = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        boxes, flips = self.plan.boxes(epochs, samples, *size)
        labels = rows["label"].astype(np.int64)
        batch = Batch(step, frames, maps, labels, samples, epochs, boxes, flips)
        chunks = range(0, len(samples), CHUNK)
        return batch, [pool.submit(self._fill, batch, at) for at in chunks], buffer

    def _fill(self, batch: Batch, begin: int) -> None:
        """Read and decode up to CHUNK samples into their places of the batch."""
        samples = batch.samples[begin : begin + CHUNK]
        rows = self.records.index[samples]
        shards = np.searchsorted(self.records.ends, samples, side="right").tolist()
        fields = [rows[name].tolist() for name in PLACES]
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
            problem = self._read(shard, [int(row[name]) for name in PLACES], batch, place)
            # The box stays: it is a crop of the unit square, of any sample.
            batch.samples[place], batch.labels[place] = number, row["label"]

    def _read(self, shard: int, where: Sequence[int], batch: Batch, place: int) -> str:
        """Put the record at `where` (PLACES) into its place. Returns what is wrong with it."""
        start, frame, frame_bytes, maps = where
        cells = self.cells
        end = maps + len(self.map_header) + cells * self.depth if cells else frame + frame_bytes
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


class _Shard:
    """An open shard. It closes when the last reader lets go of it, never under one."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.descriptor)
