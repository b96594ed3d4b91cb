"""What is fetched ahead of the batches: the window in hand, the one after it, and no more."""

import threading
import time
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from shards.order import Plan, Windows
from shards.remote.prefetch import Closed, Prefetch, walks_of

SHARDS, WINDOW, BATCH = 12, 3, 2  # of two records each: four windows of three steps an epoch


@dataclass
class Opened:
    """What is held of a shard."""

    shard: int


class Shelf:
    """Records whose shards come when asked for; one that is not needed yet can be waited for."""

    def __init__(self, shards=SHARDS):
        self.shards, self.held, self.fails = range(shards), [], None
        self.copies = SimpleNamespace(check=lambda window: None)

    def hold(self, shard, needed=lambda: True, next_use=lambda: None):
        if self.fails:
            raise self.fails
        self.held.append((shard, needed(), needed, next_use))
        return Opened(shard)

    def came(self):
        return [shard for shard, *_ in self.held]

    def wait(self, count):
        """Until so many were asked for; then a little longer, for one too many."""
        until = time.monotonic() + 30
        while len(self.held) < count and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(0.1)
        return self.came()


@pytest.fixture
def windows():
    return Windows([2] * SHARDS, WINDOW, 5)


@pytest.fixture
def begun(windows):
    """Makes prefetches, and closes them."""
    made = []

    def make(shelf, first=0, last=24, windows=windows):
        made.append(Prefetch(shelf, windows, lambda step: step * BATCH, first, last))
        return made[-1]

    yield make
    for each in made:
        each.close()


def shards_of(windows, *numbers):
    return sorted(shard for number in numbers for shard in windows.shards(number))


def test_a_window_and_the_one_after_it_are_fetched_and_no_more(windows, begun):
    shelf = Shelf()
    ahead = begun(shelf)
    assert not shelf.wait(0)
    for step in range(3):  # the steps of window 0
        ahead.begin(step)
        assert sorted(shelf.wait(6)) == shards_of(windows, 0, 1)
        ahead.wait_for(step)
    assert sorted(shelf.wait(6)) == shards_of(windows, 0, 1)
    needed = {shard for shard, at_once, *_ in shelf.held if at_once}
    assert needed == set(windows.shards(0))
    ahead.begin(3)
    assert sorted(shelf.wait(6)) == shards_of(windows, 0, 1)  # 2 waits until 1 is reached
    ahead.wait_for(3)
    assert sorted(shelf.wait(9)) == shards_of(windows, 0, 1, 2)
    assert all(needed() for shard, _, needed, _ in shelf.held if shard in windows.shards(1))
    (uses,) = {tuple(next_use()) for *_, next_use in shelf.held}
    assert uses == tuple(windows.next_use(1))


def test_a_run_ends_with_its_last_window(windows, begun):
    shelf = Shelf()
    ahead = begun(shelf, 3, 9)  # windows 1 and 2 of 4
    for step in range(3, 9):
        ahead.begin(step)
        ahead.wait_for(step)
    assert sorted(shelf.wait(6)) == shards_of(windows, 1, 2)


def test_a_batch_across_windows_needs_both(begun):
    windows, shelf = Windows([3] * SHARDS, 1, 5), Shelf()
    ahead = begun(shelf, 0, 18, windows)  # step 1 shows samples 2 and 3, of two windows
    ahead.begin(0)
    ahead.wait_for(0)
    assert sorted(shelf.wait(2)) == shards_of(windows, 0, 1)
    ahead.begin(1)
    ahead.wait_for(1)
    assert sorted(shelf.wait(2)) == shards_of(windows, 0, 1)  # 2 waits until 0 is done with
    assert ahead.open(windows.shards(0)[0]).shard == windows.shards(0)[0]
    at_once = {shard for shard, _, needed, _ in shelf.held if needed()}
    assert at_once == set(shards_of(windows, 0, 1))
    ahead.begin(2)
    ahead.wait_for(2)
    assert sorted(shelf.wait(3)) == shards_of(windows, 0, 1, 2)


def test_a_first_step_of_one_sample_needs_one_window(begun):
    windows, shelf = Windows([1] * SHARDS, 1, 5), Shelf()
    ahead = Prefetch(shelf, windows, lambda step: step, 0, 12)
    ahead.begin(0)
    ahead.wait_for(0)
    shelf.wait(2)
    ahead.close()
    assert sorted(shelf.came()) == shards_of(windows, 0, 1)
    assert ahead.newest == 0


def test_a_shard_is_opened_once_and_let_go_of_with_its_window(windows, begun):
    shelf = Shelf()
    ahead = begun(shelf)
    ahead.begin(0)
    first = windows.shards(0)[0]
    held = ahead.open(first)
    assert held.shard == first
    assert ahead.open(first) is held
    assert shelf.wait(6).count(first) == 1
    gone = weakref.ref(held)
    del held
    ahead.wait_for(2)
    assert gone()
    ahead.wait_for(3)
    assert not gone()
    last = shards_of(windows, 3)[0]  # of no window in hand
    assert ahead.open(last).shard == last


def test_what_goes_wrong_is_told_to_who_waits(windows, begun):
    shelf = Shelf()
    shelf.fails = OSError("away")
    ahead = begun(shelf)
    ahead.begin(0)
    with pytest.raises(OSError, match="away"):
        ahead.open(windows.shards(0)[0])


def test_closing_ends_threads_and_those_that_wait(windows, begun):
    before, shelf, told = threading.active_count(), Shelf(), []
    ahead = begun(shelf)
    ahead.begin(3)  # windows 0, 1 and 2, of which 2 has to wait
    assert threading.active_count() == before + 8

    def wait():
        try:
            ahead.open(windows.shards(2)[0])
        except Closed:
            told.append("closed")

    waiting = threading.Thread(target=wait)
    waiting.start()
    shelf.wait(6)
    assert not told
    ahead.close()
    waiting.join(30)
    assert told == ["closed"]
    assert threading.active_count() == before
    with pytest.raises(Closed):
        ahead.open(windows.shards(0)[0])
    assert threading.active_count() == before
    few = begun(Shelf(2), windows=Windows([2, 2], 1, 0))
    assert threading.active_count() == before + 2  # no more than there are shards
    few.close()


def test_walks_are_by_the_plans_windows(windows):
    shelf, checked = Shelf(), []
    shelf.copies.check = checked.append
    shelf.windows = lambda window, seed: Windows([2] * SHARDS, window or SHARDS, seed)
    records = SimpleNamespace(sets=[shelf])
    ((found, reached),) = walks_of(records, Plan(24, BATCH, windows=windows))
    assert found is windows
    assert [reached(step) for step in (0, 1, 5)] == [0, 2, 10]
    ((whole, _),) = walks_of(records, Plan(24, BATCH, seed=4))
    assert (whole.limit, whole.seed) == (SHARDS, 4)
    assert checked == [WINDOW, SHARDS]
    with pytest.raises(ValueError, match=r"by a plan of their own: records.plan\(batch, seed\)"):
        walks_of(SimpleNamespace(sets=[shelf, shelf]), Plan(48, BATCH))
    shelf.copies = None  # on a disk: nothing is fetched, nothing need fit
    assert len(walks_of(SimpleNamespace(sets=[shelf, shelf]), Plan(48, BATCH))) == 2
    assert checked == [WINDOW, SHARDS]
