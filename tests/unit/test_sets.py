"""Several sets as one: their records, batches and classes; what cannot be mixed is refused."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import copied, settings

import preprocess
import shards
from preprocess import build_shards, open_source
from shards import Plan, ShardSet, decode_frame
from shards.beton import convert_to_ffcv
from shards.spec import write


def build(source, out, names=("fast", "orb"), **changes):
    detectors = tuple(preprocess.detector_settings(name) for name in names)
    chosen = {"frame": 120, "detectors": detectors, "crop": 96, "bank": 2} | changes
    build_shards(open_source(str(source)), out, settings(**chosen), 1)
    return out


@pytest.fixture
def other(small_source, tmp_path):
    """A set of two other classes and one that both have, with more crops, in FFCV."""
    root = tmp_path / "other source"
    for number, path in enumerate(sorted(small_source.rglob("*.jpg"))[:14]):
        folder = root / ("class2", "added", "zebra")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    build(root, tmp_path / "other", ("sift", "orb", "fast"), bank=3, shard_size=5)
    convert_to_ffcv(tmp_path / "other", tmp_path / "ffcv")
    return tmp_path / "ffcv"


@pytest.fixture
def both(built, other):
    return shards.open([built, str(other)], shares=[1, 2])


def test_a_name_that_a_set_has_twice_is_two_classes(built, other):
    for folder in (built, other):
        records = ShardSet(folder)
        classes = ["crane", *records.manifest.classes[1:-1], "crane"]
        write(folder, replace(records.manifest, classes=classes))
    both = shards.open([built, other])
    assert both.classes == ["crane", "class1", "class2", "crane"]
    theirs = ShardSet(built).index["label"].tolist()
    assert both.rows(np.arange(40))["label"].tolist() == theirs
    assert {0, 3} <= set(both.rows(np.arange(40, 54))["label"].tolist())


def test_records_are_numbered_through_and_classes_joined_by_name(both, built, other):
    parts = [ShardSet(built), ShardSet(other)]
    assert (len(both), len(parts[0]), len(parts[1])) == (54, 40, 14)
    assert both.classes == ["class0", "class1", "class2", "class3", "added", "zebra"]
    records = list(both)
    for number, record in enumerate(records):
        owner, inside = (0, number) if number < 40 else (1, number - 40)
        theirs = parts[owner][inside]
        label = both.classes.index(parts[owner].manifest.classes[theirs.label])
        assert record.equals(replace(theirs, label=label))
        path, row = both.locate(number)
        assert (path.parent, int(row["label"])) == ([built, other][owner], label)
    assert both.rows(np.array([45, 3]))["label"].tolist() == [records[45].label, records[3].label]
    for outside in (-1, 54):
        with pytest.raises(IndexError):
            both[outside]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("how", [{}, {"bank": True}, {"bank": True, "processes": True}])
def test_batches_are_the_plans_records_of_all_sets(both, how, joint):
    plan = Plan(54, 16, seed=3) if joint else both.plan(16, 3)
    wanted, bank = ["orb", "fast"], "bank" in how
    seen = np.zeros(54, int)
    for batch in copied(both.loader(plan, 1, 28, maps=wanted, workers=2, **how)):
        epochs, samples = plan.samples(batch.step)
        np.testing.assert_array_equal(batch.samples, samples)
        np.testing.assert_array_equal(batch.epochs, epochs)
        rows = both.rows(samples)
        boxes, flips = plan.boxes(epochs, samples, rows["height"], rows["width"])
        for place, number in enumerate(samples.tolist()):
            record = both[number]
            seen[number] += 1
            np.testing.assert_array_equal(batch.frames[place], decode_frame(record.frame))
            assert batch.labels[place] == record.label
            box, flip, maps, found = boxes[place], flips[place], record.maps, batch.maps
            if bank:
                count = len(record.bank.boxes)
                slot = plan.slots(epochs[[place]], samples[[place]], count)[0]
                box = record.bank.boxes[slot] / np.tile([record.height, record.width], 2)
                flip, found = record.bank.flips[slot], batch.counts
                maps = {name: counts[slot] for name, counts in record.bank.counts.items()}
            np.testing.assert_allclose(batch.boxes[place], box, rtol=1e-6)
            np.testing.assert_array_equal(batch.flips[place], flip)
            assert list(found) == wanted
            for name in wanted:
                np.testing.assert_array_equal(found[name][place], maps[name])
    assert seen.all()
    assert seen.sum() == 27 * 16
    if not joint:  # two in three are of the smaller set
        assert abs(seen[40:].sum() - 27 * 16 * 2 / 3) <= 2


def test_a_damaged_record_is_named_or_the_next_of_any_set_shown(both, built):
    path, row = both.locate(39)  # the last of the first set
    with path.open("r+b") as file:
        file.seek(int(row["frame"]) + 300)
        file.write(bytes(int(row["frame_bytes"]) - 300))
    plan = both.plan(18, 1)
    with pytest.raises(ValueError, match=r"shard-000009.tar: record 000000039 has a frame"):
        list(both.loader(plan, 0, 9))
    loader = both.loader(plan, 0, 9, skip=True, maps=["fast"], bank=True)
    for batch in copied(loader):
        for place, number in enumerate(plan.samples(batch.step)[1].tolist()):
            shown = 40 if number == 39 else number  # which is in FFCV
            assert (batch.samples[place], batch.labels[place]) == (shown, both[shown].label)
            np.testing.assert_array_equal(batch.frames[place], decode_frame(both[shown].frame))
            counts = both[shown].bank.counts["fast"]
            slot = plan.slots(batch.epochs[[place]], np.array([shown]), len(counts))[0]
            np.testing.assert_array_equal(batch.counts["fast"][place], counts[slot])
    assert loader.damaged == {39}


def test_a_set_without_names_keeps_its_numbers(built, tmp_path, small_source):

    records = ShardSet(built)
    write(built, replace(records.manifest, classes=[]))
    other = build(small_source / "class3", tmp_path / "flat")
    both = shards.open([other, built])
    assert both.rows(np.arange(len(both)))["label"].tolist() == [
        *[record.label for record in ShardSet(other)],
        *[record.label for record in records],
    ]


def test_one_set_is_itself_and_its_plan_is_as_it_was(built):
    records = shards.open([built])
    assert isinstance(records, ShardSet)
    for a, b in zip(records.plan(8, 5).samples(9), Plan(40, 8, 5).samples(9), strict=True):
        np.testing.assert_array_equal(a, b)
    assert records.plan(8, 5, window=3).windows.limit == 3
    assert records.plan(8, 5, window=10).windows is None


def test_what_cannot_be_mixed_is_one_line(built, other, small_source, tmp_path):
    small = build(small_source, tmp_path / "small", frame=64)
    with pytest.raises(ValueError, match=r"has frames of 120 px, .*small of 64: .* with --frame"):
        shards.open([built, small])
    bare = build(small_source, tmp_path / "bare", ("sift",), bank=0, grid=20)
    both = shards.open([built, bare])
    plan = both.plan(8)
    with pytest.raises(ValueError, match=r"bare has no maps of 'fast', only of sift; add them"):
        both.loader(plan, maps=["fast"])
    with pytest.raises(ValueError, match=r"bare has no bank; add one"):
        both.loader(plan, bank=True)
    assert both.loader(plan) is not None
    coarse = build(small_source, tmp_path / "coarse", grid=20)
    with pytest.raises(ValueError, match=r"has maps of 16 cells a side, .*coarse of 20"):
        shards.open([built, coarse]).loader(plan, maps=["fast"])
    crops = build(small_source, tmp_path / "crops", crop=64)
    with pytest.raises(ValueError, match=r"has crops of the bank of 96 px, .*crops of 64"):
        shards.open([built, crops]).loader(plan, bank=True)
    assert shards.open([built, crops]).loader(plan, maps=["fast"]) is not None
    maps = tmp_path / "maps"
    build_shards(open_source(str(small_source)), maps, settings(frame=0, quality=0), 1)
    with pytest.raises(ValueError, match="maps holds densities without frames"):
        shards.open([built, maps])
    with pytest.raises(ValueError, match="1 shares for 2 sets: give each one, or none"):
        shards.open([built, other], shares=[1])
    for cache in (None, tmp_path):
        with pytest.raises(ValueError, match="no set is named"):
            shards.open([], cache=cache)
    with pytest.raises(ValueError, match=r"the plan mixes sets of \[14, 40\] samples, not these"):
        shards.open([built, other]).loader(shards.open([other, built]).plan(8))
    with pytest.raises(ValueError, match="a cache is for shards at a URL"):
        shards.open([built, other], cache=tmp_path)


def test_a_plan_of_several_sets_travels_to_a_process_that_is_spawned(both):
    import pickle

    plan = both.plan(8, 3, window=2)
    again = pickle.loads(pickle.dumps(plan))
    np.testing.assert_array_equal(again.samples(33), plan.samples(33))


def test_sets_are_mixed_without_torch(built, other):
    code = (
        "import sys, shards; records = shards.open(sys.argv[1:]); "
        "print(sum(len(b.samples) for b in records.loader(records.plan(6)))); "
        "assert 'torch' not in sys.modules and 'ffcv' not in sys.modules"
    )
    words = [sys.executable, "-c", code, str(built), str(other)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("54\n", 0), done.stderr
