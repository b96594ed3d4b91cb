"""The order of several sets as one: which set, and which of its samples, each place shows."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from shards.crops import Ints
from shards.errors import UserError
from shards.order import Windows

MOST_SAMPLES = 3_000_000_000  # samples of all sets: the product of two such numbers has 63 bits


class Mixture:
    """The orders of several sets, interleaved as evenly as shares allow.

    An epoch has as many samples as all sets together (or their subsets). `quotas`: samples per set
    and epoch; all of the set, or with `shares` its share of the sum, rounded so that they add up.
    Each set has its own order and its own epochs: each sample is shown once before any is shown
    twice. A batch holds each set's share, give or take two samples. Any place is found in O(sets).
    Raises UserError if a share gives no sample.
    """

    def __init__(self, orders: Sequence[Windows], shares: Sequence[float] | None = None) -> None:
        self.orders = list(orders)
        self.counts = [order.total for order in orders]
        self.total = sum(self.counts)
        if self.total > MOST_SAMPLES:
            raise UserError(
                f"{self.total:,} samples are more than {MOST_SAMPLES:,}: train on fewer sets"
            )
        self.quotas = self.counts if shares is None else _split(self.total, shares)
        self.firsts = np.cumsum([0, *(order.records for order in orders)])

    def by_size(self) -> "Mixture":
        """The same sets, each sample once an epoch."""
        return Mixture(self.orders)

    def reached(self, place: int) -> list[int]:
        """How many samples of each set come before a place in the stream of all epochs."""
        return [int(before[0]) for before, _ in self._parts(np.array([place]))]

    def samples(self, places: Ints) -> tuple[Ints, Ints]:
        """(epochs, samples) at places in the stream of all epochs, int64 [n] each.

        Epochs are the set's own; samples are numbered through all sets.
        """
        epochs, samples = np.empty_like(places), np.empty_like(places)
        for number, (before, mine) in enumerate(self._parts(places)):
            found, inside = np.divmod(before[mine], self.counts[number])
            epochs[mine] = found
            samples[mine] = self.firsts[number] + self.orders[number].samples(found, inside)
        return epochs, samples

    def _parts(self, places: Ints) -> Iterator[tuple[Ints, NDArray[np.bool_]]]:
        """For each set, its samples before each of `places`, and whether the place is its own.

        The first set takes its quota of the places, spread evenly; the next of those that are left.
        """
        epochs, rest = np.divmod(places, self.total)
        free, left = np.ones(len(places), bool), self.total
        for quota in self.quotas:
            before = (rest * quota + left // 2) // left
            mine = free & ((rest + 1) * quota + left // 2 >= (before + 1) * left)
            yield epochs * quota + before, mine
            rest, free, left = rest - before, free & ~mine, left - quota


def _split(total: int, shares: Sequence[float]) -> list[int]:
    """`total` in whole parts by `shares`, of any scale. Raises UserError if a part is empty."""
    if not all(0 < share < float("inf") for share in shares):
        raise UserError(f"shares {', '.join(f'{s:g}' for s in shares)}: give numbers above 0")
    ends = np.rint(np.cumsum(shares) / np.sum(shares) * total).astype(np.int64)
    quotas: list[int] = np.diff(ends, prepend=0).tolist()
    if min(quotas) < 1:
        share = shares[quotas.index(min(quotas))]
        raise UserError(f"a share of {share:g} gives none of {total:,} samples; give it more")
    return quotas
