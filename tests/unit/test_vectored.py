"""Raw frames read by one compiled call are those that single reads give, damage included."""

import ctypes
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import copied, settings
from hypothesis import given
from hypothesis import strategies as st

import preprocess
import shards.loader
from shards import ShardSet, UserError, decode_frame, reading, vectored
from shards.beton import convert_to_ffcv
from shards.loader import Loader
from shards.order import Plan

pytest.importorskip("numba")


@pytest.fixture
def raw(small_source, tmp_path, build_once):
    detectors = tuple(preprocess.detector_settings(n) for n in ("fast", "sift"))
    chosen = settings(detectors=detectors, quality=0)
    return ShardSet(build_once(small_source, tmp_path / "shards", chosen))


def both(again=False, name="compiled", single=(os, "preadv"), **asked):
    """What `asked` gives by one call, and without numba. again: some records are read again.

    name: of the call, where it is looked up; single: what it stands in for, record by record.
    """
    with pytest.MonkeyPatch.context() as patched:
        if not again:
            patched.setattr(*single, None)
        compiled = [batch._asdict() for batch in copied(Loader(**asked))]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reading, name, lambda: None)
        return compiled, [batch._asdict() for batch in copied(Loader(**asked))]


def check_words(asked, name="compiled"):
    """By one call, and without numba, the damage of record 39 is told in the same words."""
    said = []
    for found in (getattr(reading, name), lambda: None):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(reading, name, found)
            with pytest.raises(UserError) as error:
                copied(Loader(**asked))
        said.append(str(error.value))
    assert said[0] == said[1]
    assert "record 000000039" in said[0]


def check_others(records, field, value):
    """If the index says `value` of record 11, that one is left out, and all others are sound."""
    records.index = np.array(records.index)
    records.index[field][11] = value
    loader = Loader(records, Plan(40, 40), 0, 1, maps=["fast"], skip=True)
    batch = next(iter(loader))
    assert loader.damaged == {11}
    for frame, number in zip(batch.frames, batch.samples.tolist(), strict=True):
        np.testing.assert_array_equal(frame, decode_frame(records[number].frame))


@pytest.mark.parametrize("maps", [[], ["fast"], ["sift"], ["sift", "fast"]])
def test_batches_are_those_of_single_reads(raw, maps):
    asked = {"records": raw, "plan": Plan(40, 12, seed=3), "first": 1, "last": 9, "maps": maps}
    compiled, single = both(**asked)
    np.testing.assert_equal(compiled, single)


def test_of_a_beton_with_a_bank_too(built, tmp_path):
    convert_to_ffcv(built, tmp_path / "raw", "raw")
    records = ShardSet(tmp_path / "raw")
    asked = {"records": records, "plan": Plan(40, 8), "first": 0, "last": 5, "bank": True}
    compiled, single = both(**asked, maps=records.manifest.detectors)
    np.testing.assert_equal(compiled, single)


def zero_the_shape(path, row):
    with path.open("r+b") as file:
        file.seek(int(row["frame"]))
        file.write(b"\0" * 8)


def cut(path, row):
    os.truncate(path, int(row["frame"]) + 100)


@pytest.mark.parametrize("damage", [zero_the_shape, cut])
@pytest.mark.parametrize("maps", [[], ["fast"]])
def test_damage_is_told_and_skipped_as_by_single_reads(raw, damage, maps):
    damage(*raw.locate(39))
    asked = {"records": raw, "plan": Plan(40, 40), "first": 0, "last": 1, "maps": maps}
    check_words(asked)
    compiled, single = both(again=True, **asked, skip=True)
    np.testing.assert_equal(compiled, single)


@pytest.mark.parametrize(("field", "value"), [("arrays", 0), ("frame_bytes", 1 << 20)])
def test_an_index_that_says_what_cannot_be_writes_nowhere_else(raw, field, value):
    check_others(raw, field, value)


@given(st.data())
def test_bytes_and_counts_are_those_of_preadv(data):
    content = np.arange(999, dtype=np.uint8).tobytes() * 2
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        lengths = data.draw(st.lists(st.integers(0, 90), min_size=1, max_size=5))
        starts = data.draw(st.lists(st.integers(0, 2100), min_size=1, max_size=6))
        memory = [[[bytearray(n) for n in lengths] for _ in starts] for _ in range(2)]
        vectors = [[vectored.vector(memoryview(part)) for part in parts] for parts in memory[0]]
        counts, descriptors = np.full(len(starts), -7), np.full(len(starts), file.fileno())
        vectored.compiled()(descriptors, np.array(starts), np.array(vectors), counts)
        expected = [
            os.preadv(file.fileno(), parts, start)
            for parts, start in zip(memory[1], starts, strict=True)
        ]
    assert counts.tolist() == expected
    assert memory[0] == memory[1]


def test_a_read_that_fails_is_told_by_python(raw, monkeypatch):
    """The compiled call knows that it failed, not why."""
    loader = Loader(raw, Plan(40, 8), 0, 1)
    reader = loader.readers[0]
    with Path("/proc/self/mem").open("rb") as file:  # reading its first byte is an error
        reader.open = lambda _: SimpleNamespace(descriptor=file.fileno())
        with pytest.raises(OSError, match="Input/output error"):
            reader.read(loader.buffers[0][0], np.array([[0, 0, 0, 1, 1]]))


def test_the_lock_is_free_meanwhile():
    """The thread waits, in the call, for what only another thread can say."""
    wait = ctypes.CDLL(None).usleep
    wait.argtypes, wait.restype = [ctypes.c_uint32], ctypes.c_int

    def until_told(descriptors, starts, vectors, counts):
        counts[2] = 1
        for _ in range(60_000):
            if counts[0]:
                counts[1] = 1
                break
            wait(1000)

    read = vectored.without_lock(until_told)
    empty, counts = np.zeros(0, np.int64), np.zeros(3, np.int64)
    thread = threading.Thread(target=read, args=(empty, empty, np.zeros((0, 0, 2), int), counts))
    thread.start()
    while not counts[2]:  # with the lock held, this would go on only after the call
        time.sleep(0.001)
    counts[0] = 1
    thread.join()
    assert counts[1]


@pytest.mark.parametrize("error", [ImportError, SystemError, AttributeError, OSError])
def test_without_numba_or_with_a_broken_one_there_is_none(monkeypatch, error):
    class Broken:
        def __getattr__(self, name):
            raise error("initialization of _internal failed")

    monkeypatch.setitem(sys.modules, "numba", Broken())
    assert vectored.without_lock(vectored.at_once) is None


def test_a_chunk_at_once_needs_no_more_shards_open_than_may_be(raw, monkeypatch):
    assert Loader(raw, Plan(40, 8), 0, 1).readers[0].at_once
    monkeypatch.setattr(shards.loader, "open_files", lambda count: count - 1)
    assert not Loader(raw, Plan(40, 8), 0, 1).readers[0].at_once


@pytest.mark.parametrize(
    ("batch", "workers", "expected"), [(32, 1, 32), (32, 6, 16), (40, 6, 20), (8, 2, 8)]
)
def test_small_batches_are_shared_out_over_the_workers(raw, batch, workers, expected):
    loader = Loader(raw, Plan(40, batch), 0, 1, workers=workers, prefetch=3)
    seen, read = [], loader.readers[0].read
    loader.readers[0].read = lambda buffers, places: (
        seen.append(len(places)) or read(buffers, places)
    )
    list(loader)
    assert max(seen) == expected
