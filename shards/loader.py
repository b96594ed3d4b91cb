"""The loader, of one set or of several: a stream of constant-shape uint8 batches, as the plan says.

plan -> locate -> [threads: read at offset, decode straight into the batch's buffer] -> batch
Threads, because reading and decoding release the interpreter lock: no copies between processes,
nothing in shared memory to go stale. All randomness is the plan's; workers have none.
"""

import resource
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import NamedTuple

import joblib
import numpy as np
from numpy.typing import NDArray

from shards.crops import Ints, unit_boxes
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.order import Plan
from shards.processes import Processes, Shared
from shards.reading import CROPS, Layout, Reader, buffers_of
from shards.record import COUNTS, DENSITY, key_of
from shards.records import Records
from shards.remote.prefetch import Prefetch, walks_of

CHUNK = 16  # samples a task: fine enough to share out a batch, coarse enough to cost nothing
AT_ONCE = 32  # where a task takes the interpreter lock once: of raw ones 1.1 to 1.5 times as fast
LONG = 50_000  # samples that make up for compiling what reads JPEG frames so, about a second
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


Submit = Callable[[int, Ints], Future[dict[int, str]]]
Part = tuple[int, Ints, Ints]  # step, epochs, samples
Maps = dict[str, NDArray[np.uint8]]


def planned(
    records: Records, plan: Plan, part: Part, frames: Frames, maps: Maps, counts: Maps
) -> tuple[Batch, NDArray[np.void]]:
    """The batch of `part` with the plan's boxes around `frames`, `maps` and `counts`, whose first
    rows are its samples; and its rows of the index.
    """
    step, epochs, samples = part
    rows, count = records.rows(samples), len(samples)
    size = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    boxes, flips = plan.boxes(epochs, samples, *size)
    labels = rows["label"].astype(np.int64)
    maps, counts = ({name: a[:count] for name, a in each.items()} for each in (maps, counts))
    return Batch(step, frames[:count], maps, labels, samples, epochs, boxes, flips, counts), rows


def check_steps(first: int, last: int) -> None:
    """Raise UserError unless there can be steps `first` to `last`."""
    if not 0 <= first <= last:
        raise UserError(f"there are no steps {first} to {last}; give 0 <= first <= last")


def check_plan(records: Records, plan: Plan, first: int = 0, last: int = 0) -> None:
    """Raise UserError unless the plan is for the records, and has steps `first` to `last`."""
    check_steps(first, last)
    if plan.count != len(records):
        raise UserError(f"the plan is for {plan.count} samples, the set has {len(records)}")
    orders = plan.mixture.orders if plan.mixture else []
    if orders and [order.records for order in orders] != [len(each) for each in records.sets]:
        sizes = [order.records for order in orders]
        raise UserError(f"the plan mixes sets of {sizes} samples, not these")


class Loader:
    """Iterates over the batches of steps `first` to `last` - 1 of `plan`, for one process.

    A batch's arrays stay as they are until the next batch is asked for. `maps` names the detectors
    wanted. With `bank`, crops are those stored, their slots the plan's, and counts come in place of
    maps. With `coded`, frames stay JPEG files. `allocate(shape)` gives a uint8 buffer (pinned,
    say); with `shared`, buffers are in it and workers are processes. Memory: prefetch + 1 batches.
    With `skip`, a record that does not decode is replaced by the next one of the set, be it in the
    plan's subset or not, and noted in `damaged`; otherwise it raises UserError, naming shard and
    key. One iterator at a time: the first batch of another raises UserError.
    """

    def __init__(
        self,
        records: Records,
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
        check_plan(records, plan, first, last)
        if workers < 0:
            raise UserError(f"workers {workers} is out of range; give 0 (one per core) or more")
        self.records, self.plan, self.skip, self.ends = records, plan, skip, records.set_ends
        self.damaged: set[int] = set()
        self.iterating = False
        self.ahead: list[Callable[[], Prefetch] | None] = [None] * len(records.sets)
        if not plan.in_order:
            self.ahead = [
                partial(Prefetch, one, *walks, first, last) if one.copies else None
                for one, walks in zip(records.sets, walks_of(records, plan), strict=True)
            ]
        self.first, self.last, self.rank, self.ranks = first, last, rank, ranks
        self.workers, self.prefetch = workers or joblib.cpu_count(), prefetch
        size = len(plan.samples(first, 0, rank, ranks)[0])
        records.find_maps(maps, bank)
        self.layouts = [layout_of(each, maps, bank, coded) for each in records.sets]
        self.files = [FEW if each.copies else open_files(len(each.shards)) for each in records.sets]
        long = (last - first) * plan.micro_steps * size >= LONG
        self.readers = [
            # A chunk at once holds its shards beside those that are kept open.
            Reader(
                layout,
                lru_cache(files)(one.hold),
                not shared and files >= len(one.shards) and (layout.raw or long),
            )
            for layout, files, one in zip(self.layouts, self.files, records.sets, strict=True)
        ]
        self.shared = shared
        if shared:
            allocate = shared.allocate
        allocate = allocate or (lambda shape: np.empty(shape, np.uint8))
        self.shape = prefetch + 1, size
        self.buffers = [buffers_of(self.layouts, size, allocate) for _ in range(prefetch + 1)]

    def __iter__(self) -> Iterator[Batch]:
        if self.iterating:  # in the same buffers
            raise UserError(
                "this loader is being iterated; close that iterator, or make a second one"
            )
        self.iterating = True
        try:
            yield from self._batches()
        finally:
            self.iterating = False

    def _batches(self) -> Iterator[Batch]:
        parts = self.plan.parts(self.first, self.last, self.rank, self.ranks)
        micro_steps = range(self.plan.micro_steps)
        steps = (step for step in range(self.first, self.last) for _ in micro_steps)
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="loader")
        planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
        waiting: deque[Future[Pending]] = deque()
        ahead: list[Prefetch] = []
        for reader, begin in zip(self.readers, self.ahead, strict=True):
            if begin:
                ahead.append(begin())
                reader.open = ahead[-1].open
        processes = self._processes() if self.shared else None

        def read(number: int, owner: int, places: Ints) -> dict[int, str]:
            """Read and decode from set `owner` into the buffers `number`; what is wrong, by
            place.
            """
            reader = self.readers[owner]
            if processes is None:
                return reader.read(self.buffers[number][owner], places)
            # Held here, so that nobody evicts them from a cache while they are read there.
            remote = self.records.sets[owner].copies
            shards = set(places[:, 1].tolist()) if remote else set()
            held = [reader.open(shard) for shard in shards]
            problems = processes.read(number, owner, places)
            del held
            return problems

        def start(number: int) -> None:
            """Have the next batch, if there is one, planned and handed to the threads."""
            step = next(steps, None)
            if step is not None:
                for each in ahead:
                    each.begin(step)

                def submit(owner: int, places: Ints) -> Future[dict[int, str]]:
                    return pool.submit(read, number, owner, places)

                waiting.append(planner.submit(self._start, number, parts, submit))

        try:
            for number in range(self.prefetch):
                start(number)
            spare = self.prefetch
            while waiting:
                pending = waiting.popleft().result()
                for each in ahead:
                    each.wait_for(pending.batch.step)
                start(spare)
                spare = pending.number
                yield self._finish(pending)
        finally:
            planner.shutdown(wait=True, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)
            for each in ahead:  # what waits for a shard is told so
                each.close()
            if processes:
                processes.end()
            pool.shutdown(wait=True)
            if processes:
                processes.close()

    def _processes(self) -> Processes:
        assert self.shared
        sets = [
            (layout, [str(one.folder / shard.name) for shard in one.shards], files)
            for layout, one, files in zip(self.layouts, self.records.sets, self.files, strict=True)
        ]
        return Processes(self.workers, self.shared, sets, self.shape)

    def _start(self, number: int, parts: Iterator[Part], submit: Submit) -> "Pending":
        """Plan the next of `parts` for the buffers `number`, and submit its samples in chunks."""
        all_buffers = self.buffers[number]
        arrays = all_buffers[0].frames, all_buffers[0].maps, all_buffers[0].counts
        batch, rows = planned(self.records, self.plan, next(parts), *arrays)
        files: dict[int, NDArray[np.uint8]] = {}
        owners, tasks = self._owners(batch.samples), []
        for owner, buffers in enumerate(all_buffers):
            mine = np.flatnonzero(owners == owner)
            places = self._places(owner, mine, batch.samples[mine], rows[mine])
            if self.layouts[owner].bank:
                epochs, samples = batch.epochs[mine], batch.samples[mine]
                buffers.slots[mine] = self._slots(owner, epochs, samples)
            if self.layouts[owner].coded:
                files |= zip(mine.tolist(), buffers.take_files(places), strict=True)
            most = AT_ONCE if self.readers[owner].at_once else CHUNK
            size = max(CHUNK, min(most, self.prefetch * len(places) // self.workers))
            chunks = (places[at : at + size] for at in range(0, len(places), size))
            tasks += [submit(owner, chunk) for chunk in chunks]
        if files:
            batch = batch._replace(frames=[files[place] for place in range(len(owners))])
        return Pending(batch, rows, owners, number, tasks)

    def _owners(self, samples: Ints) -> Ints:
        """The set of each of `samples`."""
        return np.searchsorted(self.ends, samples, side="right")

    def _places(self, owner: int, at: Ints, samples: Ints, rows: NDArray[np.void]) -> Ints:
        """Where each of `samples` of set `owner` lies, as Reader.read wants it; `at`: its place in
        the batch.
        """
        one, layout = self.records.sets[owner], self.layouts[owner]
        inside = samples - (self.ends[owner] - len(one))
        shards = np.searchsorted(one.ends, inside, side="right")
        start, size = rows["frame"].astype(np.int64), rows["frame_bytes"].astype(np.int64)
        behind = layout.parts or layout.bank
        gap = rows["arrays"].astype(np.int64) - start if behind else size
        return np.stack((at, shards, start, size, gap), axis=1)

    def _finish(self, pending: "Pending") -> Batch:
        """The batch when all of it is read: what is damaged replaced, the bank's crops chosen."""
        problems: dict[int, str] = {}
        for task in pending.tasks:
            problems |= task.result()
        for owner, buffers in enumerate(self.buffers[pending.number]):
            problems = buffers.flaws(np.flatnonzero(pending.owners == owner)) | problems
        for place in sorted(problems):
            self._replace(pending, place, problems[place])
        return self._choose(pending) if self.layouts[0].bank else pending.batch

    def _choose(self, pending: "Pending") -> Batch:
        """The batch with the crops of the bank that the plan shows, and their counts."""
        batch, rows, owners, number, _ = pending
        for owner, buffers in enumerate(self.buffers[number]):
            buffers.choose(np.flatnonzero(owners == owner))
        size = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
        crops = self.buffers[number][0].crops[: len(owners)]
        boxes, flips = np.split(crops, [4], axis=1)
        return batch._replace(boxes=unit_boxes(boxes.astype(np.int64), *size), flips=flips != 0)

    def _slots(self, owner: int, epochs: Ints, samples: Ints) -> Ints:
        """Which stored crop the plan shows of each sample of set `owner`."""
        bank = self.records.sets[owner].manifest.settings.bank
        return self.plan.slots(epochs, samples, bank)

    def _replace(self, pending: "Pending", place: int, problem: str) -> None:
        """Raise for the damaged record at `place`, or put the next sound one there."""
        batch, rows, owners, buffers_number, _ = pending
        number = first = int(batch.samples[place])
        at = np.array([place])
        while problem:
            path, row = self.records.locate(number)
            if not self.skip or (number + 1) % len(self.records) == first:
                raise UserError(
                    f"{path}: record {key_of(int(row['key']))} {problem}; find all damage with "
                    "`kamim shards verify --level decode`, or train on with --on-error skip"
                )
            self.damaged.add(number)
            number = (number + 1) % len(self.records)
            one = np.array([number])
            rows[at] = self.records.rows(one)
            owner = owners[place] = int(self._owners(one)[0])
            buffers = self.buffers[buffers_number][owner]
            where = self._places(owner, at, one, rows[at])
            if isinstance(batch.frames, list):  # it may be longer than the one that it replaces
                file = np.empty(where[0, 4], np.uint8)
                buffers.targets[place][0], batch.frames[place] = file.data, file[: where[0, 3]]
            if self.layouts[owner].bank:
                buffers.slots[at] = self._slots(owner, batch.epochs[at], one)
            found = self.readers[owner].read(buffers, where)
            problem = (buffers.flaws([place]) | found).get(place, "")
            # The plan's box stays: it is a crop of the unit square, of any sample.
            batch.samples[place], batch.labels[place] = number, rows["label"][place]


class Pending(NamedTuple):
    """A batch that is being read into the loader's buffers `number`, its rows of the index, and
    the set of each sample.
    """

    batch: Batch
    rows: NDArray[np.void]
    owners: Ints
    number: int
    tasks: list[Future[dict[int, str]]]


def layout_of(one: ShardSet, maps: Sequence[str], bank: bool, coded: bool) -> Layout:
    """What is read of a record of a set."""
    tar, kind = one.manifest.container == "webdataset", COUNTS if bank else DENSITY
    wanted = {name: one.places[f"{name}.{kind}"] for name in maps}
    if bank and not tar:
        wanted |= {name: one.places[name] for name in CROPS}
    return Layout(one.manifest.settings, wanted, bank, coded, tar)


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
