"""The loader of WebDataset shards: a stream of constant-shape uint8 batches, as the plan says.

plan -> locate -> [threads: read at offset, decode straight into the batch's buffer] -> batch
Threads, because reading and decoding release the interpreter lock: no copies between processes,
nothing in shared memory to go stale. All randomness is the plan's; workers have none.
"""

import resource
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import joblib
import numpy as np
from numpy.typing import NDArray

from shards.crops import Ints, unit_boxes
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.order import Plan
from shards.processes import Processes, Shared
from shards.reading import Buffers, Layout, Place, Reader
from shards.record import COUNTS, DENSITY, decode_frame, key_of
from shards.remote.prefetch import Prefetch, windows_of

CHUNK = 16  # samples a task: fine enough to share out a batch, coarse enough to cost nothing
OPEN_FILES = 256  # a shard more is opened again for every sample, in a third of a decode's time
FEW = 8  # of a remote set read in order: an open shard cannot be evicted


Frames = NDArray[np.uint8] | list[NDArray[np.uint8]]


class Batch(NamedTuple):
    """One process's part of a step, or of a micro-step, in arrays that the loader uses again.

    step; frames uint8 [b, F, F, 3] RGB, or b JPEG files, uint8 [bytes] each, where the device is to
    decode them; maps: by detector, uint8 [b, G, G]; labels, samples, epochs int64 [b]; boxes
    float32 [b, 4] (top, left, height, width in the unit square); flips bool [b, 2] (horizontal,
    vertical). From the bank instead: boxes and flips are those stored, and counts, by detector,
    uint8 [b, c, c], are the crops' as flipped.
    """

    step: int
    frames: Frames
    maps: dict[str, NDArray[np.uint8]]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    epochs: NDArray[np.int64]
    boxes: NDArray[np.float32]
    flips: NDArray[np.bool_]
    counts: dict[str, NDArray[np.uint8]]


Submit = Callable[[list[Place]], Future[dict[int, str]]]
Part = tuple[int, Ints, Ints]  # step, epochs, samples
Maps = dict[str, NDArray[np.uint8]]


def planned(
    records: ShardSet, plan: Plan, part: Part, frames: Frames, maps: Maps, counts: Maps
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
        check_plan(records, plan, first, last)
        self.damaged: set[int] = set()
        self.records, self.plan, self.first, self.last = records, plan, first, last
        records.find_maps(maps)
        self.names = list(maps)

    def __iter__(self) -> Iterator[Batch]:
        with ThreadPoolExecutor(thread_name_prefix="reader") as pool:
            for part in self.plan.parts(self.first, self.last):
                found = list(pool.map(self.records.__getitem__, part[2].tolist()))
                frames = np.stack(list(pool.map(decode_frame, (r.frame for r in found))))
                maps = {n: np.stack([record.maps[n] for record in found]) for n in self.names}
                yield planned(self.records, self.plan, part, frames, maps, {})[0]


def check_plan(records: ShardSet, plan: Plan, first: int = 0, last: int = 0) -> None:
    """Raise UserError unless the plan is for the set, and has steps `first` to `last`."""
    if not 0 <= first <= last:
        raise UserError(f"there are no steps {first} to {last}; give 0 <= first <= last")
    if plan.count != len(records):
        raise UserError(f"the plan is for {plan.count} samples, the set has {len(records)}")


class Loader:
    """Iterates over the batches of steps `first` to `last` - 1 of `plan`, for one process.

    A batch's arrays stay as they are until the next batch is asked for. `maps` names the detectors
    wanted. With `bank`, crops are those stored, their slots the plan's, and counts come in place of
    maps. With `coded`, frames stay JPEG files. `allocate(shape)` gives a uint8 buffer (pinned,
    say); with `shared`, buffers are in it and workers are processes. Memory: prefetch + 1 batches.
    With `skip`, a record that does not decode is replaced by the next sample and noted in
    `damaged`; otherwise it raises UserError, naming shard and key.
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
        coded: bool = False,
        shared: Shared | None = None,
        allocate: Callable[[tuple[int, ...]], NDArray[np.uint8]] | None = None,
    ) -> None:
        if records.manifest.container != "webdataset":
            raise UserError(f"{records.folder} is an FFCV set; load it by ShardSet.loader")
        check_plan(records, plan, first, last)
        if workers < 0:
            raise UserError(f"workers {workers} is out of range; give 0 (one per core) or more")
        self.records, self.plan, self.skip = records, plan, skip
        self.damaged: set[int] = set()
        self.ahead: Callable[[], Prefetch | None] = lambda: None
        if records.copies and not plan.in_order:
            windows = windows_of(records, plan)
            self.ahead = lambda: Prefetch(records, windows, plan.batch, first, last)
        self.files = FEW if records.copies else open_files(len(records.shards))
        self.first, self.last, self.rank, self.ranks = first, last, rank, ranks
        self.workers, self.prefetch = workers or joblib.cpu_count(), prefetch
        size = len(plan.samples(first, 0, rank, ranks)[0])
        records.find_maps(maps, bank)
        kind = COUNTS if bank else DENSITY
        wanted = {name: records.places[f"{name}.{kind}"] for name in maps}
        self.layout = Layout(records.manifest.settings, wanted, bank, coded)
        self.reader = Reader(self.layout, lru_cache(self.files)(records.hold))
        self.shared = shared
        if shared:
            allocate = shared.allocate
        allocate = allocate or (lambda shape: np.empty(shape, np.uint8))
        self.shape = prefetch + 1, size
        self.buffers = [Buffers(self.layout, size, allocate) for _ in range(prefetch + 1)]

    def __iter__(self) -> Iterator[Batch]:
        parts = self.plan.parts(self.first, self.last, self.rank, self.ranks)
        micro_steps = range(self.plan.micro_steps)
        steps = (step for step in range(self.first, self.last) for _ in micro_steps)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
        waiting: deque[Future[Pending]] = deque()
        ahead = self.ahead()
        if ahead:
            self.reader.open = ahead.open
        processes = self._processes() if self.shared else None

        def read(number: int, places: list[Place]) -> dict[int, str]:
            """Read and decode into the buffers `number`; what is wrong, by place."""
            if processes is None:
                return self.reader.read(self.buffers[number], places)
            # Held here, so that nobody evicts them from a cache while they are read there.
            shards = {shard for _, shard, *_ in places} if self.records.copies else set()
            held = [self.reader.open(shard) for shard in shards]
            problems = processes.read(number, places)
            del held
            return problems

        def start(number: int) -> None:
            """Have the next batch, if there is one, planned and handed to the threads."""
            step = next(steps, None)
            if step is not None:
                if ahead:
                    ahead.begin(step)

                def submit(places: list[Place]) -> Future[dict[int, str]]:
                    return pool.submit(read, number, places)

                waiting.append(planner.submit(self._start, number, parts, submit))

        try:
            for number in range(self.prefetch):
                start(number)
            spare = self.prefetch
            while waiting:
                pending = waiting.popleft().result()
                if ahead:
                    ahead.wait_for(pending.batch.step)
                start(spare)
                spare = pending.number
                yield self._finish(pending)
        finally:
            planner.shutdown(wait=True, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)
            if ahead:  # what waits for a shard is told so
                ahead.close()
            if processes:
                processes.end()
            pool.shutdown(wait=True)
            if processes:
                processes.close()

    def _processes(self) -> Processes:
        assert self.shared
        paths = [self.records.folder / shard.name for shard in self.records.shards]
        return Processes(self.workers, self.shared, self.layout, self.shape, paths, self.files)

    def _start(self, number: int, parts: Iterator[Part], submit: Submit) -> "Pending":
        """Plan the next of `parts` for the buffers `number`, and submit its samples in chunks."""
        buffers = self.buffers[number]
        arrays = buffers.frames, buffers.maps, buffers.counts
        batch, rows = planned(self.records, self.plan, next(parts), *arrays)
        places = self._places(batch.samples, rows)
        if self.layout.bank:
            buffers.slots[: len(batch.samples)] = self._slots(batch.epochs, batch.samples)
        if self.layout.coded:
            batch = batch._replace(frames=buffers.take_files(places))
        chunks = (places[at : at + CHUNK] for at in range(0, len(places), CHUNK))
        return Pending(batch, rows, number, [submit(chunk) for chunk in chunks])

    def _places(self, samples: Ints, rows: NDArray[np.void]) -> list[Place]:
        """Where each of `samples` lies: its place in the batch first."""
        shards = np.searchsorted(self.records.ends, samples, side="right")
        start, size = rows["frame"].astype(np.int64), rows["frame_bytes"].astype(np.int64)
        behind = self.layout.parts or self.layout.bank
        gap = rows["arrays"].astype(np.int64) - start if behind else size
        fields = (shards, start, size, gap)
        return list(zip(range(len(samples)), *(each.tolist() for each in fields), strict=True))

    def _finish(self, pending: "Pending") -> Batch:
        """The batch when all of it is read: what is damaged replaced, the bank's crops chosen."""
        batch, rows, number, tasks = pending
        buffers = self.buffers[number]
        problems: dict[int, str] = {}
        for task in tasks:
            problems |= task.result()
        problems = buffers.flaws(slice(len(batch.samples))) | problems
        for place in sorted(problems):
            rows[place] = self._replace(batch, buffers, place, problems[place])
        return self._choose(batch, rows, buffers) if self.layout.bank else batch

    def _choose(self, batch: Batch, rows: NDArray[np.void], buffers: Buffers) -> Batch:
        """The batch with the crops of the bank that the plan shows, and their counts."""
        count = len(batch.samples)
        chosen = np.arange(count), buffers.slots[:count]
        for name, stored in buffers.stored.items():
            batch.counts[name][:] = stored[chosen]
        size = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        boxes, flips = np.split(buffers.crops[:count], [4], axis=1)
        return batch._replace(boxes=unit_boxes(boxes.astype(np.int64), *size), flips=flips != 0)

    def _slots(self, epochs: Ints, samples: Ints) -> Ints:
        """Which stored crop the plan shows of each sample."""
        return self.plan.slots(epochs, samples, self.records.manifest.settings.bank)

    def _replace(
        self, batch: Batch, buffers: Buffers, place: int, problem: str
    ) -> NDArray[np.void]:
        """Raise for the damaged record at `place`, or put the next sound one there: its row."""
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
            ((_, shard, start, size, gap),) = self._places(np.array([number]), row[None])
            if isinstance(batch.frames, list):  # it may be longer than the one that it replaces
                file = np.empty(gap, np.uint8)
                buffers.targets[place][0], batch.frames[place] = file.data, file[:size]
            if self.layout.bank:
                buffers.slots[[place]] = self._slots(batch.epochs[[place]], np.array([number]))
            found = self.reader.read(buffers, [(place, shard, start, size, gap)])
            problem = (buffers.flaws([place]) | found).get(place, "")
            # The plan's box stays: it is a crop of the unit square, of any sample.
            batch.samples[place], batch.labels[place] = number, row["label"]
        return row


class Pending(NamedTuple):
    """A batch that is being read into the loader's buffers `number`, and its rows of the index."""

    batch: Batch
    rows: NDArray[np.void]
    number: int
    tasks: list[Future[dict[int, str]]]


def open_files(shards: int) -> int:
    """How many of `shards` a loader keeps open: all, where the process may have so many files.

    The soft limit of files is raised, up to the hard one, for four such loaders.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return shards
    wanted = 4 * shards + OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return min(shards, max(OPEN_FILES, max(soft, wanted) // 4))
