"""The order of training: which samples each step shows, and which crop of each.

Pure functions of numbers, without state. Any step of any epoch costs the same to find, with any
number of workers and processes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.crops import FLIPS, RATIO, Ints, crop_boxes, unit_boxes
from shards.errors import UserError
from shards.rng import Purpose, mix, stir
from shards.spec import AREA

if TYPE_CHECKING:
    from shards.mixture import Mixture

ROUNDS = 6  # of the Feistel network; 4 suffice for a pseudo-random permutation
NEVER = np.iinfo(np.int64).max  # a window that does not come
AHEAD = 4096  # samples that `parts` finds at once: a few cost nearly as much time as many


def shuffled(count: int, seed: int, epoch: int | Ints, places: Ints) -> Ints:
    """The samples at `places` of an epoch's order: a permutation of 0..count-1, O(1) each.

    A Feistel network permutes 0..4^k-1, with the smallest 4^k that is at least `count`. A result of
    `count` or more goes through the network again: four times on average, at most. The last few may
    need thirty passes, so a pass over few must be cheap: the keys of the rounds are hashed before
    the first pass, and arrays are changed in place.
    """
    bits = max(1, math.ceil(max(1, count - 1).bit_length() / 2))
    half, low, end = (np.asarray(np.uint64(n)) for n in (bits, (1 << bits) - 1, count))
    epochs = np.atleast_1d(epoch)
    if len(epochs) and (epochs == epochs[0]).all():
        epochs = epochs[:1]
    keys = mix(Purpose.ORDER, seed, epochs, np.arange(ROUNDS)[:, None])  # of each round
    found = values = np.asarray(places).astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values >> half, values & low
        keyed, spare = np.empty_like(values), np.empty_like(values)
        for key in keys:
            np.add(key, right, keyed)
            stir(keyed, spare)
            np.bitwise_and(keyed, low, keyed)
            np.bitwise_xor(keyed, left, keyed)
            left, right, keyed = right, keyed, left
        values = (left << half) | right
        found[outside] = values
        again = np.flatnonzero(values >= end)
        outside, values = outside[again], values[again]
        keys = keys[:, again] if len(epochs) > 1 else keys
    return found.astype(np.int64)


class Windows:
    """Shuffling within windows: an epoch permutes the shards, cuts them into windows of nearly the
    same number of shards, and permutes the samples of each window.

    counts: records of each shard. window: the most shards of a window; if all fit into one, the
    order is that of a plan without windows. The windows of all epochs are numbered in one sequence.
    Cost: one order of the shards per epoch, then O(1) per sample.

    subset: the samples that an epoch shows, ascending; None: all. Shards without such a sample are
    in no window. records: samples of the set; total: samples of an epoch.
    """

    def __init__(
        self, counts: Sequence[int], window: int, seed: int, subset: Ints | None = None
    ) -> None:
        if window < 1:
            raise UserError(f"window {window} is out of range; give 1 or more shards")
        self.limit, self.seed = window, seed
        self.sizes = self.counts = np.asarray(counts, np.int64)
        self.records, self.shown = int(self.sizes.sum()), np.arange(len(counts))
        self.subset = None if subset is None else checked_subset(subset, self.records)
        if self.subset is not None:
            ends = np.searchsorted(self.subset, np.cumsum(self.sizes))
            self.counts = np.diff(ends, prepend=0)
            self.shown = np.flatnonzero(self.counts)
        self.firsts = np.cumsum(self.counts) - self.counts
        self.total = int(self.counts.sum())
        self.an_epoch = max(1, -(-len(self.shown) // window))
        self.cuts = np.arange(self.an_epoch + 1) * len(self.shown) // self.an_epoch
        self._order = lru_cache(4)(self._shuffle)

    def __reduce__(self) -> Any:  # a plan travels to processes that are spawned
        return Windows, (self.sizes, self.limit, self.seed, self.subset)

    def _shuffle(self, epoch: int) -> tuple[Ints, Ints]:
        """(shards in the order of the epoch, places where its windows end)."""
        places = np.arange(len(self.shown))
        key = int(mix(Purpose.SHARDS, self.seed))
        order = self.shown[shuffled(len(places), key, epoch, places)]
        ends = np.cumsum(np.concatenate([[0], self.counts[order]]))
        return order, ends[self.cuts[1:]]

    def samples(self, epochs: Ints, places: Ints) -> Ints:
        """The samples at `places` of `epochs`, int64 [n] each. An epoch has every sample once."""
        found = self._permuted(epochs, places)
        return found if self.subset is None else self.subset[found]

    def _permuted(self, epochs: Ints, places: Ints) -> Ints:
        """As `samples`, as places in the subset."""
        if self.an_epoch == 1:
            return shuffled(self.total, self.seed, epochs, places)
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            order, ends = self._order(epoch)
            windows = np.searchsorted(ends, places[here], side="right")
            for window in np.unique(windows).tolist():
                at = here[windows == window]
                shards = order[self.cuts[window] : self.cuts[window + 1]]
                upto = np.cumsum(self.counts[shards])
                begin, key = ends[window] - upto[-1], int(mix(Purpose.WINDOW, self.seed, window))
                inside = shuffled(int(upto[-1]), key, epoch, places[at] - begin)
                which = np.searchsorted(upto, inside, side="right")
                shard = shards[which]
                found[at] = self.firsts[shard] + inside - (upto[which] - self.counts[shard])
        return found

    def window(self, place: int) -> int:
        """The window of a place in the sequence of all epochs."""
        epoch, inside = divmod(place, self.total)
        ends = self._order(epoch)[1]
        return epoch * self.an_epoch + int(np.searchsorted(ends, inside, side="right"))

    def shards(self, window: int) -> list[int]:
        """The shards of `window`."""
        epoch, part = divmod(window, self.an_epoch)
        return self._order(epoch)[0][self.cuts[part] : self.cuts[part + 1]].tolist()

    def next_use(self, window: int) -> Ints:
        """For each shard, the first window that has it, at or after `window`; int64 [shards]."""
        epoch, uses = window // self.an_epoch, []
        parts = np.repeat(np.arange(self.an_epoch), np.diff(self.cuts))
        for number in (epoch, epoch + 1):
            use = np.full(len(self.counts), NEVER)
            use[self._order(number)[0]] = number * self.an_epoch + parts
            uses.append(use)
        return np.where(uses[0] >= window, *uses)


def pair(name: str, value: Any) -> tuple[float, float]:
    """The two numbers of `value`. UserError if it is anything else."""
    try:
        first, second = value
        if math.isnan(first) or math.isnan(second):  # text has none of this, and fails
            raise ValueError
        return first, second
    except (TypeError, ValueError):
        raise UserError(f"{name} {value!r} is no pair of numbers; give two, as (0.5, 1)") from None


def checked_subset(subset: Sequence[int] | Ints, count: int) -> Ints:
    """`subset`, int64 [n]. UserError unless its numbers are below `count`, ascending, each once."""
    subset = np.asarray(subset, np.int64)  # differences of unsigned numbers are never below 0
    if not len(subset):
        raise UserError("a subset without samples shows nothing; choose one or more")
    if subset[0] < 0 or subset[-1] >= count or (np.diff(subset) <= 0).any():
        raise UserError(f"a subset has numbers of 0 to {count - 1}, ascending, each once")
    return subset


@dataclass(frozen=True, slots=True)
class Plan:
    """What every step of a run trains on.

    The orders of all epochs follow each other and are cut into batches. So every batch is full,
    every epoch has every sample once, and a batch may have samples of two epochs.

    count: samples of the set. batch: samples per step, over all processes. micro_steps: parts of a
    step. area, ratio: of a crop, as torchvision's. horizontal, vertical: probability of each flip.
    windows: shuffles within windows of shards, or shows a subset; None: permutes all samples.
    mixture: draws from several sets by their shares; an epoch then has as many samples as all sets
    together, and the epoch of a sample is that of its own set. in_order: for looking at a set once:
    samples in the order of the set, whole frames, no flips, and a last step that may be smaller.
    """

    count: int
    batch: int
    seed: int = 0
    micro_steps: int = 1
    area: tuple[float, float] = AREA
    ratio: tuple[float, float] = RATIO
    horizontal: float = FLIPS[0]
    vertical: float = FLIPS[1]
    windows: Windows | None = None
    mixture: "Mixture | None" = None
    in_order: bool = False

    def __post_init__(self) -> None:
        for name in ("count", "batch", "micro_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is out of range; give 1 or more")
        if self.windows and self.windows.records != self.count:
            records = self.windows.records
            raise UserError(f"the windows are for {records} samples, the plan has {self.count}")
        for name, most in (("area", 1.0), ("ratio", math.inf)):
            low, high = pair(name, getattr(self, name))
            if not 0 < low <= high <= most:
                rule = f"give 0 < least <= most <= {most:g}"
                raise UserError(f"{name} {low:g} to {high:g} is out of range; {rule}")
        for name in ("horizontal", "vertical"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)} is no probability; give 0 to 1")

    @property
    def total(self) -> int:
        """Samples of an epoch: all, or the subset."""
        order = self.mixture or self.windows
        return order.total if order else self.count

    def steps(self, epochs: float = 1) -> int:
        """Whole steps in `epochs`. If in_order: the steps of one pass over the set."""
        if not 0 <= epochs < math.inf:
            raise UserError(f"epochs {epochs} is out of range; give a number, 0 or more")
        if self.in_order:
            return -(-self.count // self.batch)
        return int(epochs * self.total) // self.batch

    def samples(
        self, step: int, micro_step: int = 0, rank: int = 0, ranks: int = 1
    ) -> tuple[Ints, Ints]:
        """(epochs, sample indices) of one process's part of a step, int64 [part] each.

        The parts of all micro-steps, and in each of all ranks, make the step's batch: the same
        batch for any number of either. Raises UserError if they do not divide it.
        """
        part = self._part(rank, ranks)
        return self._stream(step * self.batch + (micro_step * ranks + rank) * part, part)

    def _part(self, rank: int, ranks: int) -> int:
        """Samples of one process in a micro-step."""
        if not 0 <= rank < ranks:
            raise UserError(f"there is no rank {rank} of {ranks} processes; give 0 to {ranks - 1}")
        part, rest = divmod(self.batch, self.micro_steps * ranks)
        if rest or not part:
            raise UserError(
                f"a batch of {self.batch} does not split into {self.micro_steps} micro-steps on "
                f"{ranks} processes; choose a batch that is a multiple of "
                f"{self.micro_steps * ranks}"
            )
        return part

    def _stream(self, first: int, count: int) -> tuple[Ints, Ints]:
        """(epochs, samples) of `count` places, from `first` on, in the sequence of all epochs."""
        if self.in_order:
            samples = np.arange(first, min(first + count, self.count), dtype=np.int64)
            return np.zeros_like(samples), samples
        stream = first + np.arange(count, dtype=np.int64)
        if self.mixture:
            return self.mixture.samples(stream)
        epochs, places = np.divmod(stream, self.total)
        if self.windows:
            return epochs, self.windows.samples(epochs, places)
        return epochs, shuffled(self.count, self.seed, epochs, places)

    def boxes(
        self, epochs: Ints, samples: Ints, heights: Ints, widths: Ints
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Crop boxes and flips of `samples`, from sources of `heights` x `widths` px.

        Returns float32 [n, 4] (top, left, height, width in the unit square) and bool [n, 2]
        (horizontal, vertical), as crop_boxes draws them.
        """
        if self.in_order:
            whole = np.tile(np.array([0, 0, 1, 1], np.float32), (len(samples), 1))
            return whole, np.zeros((len(samples), 2), bool)
        size, flips = (heights, widths), (self.horizontal, self.vertical)
        boxes, turned = crop_boxes(
            Purpose.CROP, self.seed, epochs, samples, *size, self.area, self.ratio, flips
        )
        return unit_boxes(boxes, *size), turned

    def slots(self, epochs: Ints, samples: Ints, count: int) -> Ints:
        """Which of its `count` stored crops each sample shows: the next one in each epoch."""
        if self.in_order:
            return np.zeros_like(samples)
        begin = mix(Purpose.SLOT, self.seed, samples) % np.uint64(count)
        return (epochs + begin.astype(np.int64)) % count

    def parts(
        self, first: int, last: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[int, Ints, Ints]]:
        """(step, epochs, samples) of every micro-step of steps `first` to `last` - 1."""
        part, steps = self._part(rank, ranks), max(1, AHEAD // self.batch)
        for begin in range(first, last, steps):
            end = min(begin + steps, last)
            epochs, samples = self._stream(begin * self.batch, (end - begin) * self.batch)
            for place in range(rank, (end - begin) * self.micro_steps * ranks, ranks):
                mine = slice(place * part, (place + 1) * part)
                step = begin + place // (self.micro_steps * ranks)
                yield step, epochs[mine], samples[mine]
