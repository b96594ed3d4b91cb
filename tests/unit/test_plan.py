"""The plan: permutations, boxes and flips as pure functions, the same for any split."""

import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.order import Plan, Windows, shuffled
from shards.rng import mix, uniform


@settings(max_examples=80)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 2**20))
def test_an_epoch_holds_every_sample_exactly_once(count, seed, epoch):
    order = shuffled(count, seed, epoch, np.arange(count))
    assert sorted(order.tolist()) == list(range(count))


def hashed(*parts):
    """shards.rng.mix of Python's integers."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        value = (state + part) % 2**64
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = (value ^ value >> shift) * factor % 2**64
        state = ((value ^ value >> 31) + 0x9E3779B97F4A7C15) % 2**64
    return state


def slowly_shuffled(count, seed, epoch, place):
    """The sample at `place`, as the order is defined."""
    bits = max(1, -(-max(1, count - 1).bit_length() // 2))
    while True:
        left, right = divmod(place, 1 << bits)
        for number in range(6):
            keyed = hashed(1, seed, epoch, number, right) % (1 << bits)
            left, right = right, left ^ keyed
        place = (left << bits) + right
        if place < count:
            return place


@settings(max_examples=60)
@given(
    st.sampled_from([1, 2, 5, 1000, 1024, 1025, 2**20, 2**20 + 1, 1_281_167, 10**9]),
    st.integers(0, 2**62),
    st.lists(st.tuples(st.integers(0, 2**40), st.integers(0, 3)), min_size=1, max_size=40),
)
def test_the_order_is_what_it_is_defined_as(count, seed, wanted):
    """Runs resume by it: for any set, and for places of several epochs at once."""
    places, epochs = (np.array(each) for each in zip(*wanted, strict=True))
    places %= count
    both = zip(epochs.tolist(), places.tolist(), strict=True)
    slowly = [slowly_shuffled(count, seed, epoch, place) for epoch, place in both]
    assert shuffled(count, seed, epochs, places).tolist() == slowly
    assert mix(seed, epochs).tolist() == [hashed(seed, epoch) for epoch in epochs.tolist()]


@settings(max_examples=40)
@given(
    st.integers(1, 9000),
    st.integers(1, 700),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 40),
    st.booleans(),
)
def test_parts_are_the_samples_of_their_steps(count, each, micro_steps, ranks, first, in_order):
    """`parts` looks many steps ahead at once; what it gives is what `samples` says of each."""
    plan = Plan(count, each * micro_steps * ranks, 3, micro_steps, in_order=in_order)
    for rank in range(ranks):
        alone = () if ranks == 1 else (rank, ranks)  # one process is the default
        parts = list(plan.parts(first, first + 9, *alone))
        assert len(parts) == 9 * micro_steps
        for number, (step, *part) in enumerate(parts):
            assert step == first + number // micro_steps
            told = plan.samples(step, number % micro_steps, rank, ranks)
            np.testing.assert_array_equal(part, told)


def test_of_no_places_there_are_no_samples():
    none = np.zeros(0, np.int64)
    for epochs in (3, none):
        assert shuffled(5, 0, epochs, none).tolist() == []


def test_orders_differ_and_leave_no_sample_near_its_place():
    orders = [shuffled(5000, seed, epoch, np.arange(5000)) for seed in (0, 1) for epoch in (0, 1)]
    for a in range(4):
        for b in range(a):
            assert (orders[a] == orders[b]).mean() < 0.005
        correlation = np.corrcoef(orders[a], np.arange(5000))[0, 1]
        assert abs(correlation) < 0.06  # 4 standard deviations
        steps = np.diff(orders[a])
        assert abs(np.corrcoef(steps[1:], steps[:-1])[0, 1] + 0.5) < 0.06  # as random orders have


def test_places_of_an_order_are_evenly_used():
    """Where sample 0 lands over many epochs: chi-square against uniform."""
    landed = np.array(
        [int(np.flatnonzero(shuffled(16, 7, e, np.arange(16)) == 0)[0]) for e in range(3200)]
    )
    counts = np.bincount(landed, minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 37.7  # 15 degrees of freedom, p = 0.001


def test_uniform_numbers_are_uniform_and_unrelated():
    numbers = uniform(3, np.arange(200_000))
    assert 0 <= numbers.min() <= numbers.max() < 1
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    assert ((counts - 2000) ** 2 / 2000).sum() < 149  # 99 degrees of freedom, p = 0.001
    for other in (uniform(4, np.arange(200_000)), np.roll(numbers, 1)):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.01


@pytest.mark.parametrize(("ranks", "micro_steps"), [(1, 1), (2, 1), (1, 4), (4, 3)])
def test_a_step_is_the_same_batch_for_any_split(ranks, micro_steps):
    whole = Plan(1000, 48, seed=5)
    split = Plan(1000, 48, seed=5, micro_steps=micro_steps)
    for step in (0, 20, 21, 10_000):
        epochs, samples = whole.samples(step)
        parts = [split.samples(step, m, r, ranks) for m in range(micro_steps) for r in range(ranks)]
        assert len({len(part[0]) for part in parts}) == 1  # equal on every rank
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), epochs)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), samples)


def test_every_sample_comes_once_an_epoch_across_batches_that_straddle():
    plan = Plan(101, 8, seed=1)
    seen = [plan.samples(step) for step in range(plan.steps(8))]
    epochs, samples = (np.concatenate(x) for x in zip(*seen, strict=True))
    for epoch in range(8):
        assert sorted(samples[epochs == epoch].tolist()) == list(range(101))


def test_splits_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiple of 3"):
        Plan(100, 8).samples(0, ranks=3)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"count": 0}, "count 0 is out of range; give 1 or more"),
        ({"batch": 0}, "batch 0 is out of range"),
        ({"micro_steps": 0}, "micro_steps 0 is out of range"),
        ({"area": (0, 1)}, "area 0 to 1 is out of range; give 0 < least <= most <= 1"),
        ({"area": (0.5, 1.1)}, "area 0.5 to 1.1 is out of range"),
        ({"area": (0.6, 0.5)}, "area 0.6 to 0.5 is out of range"),
        ({"ratio": (0, 1)}, "ratio 0 to 1 is out of range; give 0 < least <= most <= inf"),
        ({"horizontal": -0.1}, "horizontal -0.1 is no probability; give 0 to 1"),
        ({"vertical": 1.1}, "vertical 1.1 is no probability"),
        ({"area": 0.5}, "area 0.5 is no pair of numbers"),
        ({"area": "11"}, "area '11' is no pair of numbers"),
        ({"area": (0.5, float("nan"))}, "is no pair of numbers"),
        ({"ratio": (1, 2, 3)}, r"ratio \(1, 2, 3\) is no pair of numbers"),
        ({"windows": Windows([5], 1, 0)}, "the windows are for 5 samples, the plan has 8"),
    ],
)
def test_a_plan_of_nonsense_is_refused_by_its_value(changes, line):
    with pytest.raises(UserError, match=line):
        Plan(**{"count": 8, "batch": 4} | changes)


def test_the_least_and_the_most_of_a_plan():
    for changes in (
        {"count": 1, "batch": 1},
        {"area": (1, 1), "ratio": (9, 9)},
        {"horizontal": 0, "vertical": 1},
        {"horizontal": 1, "vertical": 0},
    ):
        assert Plan(**{"count": 8, "batch": 4} | changes).steps() >= 1
    plan = Plan(10, 4)
    assert [plan.steps(epochs) for epochs in (0, 0.3, 0.4, 1, 2)] == [0, 0, 1, 2, 5]
    assert [Plan(10, batch, in_order=True).steps() for batch in (3, 5, 10, 11)] == [4, 2, 1, 1]
    for epochs in (-0.1, math.inf, math.nan):
        with pytest.raises(UserError, match="give a number, 0 or more"):
            plan.steps(epochs)
    assert plan.samples(0, rank=1, ranks=2)[0].shape == (2,)
    for rank, ranks in ((-1, 2), (2, 2)):
        with pytest.raises(UserError, match=f"no rank {rank} of 2 processes; give 0 to 1"):
            plan.samples(0, rank=rank, ranks=ranks)
    with pytest.raises(UserError, match="a batch of 4 does not split into 3 micro-steps on 2 "):
        Plan(10, 4, micro_steps=3).samples(0, rank=0, ranks=2)


def test_stored_crops_are_shown_in_turn():
    plan, samples = Plan(50, 5, seed=3), np.arange(50)
    first = plan.slots(np.zeros(50, int), samples, 3)
    assert set(first.tolist()) == {0, 1, 2}  # not all images begin with the same
    for epoch in (1, 2, 3):
        shown = plan.slots(np.full(50, epoch), samples, 3)
        np.testing.assert_array_equal(shown, (first + epoch) % 3)
    assert not Plan(50, 5, seed=3, in_order=True).slots(np.ones(50, int), samples, 3).any()


def test_in_order_every_image_is_shown_whole_and_once():
    plan = Plan(10, 4, in_order=True)
    epochs, samples = zip(*(plan.samples(step) for step in range(plan.steps())), strict=True)
    assert [len(each) for each in samples] == [4, 4, 2]
    assert np.concatenate(samples).tolist() == list(range(10))
    assert not np.concatenate(epochs).any()
    boxes, flips = plan.boxes(epochs[0], samples[0], np.full(4, 30), np.full(4, 40))
    assert boxes.tolist() == [[0, 0, 1, 1]] * 4
    assert boxes.dtype == np.float32
    assert not flips.any()


def test_a_billion_samples_cost_nothing_to_resume_in():
    plan = Plan(1_000_000_007, 2048)
    tracemalloc.start()
    begin = time.process_time()
    epochs, samples = plan.samples(40_000_000)
    plan.boxes(epochs, samples, np.full(2048, 375), np.full(2048, 500))
    assert time.process_time() - begin < 0.5
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert samples.max() < 1_000_000_007
    assert len(set(samples.tolist())) == 2048


def rule(u, height, width, area=(0.67, 1.0), ratio=(3 / 4, 4 / 3)):
    """torchvision's RandomResizedCrop.get_params, one image at a time, fed with our numbers."""
    import math

    for attempt in range(10):
        target = height * width * (area[0] + (area[1] - area[0]) * u[attempt])
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * u[10 + attempt])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[-4] * (height - h + 1)), int(u[-3] * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        w, h = round(height * max(ratio)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@settings(max_examples=60)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 99), st.integers(0, 10**9))
def test_boxes_follow_torchvisions_rule(height, width, epoch, sample):
    plan = Plan(2**30, 1, seed=9)
    samples = np.arange(sample, sample + 20)
    epochs = np.full(20, epoch)
    boxes, flips = plan.boxes(epochs, samples, np.full(20, height), np.full(20, width))
    for number, box, flip in zip(samples, boxes, flips, strict=True):
        u = uniform(2, 9, epoch, int(number), np.arange(24))
        expected = np.array(rule(u, height, width)) / [height, width, height, width]
        np.testing.assert_allclose(box, expected, atol=1e-6)
        assert flip.tolist() == [u[-2] < 0.5, u[-1] < 0.5]


def test_a_box_has_a_pixel_at_least():
    ones = np.ones(4, np.int64)
    for ratio in ((3, 4), (1 / 4, 1 / 3)):
        boxes, _ = Plan(4, 4, ratio=ratio).boxes(ones, np.arange(4), ones, ones)
        np.testing.assert_array_equal(boxes, [[0, 0, 1, 1]] * 4)


def test_boxes_are_distributed_as_torchvisions():
    torch = pytest.importorskip("torch")
    v2 = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image = torch.zeros(3, 375, 500)
    theirs = np.array(
        [v2.RandomResizedCrop.get_params(image, [0.67, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    size = np.full(4000, 375), np.full(4000, 500)
    boxes, _ = Plan(4000, 1).boxes(np.zeros(4000, int), np.arange(4000), *size)
    ours = boxes * [375, 500, 375, 500]
    for column in range(4):  # two-sample Kolmogorov-Smirnov, p = 0.001 is 0.0436
        places = np.sort(np.concatenate([ours[:, column], theirs[:, column]]))
        a = np.searchsorted(np.sort(ours[:, column] + 1e-3), places + 2e-3) / 4000
        b = np.searchsorted(np.sort(theirs[:, column] + 1e-3), places + 2e-3) / 4000
        assert np.abs(a - b).max() < 0.0436


def test_options_of_the_plan():
    zeros = np.zeros(500, int)
    size = np.full(500, 300), np.full(500, 200)
    plan = Plan(500, 1, area=(1.0, 1.0), ratio=(2 / 3, 2 / 3), horizontal=0.0, vertical=1.0)
    boxes, flips = plan.boxes(zeros, np.arange(500), *size)
    np.testing.assert_allclose(boxes, np.tile([0, 0, 1, 1], (500, 1)), atol=1e-6)
    assert not flips[:, 0].any()
    assert flips[:, 1].all()
