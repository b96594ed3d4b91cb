"""A plan of a subset: the chosen samples and no other, reachable anywhere, in windows or not."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from shards.loader import Loader
from shards.order import Plan, Windows, shuffled
from shards.remote.prefetch import walks_of

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=20).filter(any)


@st.composite
def subsets(draw):
    """(records of each shard, numbers of some records, shards of a window)."""
    counts = draw(COUNTS)
    kept = draw(st.lists(st.booleans(), min_size=sum(counts), max_size=sum(counts)).filter(any))
    return counts, np.flatnonzero(kept), draw(st.integers(1, 22))


@settings(max_examples=40)
@given(subsets(), st.integers(0, 2**40), st.integers(0, 2**20))
def test_an_epoch_shows_each_chosen_sample_once_and_reads_no_other_shard(some, seed, epoch):
    counts, subset, window = some
    windows = Windows(counts, window, seed, subset)
    assert (windows.total, windows.records) == (len(subset), sum(counts))
    places = np.arange(windows.total)
    samples = windows.samples(np.full(windows.total, epoch), places)
    assert sorted(samples.tolist()) == subset.tolist()
    owners = np.searchsorted(np.cumsum(counts), samples, side="right")
    first = epoch * windows.an_epoch
    told = [windows.shards(number) for number in range(first, first + windows.an_epoch)]
    assert sorted(shard for part in told for shard in part) == sorted(set(owners.tolist()))
    for place, owner in enumerate(owners.tolist()):
        assert owner in windows.shards(windows.window(epoch * windows.total + place))
    uses = windows.next_use(first)
    for shard in range(len(counts)):
        here = [number for number, part in enumerate(told, first) if shard in part]
        assert uses[shard] == (here[0] if here else np.iinfo(np.int64).max)


@settings(max_examples=25)
@given(subsets(), st.integers(0, 50), st.integers(1, 12))
def test_any_step_is_the_same_batch_for_any_split(some, step, parts):
    counts, subset, window = some
    windows = Windows(counts, window, 3, subset)
    whole = Plan(sum(counts), 2 * parts, windows=windows)
    split = Plan(sum(counts), 2 * parts, micro_steps=parts, windows=windows)
    epochs, samples = whole.samples(step)
    pieces = [split.samples(step, m, r, 2) for m in range(parts) for r in range(2)]
    np.testing.assert_array_equal(np.concatenate([p[0] for p in pieces]), epochs)
    np.testing.assert_array_equal(np.concatenate([p[1] for p in pieces]), samples)
    assert whole.total == len(subset)
    assert whole.steps(3) == 3 * len(subset) // (2 * parts)
    again = pickle.loads(pickle.dumps(whole))  # a plan travels to processes that are spawned
    np.testing.assert_array_equal(again.samples(step)[1], samples)


def test_without_windows_it_is_the_permutation_of_as_many_samples(built):
    records, subset = shards.open(built), np.array([1, 5, 6, 20, 33, 39])
    plan = records.plan(3, 7, subset=subset)
    for step in (0, 1, 5, 1000):
        epochs, places = np.divmod(3 * step + np.arange(3), 6)
        np.testing.assert_array_equal(plan.samples(step)[0], epochs)
        expected = subset[shuffled(6, 7, epochs, places)]
        np.testing.assert_array_equal(plan.samples(step)[1], expected)


def test_a_subset_of_all_is_the_whole_plan(built):
    records = shards.open(built)
    for window in (0, 3):
        all_of_them = records.plan(8, 2, window=window, subset=np.arange(40))
        for step in (0, 4, 77):
            plain = records.plan(8, 2, window=window)
            for a, b in zip(all_of_them.samples(step), plain.samples(step), strict=True):
                np.testing.assert_array_equal(a, b)


def test_of_several_sets_each_walks_through_its_own_part(built):
    records = shards.open([built, built], shares=[1, 3])
    subset = np.array([0, 3, 39, 40, 41, 50, 79])
    plan = records.plan(7, 1, subset=subset)
    assert plan.total == 7
    assert plan.mixture.quotas == [2, 5]
    shown = np.concatenate([plan.samples(step)[1] for step in range(60)])
    assert sorted(set(shown.tolist())) == subset.tolist()
    times = dict(zip(*np.unique(shown, return_counts=True), strict=True))
    assert [times[n] for n in (0, 3, 39)] == [40, 40, 40]
    assert [times[n] for n in (40, 41, 50, 79)] == [75, 75, 75, 75]
    batches = list(Loader(records, plan, 0, 3, maps=["fast"]))
    assert {int(n) for batch in batches for n in batch.samples} <= set(subset.tolist())
    assert [walk.records for walk, _ in walks_of(records, plan)] == [40, 40]


@pytest.mark.parametrize(
    ("subset", "words"),
    [
        ([], "a subset without samples shows nothing"),
        ([3, 2], "has numbers of 0 to 39, ascending, each once"),
        ([2, 2], "has numbers of 0 to 39, ascending, each once"),
        ([-1, 2], "has numbers of 0 to 39"),
        ([2, 40], "a subset has numbers of 0 to 39"),
        (np.array([3, 2], np.uint8), "has numbers of 0 to 39, ascending, each once"),
    ],
)
def test_what_is_no_subset_is_refused(subset, words, built):
    with pytest.raises(ValueError, match=words):
        shards.open(built).plan(2, subset=subset)


@pytest.mark.parametrize("kind", [list, tuple, range])
def test_a_subset_is_numbers_in_any_sequence(kind, built):
    for records in (shards.open(built), shards.open([built, built])):
        some = range(3, len(records), 30)
        expected = records.plan(2, subset=np.array(some)).samples(1)
        numbers = some if kind is range else kind(some)
        np.testing.assert_array_equal(records.plan(2, subset=numbers).samples(1), expected)


def test_a_set_without_a_sample_in_the_subset_is_refused(built):
    with pytest.raises(ValueError, match="a subset without samples"):
        shards.open([built, built]).plan(2, subset=np.arange(5))


def test_mean_densities_are_those_of_the_records(built):
    records, told = shards.open(built), []
    for name in ("fast", "orb"):
        found = records.mean_densities(name, told.append)
        expected = [records[n].maps[name].mean() / 255 for n in range(40)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert sum(told) == 80
    with pytest.raises(ValueError, match="no maps of 'sift'"):
        records.mean_densities("sift", told.append)
