"""Several finished sets as one: records one set after the other, classes joined by name."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.crops import Ints
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.mixture import Mixture
from shards.order import Plan, checked_subset
from shards.record import Record
from shards.records import Records
from shards.rng import Purpose, mix
from shards.tar import INDEX_DTYPE


class ShardSets(Records):
    """The records of `sets`, numbered one set after the other.

    shares: the share of an epoch that each set gives. classes: the class names of all sets, each
    once, in their first order; labels are places in this list. A name that a set has twice is two
    classes, here too. A set without names keeps its numbers. Sets may differ in container, place,
    detector options and edge rules. Raises UserError if frames differ in size.
    """

    def __init__(self, sets: Sequence[ShardSet], shares: Sequence[float] | None = None) -> None:
        if not sets:
            raise UserError("no set is named; name one or more")
        if shares is not None and len(shares) != len(sets):
            raise UserError(f"{len(shares)} shares for {len(sets)} sets: give each one, or none")
        self._sets, self.shares = list(sets), shares
        self._check_frames()
        self._check("frames", "px", "--frame", [one.manifest.settings.frame for one in sets])
        told_apart = [numbered(one.manifest.classes) for one in sets]
        places = {key: at for at, key in enumerate(dict.fromkeys(chain(*told_apart)))}
        self.classes = [name for name, _ in places]
        self._labels = [np.array([places[key] for key in keys], int) for keys in told_apart]

    @property
    def sets(self) -> list[ShardSet]:
        """The sets, in their order."""
        return self._sets

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def plan(
        self,
        batch: int,
        seed: int = 0,
        *,
        window: int = 0,
        subset: Ints | None = None,
        **crops: Any,
    ) -> Plan:
        """The order of training, by the shares. window: shards of each set that are shuffled
        together; 0: all. subset: numbers of the samples to show, ascending, some of each set; None:
        all. crops: area, ratio, horizontal, vertical of Plan.
        """
        keys = [int(mix(Purpose.SET, seed, number)) for number in range(len(self.sets))]
        parts: Sequence[Ints | None] = [None] * len(keys)
        if subset is not None:
            subset = checked_subset(subset, len(self))
            begins = np.cumsum([0, *map(len, self.sets)])
            split = np.split(subset, np.searchsorted(subset, begins[1:-1]))
            parts = [part - begin for part, begin in zip(split, begins, strict=False)]
        orders = [
            one.windows(window, key, part)
            for one, key, part in zip(self.sets, keys, parts, strict=True)
        ]
        return Plan(len(self), batch, seed, mixture=Mixture(orders, self.shares), **crops)

    def rows(self, samples: Ints) -> NDArray[np.void]:
        """Rows of the index of `samples`, INDEX_DTYPE [n]. Places are those in the sample's own
        set, labels those of all sets.
        """
        found = np.empty(len(samples), INDEX_DTYPE)
        owners, begin = np.searchsorted(self.set_ends, samples, side="right"), 0
        for number, one in enumerate(self.sets):
            mine = np.flatnonzero(owners == number)
            rows, labels = one.rows(samples[mine] - begin), self._labels[number]
            named = rows["label"] < len(labels)
            rows["label"][named] = np.append(labels, -1)[rows["label"][named]]
            found[mine] = rows
            begin += len(one)
        return found

    def locate(self, number: int) -> tuple[Path, NDArray[np.void]]:
        """As ShardSet.locate."""
        one, inside = self._owner(number)
        return one.locate(inside)[0], self.rows(np.array([number]))[0]

    def __getitem__(self, number: int) -> Record:
        """Record `number`, with its label among all classes, as ShardSet's."""
        one, inside = self._owner(number)
        return replace(one[inside], label=int(self.rows(np.array([number]))["label"][0]))

    def _owner(self, number: int) -> tuple[ShardSet, int]:
        """The set of record `number`, and its number there."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of sets of {len(self)}")
        owner = int(np.searchsorted(self.set_ends, number, side="right"))
        return self.sets[owner], number - int(self.set_ends[owner]) + len(self.sets[owner])

    def find_maps(self, names: Sequence[str], bank: bool = False) -> list[int]:
        """UserError unless every set has maps of `names`, with `bank` counts, all of one shape."""
        rows = [one.find_maps(names, bank) for one in self.sets]
        settings = [one.manifest.settings for one in self.sets]
        if bank:
            self._check("crops of the bank", "px", "--crop", [each.crop for each in settings])
        elif names:
            self._check("maps", "cells a side", "--grid", [each.grid for each in settings])
        return rows[0]

    def _check(self, what: str, unit: str, option: str, sides: list[int]) -> None:
        """UserError unless `sides` are the same in all sets."""
        for one, side in zip(self.sets, sides, strict=True):
            if side != sides[0]:
                raise UserError(
                    f"{self.sets[0].folder} has {what} of {sides[0]} {unit}, {one.folder} of "
                    f"{side}: only sets of one size are mixed; build one again with {option}"
                )


def numbered(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name, and how often it came before: ImageNet has two classes called crane."""
    seen = Counter[str]()
    found = []
    for name in names:
        found.append((name, seen[name]))
        seen[name] += 1
    return found
