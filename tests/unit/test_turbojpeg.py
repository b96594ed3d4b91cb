"""JPEG frames read and decoded by one compiled call are those of simplejpeg, damage included."""

import ctypes
import socket
import struct
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import test_vectored
from hypothesis import given
from hypothesis import strategies as st
from test_vectored import check_others, check_words, cut

import shards.loader
from shards import ShardSet, turbojpeg
from shards.beton import convert_to_ffcv
from shards.loader import Loader
from shards.order import Plan

pytest.importorskip("numba")
if turbojpeg.library() is None:
    pytest.skip("needs libturbojpeg", allow_module_level=True)


SAMPLINGS = ["444", "422", "420", "440", "Gray"]


@pytest.fixture(autouse=True)
def short_runs_too(monkeypatch):
    monkeypatch.setattr(shards.loader, "LONG", 0)


def both(**asked):
    """As test_vectored's, of the call that also decodes."""
    assert turbojpeg.compiled()  # which compares with simplejpeg
    single = simplejpeg, "decode_jpeg"
    return test_vectored.both(name="compiled_decoder", single=single, **asked)


@pytest.mark.parametrize("maps", [[], ["fast"], ["orb"], ["orb", "fast"]])
def test_batches_are_those_of_simplejpeg(built, maps):
    records = ShardSet(built)
    asked = {"records": records, "plan": Plan(40, 12, seed=3), "first": 1, "last": 9, "maps": maps}
    np.testing.assert_equal(*both(**asked))


def test_of_a_beton_with_a_bank_too(built, tmp_path):
    convert_to_ffcv(built, tmp_path / "beton")
    records = ShardSet(tmp_path / "beton")
    asked = {"records": records, "plan": Plan(40, 8), "first": 0, "last": 5, "bank": True}
    np.testing.assert_equal(*both(**asked, maps=records.manifest.detectors))


def test_metadata_are_parsed_and_files_not_decoded_record_by_record(built):
    records = ShardSet(built)
    asked = {"bank": True, "maps": ["fast"]}, {"coded": True}
    assert not any(Loader(records, Plan(40, 8), 0, 1, **each).readers[0].at_once for each in asked)


@given(st.data())
def test_pixels_are_those_of_simplejpeg(data):
    side, seed = data.draw(st.integers(1, 80)), data.draw(st.integers(0, 999))
    quality, sampling = data.draw(st.integers(1, 100)), data.draw(st.sampled_from(SAMPLINGS))
    space, colours = ("GRAY", 1) if sampling == "Gray" else ("RGB", 3)
    image = np.random.default_rng(seed).integers(0, 256, (side, side, colours), dtype=np.uint8)
    jpeg = simplejpeg.encode_jpeg(image, quality, space, sampling)
    source, pixels = np.frombuffer(jpeg, np.uint8), np.zeros((side, side, 3), np.uint8)
    decode = turbojpeg.decoder(turbojpeg.library())
    asked = source.ctypes.data, len(jpeg), pixels.ctypes.data
    assert decode(*asked, side) == 0
    np.testing.assert_array_equal(pixels, simplejpeg.decode_jpeg(jpeg, "RGB"))
    before = pixels.copy()
    assert decode(*asked, side + 1) != 0  # not scaled, and nothing is written
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(("height", "width"), [(64, 32), (32, 64), (64, 128), (128, 64)])
def test_a_jpeg_that_is_not_square_is_none(height, width):
    image = np.full((height, width, 3), 200, np.uint8)
    source = np.frombuffer(simplejpeg.encode_jpeg(image), np.uint8)
    pixels, decode = np.zeros((64, 64, 3), np.uint8), turbojpeg.decoder(turbojpeg.library())
    assert decode(source.ctypes.data, len(source), pixels.ctypes.data, 64) != 0
    assert not pixels.any()


@pytest.mark.parametrize("broken", ["", "tjDecompressHeader3", "tjDecompress2"])
def test_each_handle_is_destroyed(broken):
    alive = []
    spies = SimpleNamespace(
        tjInitDecompress=lambda: alive.append(7) or 7,
        tjDestroy=alive.remove,
        tjDecompressHeader3=lambda *_: broken == "tjDecompressHeader3",
        tjDecompress2=lambda *_: broken == "tjDecompress2",
    )
    assert turbojpeg.decoder(spies)(1, 2, 3, 0) == bool(broken)
    assert not alive


def test_no_more_is_decoded_than_was_read():
    read, zero = turbojpeg.without_lock(lambda jpeg, size, pixels, side: 1), np.zeros(1, np.int64)
    memory, counts = np.zeros(8, np.uint8), np.zeros(1, np.int64)
    vectors = np.array([[[memory.ctypes.data, 8]]])
    with open("/dev/zero", "rb") as file:
        for size, expected in ((8, turbojpeg.UNDECODED), (9, 8)):
            read(8, zero + file.fileno(), zero, vectors, counts, zero + size, zero + 8, zero)
            assert counts[0] == expected


def test_a_short_run_does_not_wait_for_a_compiler(built, monkeypatch):
    monkeypatch.setattr(shards.loader, "LONG", 40)
    records, plan, micro = ShardSet(built), Plan(40, 8), Plan(40, 8, micro_steps=2)
    runs = (plan, 4, {}), (plan, 5, {}), (micro, 4, {}), (micro, 5, {}), (plan, 5, {"ranks": 2})
    made = [Loader(records, each, 0, last, **how) for each, last, how in runs]
    assert [each.readers[0].at_once for each in made] == [False, True, False, True, False]


def overwrite(path, at, content):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def zero_the_head(path, row):
    overwrite(path, int(row["frame"]), b"\0" * 8)


def zero_the_end(path, row):
    overwrite(path, int(row["frame"] + row["frame_bytes"]) - 40, b"\0" * 40)


def say_another_side(path, row):
    begin, size = int(row["frame"]), int(row["frame_bytes"])
    at = path.read_bytes()[begin : begin + size].index(b"\xff\xc0")
    overwrite(path, begin + at + 5, b"\0\x10\0\x10")


def name_another_table(path, row):
    """So that the first table of quantization is none, or that of the JPEG decoded before."""
    begin, size = int(row["frame"]), int(row["frame_bytes"])
    at = path.read_bytes()[begin : begin + size].index(b"\xff\xdb")
    overwrite(path, begin + at + 4, b"\2")


@pytest.mark.parametrize(
    "damage", [zero_the_head, zero_the_end, say_another_side, name_another_table, cut]
)
@pytest.mark.parametrize("maps", [[], ["fast"]])
def test_damage_is_told_and_skipped_as_by_simplejpeg(built, damage, maps):
    records = ShardSet(built)
    damage(*records.locate(39))
    asked = {"records": records, "plan": Plan(40, 40), "first": 0, "last": 1, "maps": maps}
    check_words(asked, "compiled_decoder")
    np.testing.assert_equal(*both(again=True, **asked, skip=True))


@pytest.mark.parametrize(
    ("field", "value"), [("arrays", 0), ("frame_bytes", 1 << 20), ("frame_bytes", 9)]
)
def test_an_index_that_says_what_cannot_be_writes_nowhere_else(built, field, value):
    check_others(ShardSet(built), field, value)


def test_the_lock_is_free_meanwhile():
    """The thread waits, in the call, for what only another thread can send."""
    receive = ctypes.CDLL(None).recv
    receive.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int]
    receive.restype = ctypes.c_ssize_t
    here, there = socket.socketpair()
    there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 60, 0))

    def receive_one(jpeg, size, pixels, side):
        return 0 if receive(side, pixels, 1, 0) == 1 else 1

    read, zero, counts = turbojpeg.without_lock(receive_one), np.zeros(1, np.int64), np.array([-7])
    byte, vectors = np.zeros(1, np.uint8), np.zeros((1, 1, 2), np.int64)
    with here, there, open("/dev/zero", "rb") as file:
        asked = zero + file.fileno(), zero, vectors, counts, zero, zero, zero + byte.ctypes.data
        thread = threading.Thread(target=read, args=(there.fileno(), *asked))
        thread.start()
        time.sleep(0.05)  # until it is in the call
        here.send(b"x")
        thread.join()
    assert counts[0] == 0
    assert byte.tobytes() == b"x"


@pytest.fixture
def fresh():
    """What was found out about this machine is found out again, now and after the test."""
    for each in (turbojpeg.library, turbojpeg.compiled):
        each.cache_clear()
    yield
    for each in (turbojpeg.library, turbojpeg.compiled):
        each.cache_clear()


@pytest.mark.parametrize("error", [ImportError, SystemError, AttributeError, OSError])
def test_without_numba_or_with_a_broken_one_there_is_none(monkeypatch, error, fresh):
    class Broken:
        def __getattr__(self, name):
            raise error("initialization of _internal failed")

    monkeypatch.setitem(sys.modules, "numba", Broken())
    assert turbojpeg.compiled() is None


def missing(name):
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize("load", [missing, lambda name: SimpleNamespace()])
def test_without_libturbojpeg_or_with_an_old_one_there_is_none(monkeypatch, load, fresh):
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert turbojpeg.compiled() is None


def test_a_libturbojpeg_of_other_pixels_is_not_used(monkeypatch, fresh):
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *each: decode(*each) ^ 1)
    assert turbojpeg.compiled() is None
