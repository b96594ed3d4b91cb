"""Fetching the shards of a set at a URL: those of a window while the one before it is read."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from shards.dataset import Held, ShardSet
from shards.errors import UserError
from shards.order import Plan, Windows
from shards.records import Records

Reached = Callable[[int], int]
DOWNLOADS = 8  # at once: one stream rarely fills a network
PAUSE = 0.02  # seconds


class Closed(Exception):
    """The loader that wanted the shard is gone."""


class Prefetch:
    """Shards of one set for steps `first` to `last` - 1.

    reached: how many of the set's samples come before a step. `begin`, `wait_for` and `close` are
    for the loader's own thread, `open` is for any.
    """

    def __init__(
        self, records: ShardSet, windows: Windows, reached: Reached, first: int, last: int
    ) -> None:
        self.records, self.windows, self.reached = records, windows, reached
        self.oldest = self.newest = self.next = windows.window(reached(first))
        self.end = max(self.next, self._upto(last))
        # For each window asked for, its shards; one of two windows may go in between, and return.
        self.held: dict[int, dict[int, Future[Held]]] = {}
        self.closing = threading.Event()
        self.wishes: SimpleQueue[tuple[Future[Held], int, int] | None] = SimpleQueue()
        # Daemons: a store that does not answer must not keep a process from ending.
        self.threads = [
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True)
            for number in range(min(DOWNLOADS, len(records.shards)))
        ]
        for thread in self.threads:
            thread.start()

    def begin(self, step: int) -> None:
        """Ask for the shards of `step`, and of the window after it."""
        last = self._upto(step + 1)
        while self.next <= min(last + 1, self.end):
            self.held[self.next] = {shard: Future() for shard in self.windows.shards(self.next)}
            for shard, future in self.held[self.next].items():
                self.wishes.put((future, shard, self.next))
            self.next += 1

    def open(self, shard: int) -> Held:
        """The shard, waiting for it if need be. Raises as Copies.hold."""
        if self.closing.is_set():
            raise Closed
        # No name for the windows: a thread that waits here must not hold those that are done.
        wish = next((shards[shard] for shards in [*self.held.values()] if shard in shards), None)
        # Of no window in hand: the one after a damaged record, where damage is skipped.
        return wish.result() if wish else self.records.hold(shard)

    def wait_for(self, step: int) -> None:
        """Let go of the shards that only steps before `step` read; its own are needed now."""
        oldest = self.windows.window(self.reached(step))
        for window in [window for window in self.held if window < oldest]:
            del self.held[window]
        self.oldest, self.newest = oldest, max(oldest, self._upto(step + 1))

    def _upto(self, step: int) -> int:
        """The window of the last sample before `step`."""
        return self.windows.window(max(0, self.reached(step) - 1))

    def close(self) -> None:
        """End all downloads."""
        self.closing.set()
        for _ in self.threads:
            self.wishes.put(None)
        for thread in self.threads:
            thread.join(timeout=1)
        self.held.clear()

    def _work(self) -> None:
        while wish := self.wishes.get():
            future, shard, window = wish
            try:
                future.set_result(self._fetch(shard, window))
            except BaseException as error:
                future.set_exception(error)
            del wish, future  # a shard that nobody reads is not to be held by a waiting thread

    def _fetch(self, shard: int, window: int) -> Held:
        def needed() -> bool:
            if self.closing.is_set():
                raise Closed
            return window <= self.newest

        # One window ahead and no more: what comes sooner finds room first.
        while not needed() and window > self.oldest + 1:
            self.closing.wait(PAUSE)
        return self.records.hold(shard, needed, lambda: self.windows.next_use(self.oldest))


def walks_of(records: Records, plan: Plan) -> list[tuple[Windows, Reached]]:
    """For each set the windows in which `plan` walks through it, and how far it is before a step.

    UserError if a cache is too small, or the plan mixes sets at URLs without an order of each.
    """
    mixture, batch = plan.mixture, plan.batch
    if mixture:
        orders = mixture.orders
    elif len(records.sets) == 1:
        orders = [plan.windows or each.windows(0, plan.seed) for each in records.sets]
    elif any(each.copies for each in records.sets):
        raise UserError("sets at URLs are mixed by a plan of their own: records.plan(batch, seed)")
    else:  # on local disks in any order
        orders = [each.windows(0, plan.seed) for each in records.sets]
    for each, windows in zip(records.sets, orders, strict=True):
        if each.copies:
            each.copies.check(min(windows.limit, len(each.shards)))

    def walk(number: int) -> Reached:
        if mixture:
            return lambda step: mixture.reached(step * batch)[number]
        return lambda step: step * batch

    return [(windows, walk(number)) for number, windows in enumerate(orders)]
