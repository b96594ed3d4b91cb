"""The epoch plan: which sample, which crop and which flips, as pure functions of numbers.

In: seed, epoch, sample index (or a step). Out: order, boxes, flips. Nothing here has state: any
step of any epoch costs the same to reach, for any number of workers and processes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shards.limits import AREA

if TYPE_CHECKING:
    from shards.windows import Windows

Ints = NDArray[np.int64]
ROUNDS = 6  # of the Feistel network; 4 suffice for a pseudo-random permutation
# First part of every hash: what the number is for (3 is train's masks).
ORDER, CROP, SLOT, BANK, VIEW, TRIAL, SHARDS, WINDOW = 1, 2, 4, 5, 6, 7, 8, 9
TRIES = 10  # torchvision's RandomResizedCrop
# The published crop, beside AREA: ratio in source pixels, probability of either flip.
RATIO, FLIPS = (3 / 4, 4 / 3), (0.5, 0.5)


def mix(*parts: int | NDArray[np.integer]) -> NDArray[np.uint64]:
    """A 64-bit hash of the tuple of `parts`, element by element (splitmix64's finalizer, chained).

    Neighbouring inputs give unrelated outputs; it is the only source of randomness here.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.asarray(golden)
    with np.errstate(over="ignore"):  # wrapping at 2**64 is the point
        for part in parts:
            value = state + np.asarray(part).astype(np.uint64)
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = (value ^ (value >> np.uint64(31))) + golden
    return state


def uniform(*parts: int | NDArray[np.integer]) -> NDArray[np.float64]:
    """A number in [0, 1) for each tuple of `parts`, 53 bits of it."""
    return np.asarray((mix(*parts) >> np.uint64(11)) * 2.0**-53)


def shuffled(count: int, seed: int, epoch: int | Ints, places: Ints) -> Ints:
    """The samples at `places` of an epoch's order: a permutation of 0..count-1, O(1) each.

    A Feistel network permutes the smallest even power of two that holds `count`; what falls
    beyond `count` is sent through again, at most four times on average.
    """
    half = np.uint64(max(1, math.ceil(max(1, count - 1).bit_length() / 2)))
    low = np.uint64((1 << int(half)) - 1)
    values = np.asarray(places).astype(np.uint64)
    epochs = np.broadcast_to(np.asarray(epoch), values.shape)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & low
        for number in range(ROUNDS):
            keyed = mix(ORDER, seed, epochs[outside], number, right)
            left, right = right, left ^ (keyed & low)
        values[outside] = (left << half) | right
        outside = values >= np.uint64(count)
    return values.astype(np.int64)


def crop_boxes(
    purpose: int,
    seed: int,
    epochs: Ints,
    samples: Ints,
    heights: Ints,
    widths: Ints,
    area: tuple[float, float] = AREA,
    ratio: tuple[float, float] = RATIO,
    flips: tuple[float, float] = FLIPS,
) -> tuple[Ints, NDArray[np.bool_]]:
    """Crop boxes and flips of `samples` whose sources measure `heights` x `widths` px.

    Returns int64 [n, 4] (top, left, height, width in source pixels) and bool [n, 2] (horizontal,
    vertical, with the probabilities `flips`). The rule is torchvision's
    RandomResizedCrop.get_params: up to ten draws of `area` and log-uniform `ratio` in whole source
    pixels, else its centred fallback. `purpose` keeps training, bank and maps apart.
    """
    draws = np.arange(2 * TRIES + 4)[:, None]
    u = uniform(purpose, seed, epochs[None], samples[None], draws)
    areas = (area[0] + (area[1] - area[0]) * u[:TRIES]) * heights * widths
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * u[TRIES : 2 * TRIES])
    tall = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    wide = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    fits = (wide > 0) & (wide <= widths) & (tall > 0) & (tall <= heights)
    first = fits.argmax(axis=0)[None]
    tall, wide = (np.take_along_axis(x, first, axis=0)[0] for x in (tall, wide))
    centred_tall = np.minimum(heights, np.rint(widths / ratio[0]).astype(np.int64))
    centred_wide = np.minimum(widths, np.rint(heights * ratio[1]).astype(np.int64))
    found = fits.any(axis=0)
    tall, wide = np.where(found, tall, centred_tall), np.where(found, wide, centred_wide)
    top = np.floor(u[-4] * (heights - tall + 1)).astype(np.int64)
    left = np.floor(u[-3] * (widths - wide + 1)).astype(np.int64)
    top = np.where(found, top, (heights - tall) // 2)
    left = np.where(found, left, (widths - wide) // 2)
    turned = np.stack([u[-2] < flips[0], u[-1] < flips[1]], axis=1)
    return np.stack([top, left, tall, wide], axis=1), turned


def unit_boxes(boxes: Ints, heights: Ints, widths: Ints) -> NDArray[np.float32]:
    """`boxes` of source pixels, int64 [n, 4], in the unit square: float32 [n, 4]."""
    return (boxes / np.stack([heights, widths, heights, widths], axis=1)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """What every step of a run trains on.

    count: samples. batch: samples a step, over all processes. micro_steps: parts a step is cut
    into. The orders of all epochs are one stream cut into batches, so that every batch is full
    and every sample comes once an epoch; a batch may straddle two epochs. area, ratio: of a crop,
    as torchvision's. horizontal, vertical: probability of each flip. windows: the order of an
    epoch in windows of shards; None permutes all samples at once.
    """

    count: int
    batch: int
    seed: int = 0
    micro_steps: int = 1
    area: tuple[float, float] = AREA
    ratio: tuple[float, float] = RATIO
    horizontal: float = FLIPS[0]
    vertical: float = FLIPS[1]
    windows: "Windows | None" = None

    def steps(self, epochs: float) -> int:
        """Whole steps in `epochs`."""
        return int(epochs * self.count) // self.batch

    def samples(
        self, step: int, micro_step: int = 0, rank: int = 0, ranks: int = 1
    ) -> tuple[Ints, Ints]:
        """(epochs, sample indices) of one process's part of a step, int64 [part] each.

        Parts of all ranks and micro-steps, in that order, are the step's batch for any number of
        either. Raises ValueError if they do not divide the batch.
        """
        part, rest = divmod(self.batch, self.micro_steps * ranks)
        if rest or not part:
            raise ValueError(
                f"a batch of {self.batch} does not split into {self.micro_steps} micro-steps on "
                f"{ranks} processes; choose a batch that is a multiple of "
                f"{self.micro_steps * ranks}"
            )
        first = step * self.batch + (micro_step * ranks + rank) * part
        epochs, places = np.divmod(first + np.arange(part, dtype=np.int64), self.count)
        if self.windows:
            return epochs, self.windows.samples(epochs, places)
        return epochs, shuffled(self.count, self.seed, epochs, places)

    def boxes(
        self, epochs: Ints, samples: Ints, heights: Ints, widths: Ints
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Crop boxes and flips of `samples` whose sources measure `heights` x `widths` px.

        Returns float32 [n, 4] (top, left, height, width in the unit square) and bool [n, 2]
        (horizontal, vertical), by the rule of crop_boxes.
        """
        size, flips = (heights, widths), (self.horizontal, self.vertical)
        boxes, turned = crop_boxes(
            CROP, self.seed, epochs, samples, *size, self.area, self.ratio, flips
        )
        return unit_boxes(boxes, *size), turned

    def slots(self, epochs: Ints, samples: Ints, count: int) -> Ints:
        """Which of `count` stored crops each sample shows: all of them in turn, epoch by epoch."""
        begin = mix(SLOT, self.seed, samples) % np.uint64(count)
        return (epochs + begin.astype(np.int64)) % count

    def parts(
        self, first: int, last: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[int, Ints, Ints]]:
        """(step, epochs, samples) of every micro-step of steps `first` to `last` - 1."""
        for step in range(first, last):
            for micro_step in range(self.micro_steps):
                yield step, *self.samples(step, micro_step, rank, ranks)


@dataclass(frozen=True, slots=True)
class InOrder:
    """A plan for looking at a set: every sample once, whole, in order; the last step is short."""

    count: int
    batch: int

    @property
    def steps(self) -> int:
        """Steps that show all samples."""
        return -(-self.count // self.batch)

    def samples(
        self, step: int, micro_step: int = 0, rank: int = 0, ranks: int = 1
    ) -> tuple[Ints, Ints]:
        """(epochs, sample indices) of a step; the other arguments are for Plan's likeness."""
        assert ranks == 1
        first = step * self.batch
        samples = np.arange(first, min(first + self.batch, self.count), dtype=np.int64)
        return np.zeros_like(samples), samples

    def boxes(
        self, epochs: Ints, samples: Ints, heights: Ints, widths: Ints
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The whole of each, unflipped."""
        whole = np.tile(np.array([0, 0, 1, 1], np.float32), (len(samples), 1))
        return whole, np.zeros((len(samples), 2), bool)

    def slots(self, epochs: Ints, samples: Ints, count: int) -> Ints:
        """The first of `count` stored crops."""
        return np.zeros_like(samples)

    def parts(
        self, first: int, last: int, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[int, Ints, Ints]]:
        """(step, epochs, samples) of steps `first` to `last` - 1."""
        for step in range(first, last):
            yield step, *self.samples(step, 0, rank, ranks)
