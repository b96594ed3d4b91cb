"""The order of an epoch in windows of shards: a shuffle buffer that is a pure function.

In: records of each shard, shards a window, seed. Out: the sample at any place of any epoch, the
shards a window reads, and when each shard is read next. Nothing is replayed to get anywhere.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from shards.order import SHARDS, WINDOW, Ints, mix, shuffled


class Windows:
    """Each epoch permutes the shards, cuts them into windows, and permutes samples within each.

    counts: records of each shard. window: the most shards a window may have; windows are as even
    as they can be. Windows are numbered through all epochs. One that holds every shard gives the
    plan's full permutation. Cost: an order of the shards an epoch, then O(1) a sample.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int) -> None:
        if window < 1:
            raise ValueError(f"a window of {window} shards reads nothing; use 1 or more")
        self.limit, self.seed = window, seed
        self.counts = np.asarray(counts, np.int64)
        self.firsts = np.cumsum(self.counts) - self.counts
        self.total = int(self.counts.sum())
        self.an_epoch = max(1, -(-len(counts) // window))
        self.cuts = np.arange(self.an_epoch + 1) * len(counts) // self.an_epoch
        self._order = lru_cache(4)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[Ints, Ints]:
        """(shards in the order of the epoch, places where its windows end)."""
        places = np.arange(len(self.counts))
        order = shuffled(len(places), int(mix(SHARDS, self.seed)), epoch, places)
        ends = np.cumsum(np.concatenate([[0], self.counts[order]]))
        return order, ends[self.cuts[1:]]

    def samples(self, epochs: Ints, places: Ints) -> Ints:
        """The samples at `places` of `epochs`, int64 [n] each: every one once an epoch."""
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
                begin, key = ends[window] - upto[-1], int(mix(WINDOW, self.seed, window))
                inside = shuffled(int(upto[-1]), key, epoch, places[at] - begin)
                which = np.searchsorted(upto, inside, side="right")
                shard = shards[which]
                found[at] = self.firsts[shard] + inside - (upto[which] - self.counts[shard])
        return found

    def window(self, place: int) -> int:
        """The window of a place in the stream of all epochs."""
        epoch, inside = divmod(place, self.total)
        ends = self._order(epoch)[1]
        return epoch * self.an_epoch + int(np.searchsorted(ends, inside, side="right"))

    def shards(self, window: int) -> list[int]:
        """The shards that `window` reads."""
        epoch, part = divmod(window, self.an_epoch)
        return self._order(epoch)[0][self.cuts[part] : self.cuts[part + 1]].tolist()

    def next_use(self, window: int) -> Ints:
        """For each shard the first window from `window` on that reads it, int64 [shards]."""
        epoch, uses = window // self.an_epoch, []
        parts = np.repeat(np.arange(self.an_epoch), np.diff(self.cuts))
        for number in (epoch, epoch + 1):
            use = np.empty(len(self.counts), np.int64)
            use[self._order(number)[0]] = number * self.an_epoch + parts
            uses.append(use)
        return np.where(uses[0] >= window, *uses)
