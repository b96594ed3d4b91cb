"""Random numbers as pure functions: nothing here, or anywhere else, has hidden random state.

Every number is drawn by a Purpose, a seed and what it is for: (epoch, sample) or a step.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a random number decides: the first part of every hash. A number is never used twice."""

    ORDER = 1  # of the samples of an epoch
    CROP = 2  # box and flips of a training crop
    MASK = 3  # SimMIM's masks
    SLOT = 4  # which stored crop an epoch shows first
    BANK = 5  # boxes and flips of stored crops
    VIEW = 6  # crops that a density map averages over
    TRIAL = 7  # crops that fidelity is measured on
    SHARDS = 8  # order of the shards of an epoch
    WINDOW = 9  # order of the samples of a window
    RACE = 10  # order in which cells are masked and thrown
    AUGMENT = 11  # augmentation of an image in training with labels
    LAYERS = 12  # paths that a step drops
    BLEND = 13  # how a step's images are mixed in training with labels
    SET = 14  # order of the samples of one of several sets
    FEW = 15  # images and patches whose labels an evaluation takes
    CHOICE = 16  # samples that a run trains on, of all


# Arrays, not scalars: an operation with a scalar takes NumPy twice as long, and warns of wrapping.
_GOLDEN = np.asarray(np.uint64(0x9E3779B97F4A7C15))
_STAGES = [
    (np.asarray(np.uint64(shift)), np.asarray(np.uint64(factor)))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
]
_LAST = np.asarray(np.uint64(31))


def stir(value: NDArray[np.uint64], spare: NDArray[np.uint64]) -> None:
    """One link of the chain of `mix`, in place: of a state plus a part, the next state.

    `spare` is an array of the same shape to work in.
    """
    for shift, factor in _STAGES:
        np.right_shift(value, shift, spare)
        np.bitwise_xor(value, spare, value)
        np.multiply(value, factor, value)  # wrapping at 2**64 is the point
    np.right_shift(value, _LAST, spare)
    np.bitwise_xor(value, spare, value)
    np.add(value, _GOLDEN, value)


def mix(*parts: int | NDArray[np.integer]) -> NDArray[np.uint64]:
    """A 64-bit hash of the tuple of `parts`, element by element (splitmix64's finalizer, chained).

    Neighbouring inputs give unrelated outputs; it is the only source of randomness here.
    """
    state = _GOLDEN
    for part in parts:
        state = np.asarray(np.add(state, np.asarray(part).astype(np.uint64)))
        stir(state, np.empty_like(state))
    return state


def uniform(*parts: int | NDArray[np.integer]) -> NDArray[np.float64]:
    """A number in [0, 1) for each tuple of `parts`, 53 bits of it."""
    return np.asarray((mix(*parts) >> np.uint64(11)) * 2.0**-53)
