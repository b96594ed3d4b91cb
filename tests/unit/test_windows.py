"""The order in windows: permutations, reachable anywhere, as a shuffle buffer would give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.order import Plan, Windows

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)


def epoch_of(windows, epoch):
    return windows.samples(np.full(windows.total, epoch), np.arange(windows.total))


@settings(max_examples=40)
@given(COUNTS, st.integers(1, 33), st.integers(0, 2**40), st.integers(0, 2**20))
def test_an_epoch_holds_every_sample_once_and_a_window_only_its_shards(counts, window, seed, epoch):
    windows = Windows(counts, window, seed)
    samples = epoch_of(windows, epoch)
    assert sorted(samples.tolist()) == list(range(sum(counts)))
    ends = np.cumsum(counts)
    read = {}
    for place, sample in enumerate(samples.tolist()):
        number = windows.window(epoch * windows.total + place)
        read.setdefault(number, set()).add(int(np.searchsorted(ends, sample, side="right")))
    first = epoch * windows.an_epoch
    assert all(first <= number < first + windows.an_epoch for number in read)
    told = [windows.shards(number) for number in range(first, first + windows.an_epoch)]
    assert sorted(shard for shards in told for shard in shards) == list(range(len(counts)))
    assert max(map(len, told)) <= window
    assert max(map(len, told)) - min(map(len, told)) <= 1
    for number, shards in read.items():
        assert shards == {s for s in windows.shards(number) if counts[s]}


@settings(max_examples=15)
@given(COUNTS, st.integers(1, 12), st.integers(0, 50), st.integers(1, 70))
def test_any_step_is_the_same_batch_for_any_split(counts, window, step, parts):
    windows, batch = Windows(counts, window, 3), 2 * parts
    whole = Plan(windows.total, batch, windows=windows)
    split = Plan(windows.total, batch, micro_steps=parts, windows=windows)
    epochs, samples = whole.samples(step)
    pieces = [split.samples(step, m, r, 2) for m in range(parts) for r in range(2)]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in pieces]), epochs)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in pieces]), samples)


def test_epochs_seeds_and_windows_differ():
    counts = [100] * 12
    orders = [epoch_of(Windows(counts, 4, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    for a in range(4):
        for b in range(a):
            assert (orders[a] == orders[b]).mean() < 0.02
    inside = [np.argsort(orders[0][begin : begin + 400]) for begin in (0, 400, 800)]
    assert (inside[0] == inside[1]).mean() < 0.03


def test_a_window_of_all_shards_is_the_full_permutation():
    counts = [5, 9, 2, 30]
    windowed = Plan(46, 12, seed=4, windows=Windows(counts, 4, 4))
    for step in (0, 3, 900):
        for a, b in zip(windowed.samples(step), Plan(46, 12, seed=4).samples(step), strict=True):
            np.testing.assert_array_equal(a, b)


@settings(max_examples=20)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 60))
def test_the_next_use_is_the_first_window_that_reads_the_shard(shards, window, number):
    windows = Windows([3] * shards, window, 1)
    uses = windows.next_use(number)
    for shard in range(shards):
        later = range(number, number + 2 * windows.an_epoch)
        assert uses[shard] == next(n for n in later if shard in windows.shards(n))


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="give 1 or more shards"):
        Windows([3], 0, 0)
