"""The loader: the plan's records, whatever the threads; damage named; memory bounded."""

import gc
import json
import operator
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import copied, settings
from hypothesis import given
from hypothesis import strategies as st

import preprocess
import shards.loader
from preprocess import build_shards, open_source
from shards import ShardSet, decode_frame
from shards.loader import CHUNK, Loader, open_files
from shards.order import Plan
from shards.reading import NO_CROP, crop_of, finder
from shards.spec import to_json, write_file
from shards.tar import INDEX_DTYPE


@pytest.fixture
def records(small_source, tmp_path, build_once):
    detectors = tuple(preprocess.detector_settings(n) for n in ("fast", "orb", "sift"))
    chosen = settings(detectors=detectors, crop=96, bank=3)
    return ShardSet(build_once(small_source, tmp_path / "shards", chosen))


def test_a_shard_that_is_open_when_the_interpreter_ends_says_nothing(records):
    code = "import sys, shards; held = shards.open(sys.argv[1]).hold(0); sys.held = [held]"
    words = [sys.executable, "-c", code, str(records.folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_second_iterator_is_refused_while_there_is_a_first(records):
    loader = Loader(records, Plan(40, 8), 0, 5, workers=1)
    first = iter(loader)
    next(first)
    with pytest.raises(
        ValueError, match="is being iterated; close that iterator, or make a second"
    ):
        next(iter(loader))
    assert [batch.step for batch in first] == [1, 2, 3, 4]
    assert [batch.step for batch in loader] == [0, 1, 2, 3, 4]
    for _ in loader:
        break  # and it is closed
    assert next(iter(loader)).step == 0


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("wanted", [["fast", "orb", "sift"], ["sift"], ["sift", "fast"], []])
def test_batches_are_the_plans_records(records, workers, wanted):
    plan = Plan(40, 12, seed=3)
    loader = Loader(records, plan, 1, 9, maps=wanted, workers=workers)
    batches = copied(loader)
    assert [batch.step for batch in batches] == list(range(1, 9))
    for batch in batches:
        epochs, samples = plan.samples(batch.step)
        np.testing.assert_array_equal(batch.samples, samples)
        np.testing.assert_array_equal(batch.epochs, epochs)
        for place, number in enumerate(samples.tolist()):
            record = records[number]
            # Two builds of libjpeg-turbo; both decode exactly.
            np.testing.assert_array_equal(batch.frames[place], decode_frame(record.frame))
            assert list(batch.maps) == wanted
            for name in wanted:
                np.testing.assert_array_equal(batch.maps[name][place], record.maps[name])
            assert batch.labels[place] == record.label
        size = np.full(len(samples), 80), np.full(len(samples), 96)
        boxes, flips = plan.boxes(epochs, samples, *size)
        np.testing.assert_array_equal(batch.boxes, boxes)
        np.testing.assert_array_equal(batch.flips, flips)


@pytest.mark.parametrize("wanted", [["fast", "orb", "sift"], ["sift", "fast"], []])
def test_from_the_bank_come_its_crops_and_counts(records, wanted):
    plan = Plan(40, 12, seed=3)
    shown = np.zeros((40, 3), int)
    for batch in copied(Loader(records, plan, 0, 30, maps=wanted, bank=True)):
        slots = plan.slots(batch.epochs, batch.samples, 3)
        assert (batch.maps, list(batch.counts)) == ({}, wanted)
        for place, (number, slot) in enumerate(zip(batch.samples, slots, strict=True)):
            record = records[int(number)]
            for name in wanted:
                counts = record.bank.counts[name][slot]
                np.testing.assert_array_equal(batch.counts[name][place], counts)
            box = record.bank.boxes[slot] / np.tile([record.height, record.width], 2)
            np.testing.assert_allclose(batch.boxes[place], box, rtol=1e-6)
            np.testing.assert_array_equal(batch.flips[place], record.bank.flips[slot])
            shown[number, slot] += 1
    assert (shown == 3).all()  # nine epochs, each slot in turn


@pytest.mark.parametrize("bank", [False, True])
def test_processes_give_the_batches_of_threads(records, bank):
    plan, wanted = Plan(40, 12, seed=3, micro_steps=3), ["sift", "fast"]
    children = set(children_of(os.getpid()))
    threads = copied(records.loader(plan, 1, 9, maps=wanted, bank=bank))
    stream = records.loader(plan, 1, 9, maps=wanted, bank=bank, workers=3, processes=True)
    for one, other in zip(threads, stream, strict=True):
        np.testing.assert_equal(one._asdict(), other._asdict())
    assert not set(children_of(os.getpid())) - children
    for _ in records.loader(plan, 1, 900, workers=2, processes=True):
        assert len(set(children_of(os.getpid())) - children) == 2
        break  # the consumer leaves in the middle
    gc.collect()
    assert not set(children_of(os.getpid())) - children


def test_damage_is_told_across_processes(records):
    damage(records, 17, "frame", b"\0" * 60)
    damaged = ShardSet(records.folder)
    given = {"maps": ["fast"], "workers": 2, "processes": True}
    with pytest.raises(ValueError, match=r"record 000000017 has a frame that does not decode"):
        list(damaged.loader(Plan(40, 8), 0, 5, **given))
    loader = damaged.loader(Plan(40, 8), 0, 5, skip=True, **given)
    samples = np.concatenate([batch.samples.copy() for batch in loader])
    assert loader.damaged == {17}
    assert sorted(samples.tolist()) == sorted([*range(17), 18, *range(18, 40)])
    path, _ = records.locate(30)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        list(damaged.loader(Plan(40, 8), 0, 5, **given))


def test_a_process_that_is_killed_ends_the_loader(records):
    others = set(children_of(os.getpid()))  # of builds before, say
    with pytest.raises(ChildProcessError, match=r"a process of the loader ended \(status -9\)"):  # noqa: PT012
        for batch in records.loader(Plan(40, 8), 0, 10**6, workers=2, processes=True):
            if batch.step == 3:
                os.kill(max({*children_of(os.getpid())} - others), signal.SIGKILL)


def test_processes_end_with_a_loader_that_was_killed_and_not_by_ctrl_c(records):
    code = f"""if True:
        import os, shards
        records = shards.open({str(records.folder)!r})
        for batch in records.loader(shards.Plan(40, 8), 0, 10**9, workers=2, processes=True):
            if batch.step == 3:
                print("ready", flush=True)
    """
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert program.stdout.readline() == "ready\n"
    workers = children_of(program.pid)
    assert len(workers) == 2
    for each in workers:
        os.kill(each, signal.SIGINT)
    time.sleep(0.3)
    assert children_of(program.pid) == workers
    program.kill()
    program.wait()
    while any(Path(f"/proc/{each}").exists() for each in workers):
        time.sleep(0.05)


def children_of(process):
    """The processes that a process has started and that have not ended."""
    found = []
    for task in Path(f"/proc/{process}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return sorted(found)


def test_a_set_without_a_bank_says_how_to_add_one(small_source, tmp_path):
    build_shards(open_source(str(small_source)), tmp_path / "plain", settings(), 1)
    with pytest.raises(ValueError, match=r"has no bank; add one by .*--bank 4 --reuse"):
        Loader(ShardSet(tmp_path / "plain"), Plan(40, 8), 0, 1, bank=True)


@pytest.mark.parametrize("wanted", [["fast", "orb"], ["orb"], []])
def test_raw_frames(small_source, tmp_path, wanted):
    source = open_source(str(small_source))
    detectors = tuple(preprocess.detector_settings(n) for n in ("fast", "orb"))
    chosen = settings(quality=0, detectors=detectors, crop=64)
    build_shards(source, tmp_path / "raw", chosen, 1)
    records = ShardSet(tmp_path / "raw")
    (batch,) = copied(Loader(records, Plan(40, 40), 0, 1, maps=wanted))
    for place, number in enumerate(batch.samples.tolist()):
        record = records[number]
        np.testing.assert_array_equal(batch.frames[place], decode_frame(record.frame))
        for name in wanted:
            np.testing.assert_array_equal(batch.maps[name][place], record.maps[name])
    path, row = records.locate(int(batch.samples[3]))
    with path.open("r+b") as file:
        file.seek(int(row["frame"]))
        file.write(b"\0" * 8)
    with pytest.raises(ValueError, match="has a raw frame of another shape"):
        list(Loader(records, Plan(40, 40), 0, 1, maps=wanted))


@pytest.mark.parametrize("quality", [90, 0])
@pytest.mark.parametrize(("field", "value"), [("arrays", 0), ("frame_bytes", 1 << 20)])
def test_an_index_that_says_what_cannot_be_is_told(small_source, tmp_path, quality, field, value):
    """A frame that would end beyond its arrays or begin behind them is not read elsewhere."""
    chosen = settings(quality=quality)
    build_shards(open_source(str(small_source)), tmp_path / "set", chosen, 1)
    records = ShardSet(tmp_path / "set")
    records.index = np.array(records.index)
    records.index[field][11] = value
    names = records.manifest.detectors
    with pytest.raises(ValueError, match=r"record 000000011 (is cut short|has a raw frame)"):
        list(Loader(records, Plan(40, 40), 0, 1, maps=names))


@pytest.mark.parametrize("bank", [False, True])
def test_a_sample_costs_few_steps_of_the_interpreter(records, bank):
    """All threads share its lock, so what they do in it bounds how many are of use."""
    loader = Loader(records, Plan(40, 40), 0, 1, maps=["fast", "sift"], bank=bank)
    samples = np.arange(40)
    places = loader._places(0, samples, samples, records.index[samples])
    loader.readers[0].read(loader.buffers[0][0], places)  # opens the files
    calls = []
    for count in (8, 40):
        seen = []
        sys.setprofile(lambda frame, event, argument, seen=seen: seen.append(event))
        loader.readers[0].read(loader.buffers[0][0], places[:count])
        sys.setprofile(None)
        calls.append(sum(event.endswith("call") for event in seen))
    # preadv, decoding, and what simplejpeg asks of NumPy
    assert calls[1] - calls[0] <= 8 * 32


@pytest.mark.parametrize(
    ("limits", "shards", "expected", "raised"),
    [
        ((1024, 4096), 100, 100, None),
        ((1024, 1 << 20), 1281, 1281, (4 * 1281 + 256, 1 << 20)),
        ((1024, 4096), 1281, 1024, (4096, 4096)),
        ((1024, resource.RLIM_INFINITY), 1281, 1281, (4 * 1281 + 256, resource.RLIM_INFINITY)),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 9999, 9999, None),
        ((512, 512), 1281, 256, None),
    ],
)
def test_all_shards_stay_open_where_they_may(monkeypatch, limits, shards, expected, raised):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: asked.append(both))
    assert open_files(shards) == expected
    assert asked == ([raised] if raised else [])


def test_ranks_and_micro_steps_share_out_the_same_step(records):
    whole = copied(Loader(records, Plan(40, 24), 0, 4, maps=["orb"]))
    plan = Plan(40, 24, micro_steps=3)
    parts = [
        copied(Loader(records, plan, 0, 4, maps=["orb"], rank=rank, ranks=2)) for rank in range(2)
    ]
    for step, batch in enumerate(whole):
        pieces = [parts[rank][step * 3 + micro] for micro in range(3) for rank in range(2)]
        for field in ("frames", "labels", "samples", "boxes", "flips"):
            joined = np.concatenate([getattr(piece, field) for piece in pieces])
            np.testing.assert_array_equal(joined, getattr(batch, field))
        maps = np.concatenate([piece.maps["orb"] for piece in pieces])
        np.testing.assert_array_equal(maps, batch.maps["orb"])


def test_starting_late_is_starting_there(records):
    plan = Plan(40, 8, seed=2)
    late = copied(Loader(records, plan, 7, 9, maps=["sift"]))
    for a, b in zip(copied(Loader(records, plan, 0, 9, maps=["sift"]))[7:], late, strict=True):
        np.testing.assert_equal(a._asdict(), b._asdict())


def test_no_thread_or_file_is_left_behind(records):
    gc.collect()
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in Loader(records, Plan(40, 8), 0, 50, workers=3):
        break  # the consumer leaves in the middle
    with pytest.raises(RuntimeError, match="consumer"):  # noqa: PT012
        for _ in Loader(records, Plan(40, 8), 0, 50, workers=3):
            raise RuntimeError("consumer")
    gc.collect()
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.parametrize("what", ["planned", "Reader.read"])
def test_a_loader_that_is_left_waits_for_what_is_begun_and_begins_no_more(
    what, records, monkeypatch
):
    """Of planning and of reading: it is held in the second batch while four are asked for."""
    begun, entered, release, left = [], threading.Event(), threading.Event(), threading.Event()
    real = operator.attrgetter(what)(shards.loader)

    def slow(*arguments):
        begun.append(arguments)
        if len(begun) == 2:
            entered.set()
            release.wait(60)
        return real(*arguments)

    def leave():
        for _ in Loader(records, Plan(40, CHUNK), 0, 5, workers=1):
            entered.wait(60)
            break
        left.set()

    monkeypatch.setattr(f"shards.loader.{what}", slow)
    leaving = threading.Thread(target=leave)
    leaving.start()
    assert entered.wait(60)
    assert not left.wait(0.3)
    release.set()
    leaving.join(60)
    assert left.is_set()
    assert len(begun) == 2


def test_memory_is_the_prefetch_whatever_the_length(records):
    batch_bytes = 20 * (64 * 64 * 3 + 16 * 16 * 3 + 3 * 128)  # frames, maps, their headers
    peaks = []
    for steps in (600, 1500):  # either is more than the plan looks ahead
        names = records.manifest.detectors
        loader = Loader(records, Plan(40, 20), 0, steps, maps=names, workers=2, prefetch=3)
        tracemalloc.start()
        assert sum(len(batch.frames) for batch in loader) == steps * 20
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        held = sum(
            sum(a.nbytes for a in (b.frames, b.heads, *b.maps.values(), *b.counts.values()))
            for (b,) in loader.buffers
        )
        assert held == 4 * batch_bytes
    assert peaks[1] < peaks[0] + 100_000
    assert max(peaks) < 2 * 3 * batch_bytes


def damage(records, number, place, data):
    """Overwrite bytes of a record and sign the set again, so that only decoding can tell."""
    path, row = records.locate(number)
    content = bytearray(path.read_bytes())
    at = int(row["arrays"]) + 512 if place == "arrays" else int(row[place])
    content[at : at + len(data)] = data
    file = write_file(path, bytes(content), 4)
    shards = [file if s.name == file.name else s for s in records.manifest.shards]
    (records.folder / "manifest.json").write_bytes(
        to_json(replace(records.manifest, shards=shards))
    )
    return path.name


@pytest.mark.parametrize("place", ["frame", "arrays"])
def test_a_damaged_record_is_named_or_skipped_and_counted(records, place):
    name = damage(records, 17, place, b"\0" * 60)
    damaged = ShardSet(records.folder)
    with pytest.raises(ValueError, match=rf"{name}: record 000000017 has .*--on-error skip"):
        list(Loader(damaged, Plan(40, 8), 0, 5, maps=["fast"]))
    loader = Loader(damaged, Plan(40, 8), 0, 5, maps=["fast"], skip=True)
    samples = np.concatenate([batch.samples.copy() for batch in loader])
    assert loader.damaged == {17}
    assert sorted(samples.tolist()) == sorted([*range(17), 18, *range(18, 40)])


def test_a_single_sound_record_stands_for_all_and_none_is_an_error(records):
    for number in range(40):
        if number != 21:
            damage(records, number, "frame", b"\0" * 60)
    loader = Loader(ShardSet(records.folder), Plan(40, 8), 0, 5, skip=True)
    assert {sample for batch in loader for sample in batch.samples.tolist()} == {21}
    assert loader.damaged == {*range(40)} - {21}
    damage(records, 21, "frame", b"\0" * 60)
    with pytest.raises(ValueError, match="has a frame that does not decode"):
        list(Loader(ShardSet(records.folder), Plan(40, 8), 0, 5, skip=True))


def test_a_shard_that_shrinks_while_training_is_named(records):
    path, _ = records.locate(30)
    with pytest.raises(ValueError, match=rf"{path.name}: record .* is cut short"):  # noqa: PT012
        for batch in Loader(records, Plan(40, 8), 0, 5000):
            if batch.step == 3:
                os.truncate(path, 600)


def test_what_does_not_fit_is_refused_before_the_first_batch(records):
    with pytest.raises(ValueError, match=r"no maps of 'surf', only of fast, orb, sift"):
        Loader(records, Plan(40, 8), 0, 1, maps=["surf"])
    with pytest.raises(ValueError, match="the plan is for 41 samples, the set has 40"):
        Loader(records, Plan(41, 8), 0, 1)
    for prefetch in (0, -1):  # no batch would come, and nobody would know
        with pytest.raises(ValueError, match=f"prefetch {prefetch} is out of range; give 1"):
            records.loader(Plan(40, 8), prefetch=prefetch)


def test_a_manifest_of_imagenets_size_opens_in_a_moment(tmp_path, records):
    """1,281 shards of 1,000 records: open, plan and give the first indices; a subprocess's peak."""
    from shards.record import npy_bytes

    index = np.zeros(1_281_000, INDEX_DTYPE)
    index["key"] = np.arange(len(index))
    index["height"], index["width"], index["bytes"] = 375, 500, 1 << 16
    folder = tmp_path / "large"
    folder.mkdir()
    shard = replace(records.manifest.shards[0], count=1000, bytes=1 << 16)
    shards = [replace(shard, name=f"shard-{n:06d}.tar") for n in range(1281)]
    for file in shards:
        (folder / file.name).touch()
        os.truncate(folder / file.name, 1 << 16)
    ledger = replace(records.manifest.ledger, inputs=len(index), written=len(index))
    manifest = replace(
        records.manifest,
        shards=shards,
        ledger=ledger,
        index=write_file(folder / "index.npy", npy_bytes(index), len(index)),
    )
    (folder / "manifest.json").write_bytes(to_json(manifest))
    code = f"""if True:
        import time
        import numpy, shards
        from shards.order import Plan
        begin = time.process_time()
        records = shards.ShardSet({str(folder)!r})
        plan = Plan(len(records), 2048)
        epochs, samples = plan.samples(600)
        rows = records.index[samples]
        plan.boxes(epochs, samples, rows["height"], rows["width"])
        seconds = time.process_time() - begin
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(seconds, status["VmHWM"].split()[0])  # this program's own peak, in kB
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 2
    assert kilobytes < 300_000


NUMBERS = st.integers(0, 10**9 - 1)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.text(max_size=20),
    st.sampled_from([(",", ":"), (", ", ": ")]),
    st.booleans(),
)
def test_a_crop_of_the_bank_is_read_as_json_is(boxes, turns, source, separators, in_order):
    flips = [[turn & 1, turn >> 1] for turn in turns[: len(boxes)]]
    meta = {"height": 3, "boxes": boxes, "flips": flips, "source": f'"flips":[[1,1]]{source}'}
    text = json.dumps(meta, sort_keys=in_order, separators=separators).encode("ascii")
    for slot, box in enumerate(boxes):
        block = memoryview(text + bytes(512 - len(text) % 512))
        crop = b"%d,%d,%d,%d,%d,%d" % (*box, *flips[slot])
        assert crop_of(block, slot) == crop
        found = finder(slot)(block)
        plain = in_order and separators == (",", ":")
        assert (found is not None) == plain
        assert not found or b",".join(found.groups()) == crop


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\0" * 512,
        b"\xff" * 512,
        b'{"boxes":[[1,2,3,4]],"flips":[[0,1]',
        b'{"boxes":[[1,2,3]],"flips":[[0,1]]}',
        b'{"boxes":[[1,2,3,4]],"flips":[[0,1]]}',  # no crop 1
        b'{"boxes":[[1,2,3,4],[1,2,3,"4"]],"flips":[[0,1],[0,1]]}',
        b'{"boxes":[[1,2,3,4],[1,2,3,%d]],"flips":[[0,1],[0,1]]}' % 10**400,
        b'{"boxes":[0,0],"flips":[[0,1],[0,1]]}',
        b'{"flips":[[0,1],[0,1]]}',
        b"[" * 100_000,
    ],
)
def test_a_bank_that_is_none_is_told(text):
    assert finder(1)(memoryview(text)) is None
    with pytest.raises(NO_CROP):
        crop_of(memoryview(text), 1)
