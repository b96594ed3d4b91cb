"""The order over several sets: shares held, each set walked through in its own order, any step."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.mixture import Mixture
from shards.order import Plan, Windows

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@st.composite
def mixtures(draw):
    sizes = draw(SIZES)
    orders = [Windows([1] * size, draw(st.integers(1, 60)), 7 + n) for n, size in enumerate(sizes)]
    parts = st.integers(1, 9)
    shares = draw(st.none() | st.lists(parts, min_size=len(sizes), max_size=len(sizes)))
    if shares and sum(sizes) < 3 * sum(shares):
        shares = None
    return Mixture(orders, shares)


def slow_epoch(quotas):
    """The set of each place of an epoch: the first set's are spread evenly, and so on."""
    owners, free = {}, list(range(sum(quotas)))
    for number, quota in enumerate(quotas):
        upto = [
            floor(Fraction(k * quota, len(free)) + Fraction(1, 2)) for k in range(len(free) + 1)
        ]
        mine = [place for k, place in enumerate(free) if upto[k + 1] > upto[k]]
        owners |= dict.fromkeys(mine, number)
        free = [place for place in free if place not in owners]
    return [owners[place] for place in sorted(owners)]


def slowly(mixture, places):
    """(set, epoch, sample) of the first `places` places: each set's own order, walked through."""
    epoch, walked, found = slow_epoch(mixture.quotas), [0] * len(mixture.counts), []
    for place in range(places):
        number = epoch[place % mixture.total]
        turn, inside = divmod(walked[number], mixture.counts[number])
        sample = mixture.orders[number].samples(np.array([turn]), np.array([inside]))[0]
        found.append((turn, sum(mixture.counts[:number]) + int(sample)))
        walked[number] += 1
    return found, walked


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 400))
def test_the_order_is_each_sets_own_interleaved(mixture, upto):
    expected, walked = slowly(mixture, upto)
    epochs, samples = mixture.samples(np.arange(upto))
    assert list(zip(epochs.tolist(), samples.tolist(), strict=True)) == expected
    assert mixture.reached(upto) == walked


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 10**7))
def test_an_epoch_gives_each_set_its_quota_and_a_batch_its_share(mixture, epoch):
    begin = epoch * mixture.total
    assert sum(mixture.quotas) == mixture.total
    _, samples = mixture.samples(begin + np.arange(mixture.total))
    owners = np.searchsorted(mixture.firsts[1:], samples, side="right")
    assert np.bincount(owners, minlength=len(mixture.counts)).tolist() == mixture.quotas
    assert mixture.reached(begin) == [epoch * quota for quota in mixture.quotas]
    for number, quota in enumerate(mixture.quotas):
        upto = np.cumsum(owners == number)
        even = np.arange(1, mixture.total + 1) * quota / mixture.total
        assert np.abs(upto - even).max() <= 1.5


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_each_of_a_sets_samples_is_seen_once_before_any_is_seen_twice(mixture):
    _, samples = mixture.samples(np.arange(3 * mixture.total))
    for number, count in enumerate(mixture.counts):
        begin = mixture.firsts[number]
        mine = samples[(samples >= begin) & (samples < begin + count)]
        for turn in range(0, len(mine) - count + 1, count):
            assert len(set(mine[turn : turn + count].tolist())) == count


def test_without_shares_an_epoch_shows_every_sample_once():
    mixture = Mixture([Windows([30], 1, 1), Windows([4, 3], 1, 2)], [1, 1])
    assert mixture.quotas == [18, 19] or mixture.quotas == [19, 18]
    _, samples = mixture.by_size().samples(5 * 37 + np.arange(37))
    assert sorted(samples.tolist()) == list(range(37))


@settings(max_examples=30, deadline=None)
@given(mixtures(), st.integers(0, 50), st.integers(1, 20))
def test_any_step_is_the_same_batch_for_any_split(mixture, step, parts):
    whole = Plan(mixture.total, 2 * parts, mixture=mixture)
    split = Plan(mixture.total, 2 * parts, micro_steps=parts, mixture=mixture)
    pieces = [split.samples(step, m, r, 2) for m in range(parts) for r in range(2)]
    for place, expected in enumerate(whole.samples(step)):
        np.testing.assert_array_equal(np.concatenate([p[place] for p in pieces]), expected)


def test_a_mixture_of_a_billion_has_the_same_shares_far_on():
    orders = [Windows([1_999_999_999], 1, 1), Windows([7], 1, 2), Windows([900_000_000], 1, 3)]
    mixture = Mixture(orders, [0.5, 0.25, 0.25])
    place = 300 * mixture.total + mixture.total // 2
    reached = mixture.reached(place)
    assert sum(reached) == place
    for got, share in zip(reached, (0.5, 0.25, 0.25), strict=True):
        assert got / place == pytest.approx(share, abs=1e-8)
    epochs, samples = mixture.samples(np.arange(place, place + 1000))
    tiny = (samples >= 1_999_999_999) & (samples < 2_000_000_006)
    assert abs(tiny.sum() - 250) <= 1
    assert (np.diff(epochs[tiny]) >= 0).all()


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ([1, 0], "shares 1, 0: give numbers above 0"),
        ([1, float("nan")], "give numbers above 0"),
        ([1, 1e-9], "a share of 1e-09 gives none of 20 samples"),
    ],
)
def test_shares_that_are_none_are_refused(shares, words):
    with pytest.raises(ValueError, match=words):
        Mixture([Windows([10], 1, 0), Windows([10], 1, 0)], shares)


def test_shares_are_numbers_in_any_sequence():
    orders = [Windows([10], 1, 0), Windows([10], 1, 0)]
    assert Mixture(orders, np.array([0.75, 0.25])).quotas == [15, 5]


def test_more_than_can_be_counted_is_refused():
    with pytest.raises(ValueError, match="train on fewer sets"):
        Mixture([Windows([2**31], 1, 0), Windows([2**31], 1, 0)])
