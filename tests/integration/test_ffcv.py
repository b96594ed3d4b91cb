"""FFCV sets through FFCV: the same batches, nothing left hanging, nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from conftest import contents, copied, errors, settings
from typed import kamim

import preprocess
from preprocess import build_shards, open_source
from shards import ShardSet, load
from shards import beton as layout
from shards.beton import convert_to_ffcv
from shards.loader import Loader
from shards.order import Plan

ffcv = pytest.importorskip("ffcv", reason="FFCV is not installed: make ffcv")
torch = pytest.importorskip("torch")
from shards.ffcv_loader import FfcvLoader


def test_our_layout_is_ffcvs_own(converted):
    from ffcv import types
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.reader import Reader

    pairs = [(layout.HEADER, types.HeaderType), (layout.DESCRIPTOR, types.FieldDescType)]
    for ours, theirs in [*pairs, (layout.REGION, types.ALLOC_TABLE_TYPE)]:
        assert ours.itemsize == theirs.itemsize
        assert [ours.fields[n][1] for n in ours.names] == [
            theirs.fields[n][1] for n in theirs.names
        ]
    shapes = [("u1", (16, 16))] * 2 + [("u1", (2, 12, 12))] * 2 + [("<i4", (2, 4)), ("u1", (2, 2))]
    arrays = [NDArrayField(np.dtype(dtype), shape) for dtype, shape in shapes]
    handlers = [RGBImageField(), *arrays, *[IntField() for _ in range(4)]]
    chosen = load(converted).settings
    ours, bare = layout.beton_format(chosen), layout.beton_format(replace(chosen, bank=0))
    for kept, mine in ((handlers, ours), (handlers[:3] + handlers[7:], bare)):
        row = types.get_metadata_type(kept)
        assert row.itemsize == mine.row.itemsize
        assert [row.fields[n][1] for n in row.names] == [
            mine.row.fields[n][1] for n in mine.row.names
        ]
    reader = Reader(str(converted / layout.BETON))
    assert reader.field_names == [
        "frame",
        "fast.density",
        "orb.density",
        "fast.counts",
        "orb.counts",
        "bank.boxes",
        "bank.flips",
        "label",
        "index",
        "height",
        "width",
    ]
    assert reader.handlers["orb.density"].shape == (16, 16)
    descriptors = reader.field_descriptors["arguments"]
    for handler, arguments in zip(handlers, descriptors, strict=True):
        assert handler.to_binary()[0].tobytes() == arguments.tobytes()


WANTED = [["fast", "orb"], *(pytest.param(few, marks=pytest.mark.slow) for few in (["orb"], []))]


@pytest.mark.parametrize("wanted", WANTED)
def test_the_same_batches_as_from_webdataset(built, converted, wanted):
    source, copy = ShardSet(built), ShardSet(converted)
    plan = Plan(40, 12, seed=3, micro_steps=2)
    ours = copied(Loader(source, plan, 2, 12, maps=wanted))
    theirs = copied(FfcvLoader(copy, plan, 2, 12, maps=wanted, workers=2))
    assert len(ours) == len(theirs) == 20
    for a, b in zip(ours, theirs, strict=True):
        assert a.step == b.step
        for field in ("labels", "samples", "epochs", "boxes", "flips"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        assert list(a.maps) == list(b.maps) == wanted
        for name in wanted:
            np.testing.assert_array_equal(a.maps[name], b.maps[name])
        for place, number in enumerate(a.samples.tolist()):
            expected = a.frames[place]
            if converted.name == "jpeg":  # FFCV decodes with the fast DCT: that, and no more
                frame = source[number].frame
                expected = simplejpeg.decode_jpeg(frame, "RGB", fastdct=True)
                difference = np.abs(expected.astype(int) - a.frames[place])
                assert difference.max() <= 16
            np.testing.assert_array_equal(b.frames[place], expected)


@pytest.mark.parametrize("wanted", WANTED)
def test_the_same_stored_crops_as_from_webdataset(built, converted, wanted):
    plan = Plan(40, 12, seed=3)
    options = {"maps": wanted, "bank": True}
    ours = copied(Loader(ShardSet(built), plan, 2, 12, **options))
    theirs = copied(FfcvLoader(ShardSet(converted), plan, 2, 12, **options, workers=2))
    for a, b in zip(ours, theirs, strict=True):
        for field in ("labels", "samples", "epochs", "boxes", "flips"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
        assert a.maps == b.maps == {}
        assert list(a.counts) == list(b.counts) == wanted
        for name in wanted:
            np.testing.assert_array_equal(a.counts[name], b.counts[name])


@pytest.mark.slow
def test_pretraining_gives_the_same_losses_where_the_frames_are_equal(small_source, tmp_path):
    from test_pretrain import run

    detectors = (preprocess.detector_settings("fast"),)
    chosen = settings(frame=120, detectors=detectors, crop=96, quality=0)
    build_shards(open_source(str(small_source)), tmp_path / "built", chosen, 1)
    convert_to_ffcv(tmp_path / "built", tmp_path / "ffcv", "raw")
    losses = run(tmp_path / "built", tmp_path / "a")
    assert run(tmp_path / "ffcv", tmp_path / "b") == losses
    run(tmp_path / "ffcv", tmp_path / "c", steps=7, resume=True)
    assert run(tmp_path / "ffcv", tmp_path / "c", resume=True) == losses


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_of_torch_is_the_users(threads, converted):
    """FFCV had set it to its own, in the middle of a step: a loss's last bits went with it."""
    before, found = torch.get_num_threads(), []
    try:
        torch.set_num_threads(threads)
        records = ShardSet(converted)
        loader = FfcvLoader(records, Plan(len(records), 8, 0), 0, 3, workers=2)
        seen = [torch.get_num_threads() for _ in loader]
        fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        fresh.start()  # it takes the number that any thread set last
        fresh.join()
        assert {*seen, *found} == {threads}
    finally:
        torch.set_num_threads(before)


def test_a_dead_pipeline_thread_is_noticed(built, tmp_path, monkeypatch):
    from ffcv.loader.epoch_iterator import EpochIterator

    convert_to_ffcv(built, tmp_path / "raw", "raw")
    real, calls = EpochIterator.run_pipeline, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) > 3:
            raise SystemExit  # silently ends the thread
        return real(self, *arguments)

    monkeypatch.setattr(EpochIterator, "run_pipeline", failing)
    with pytest.raises(ValueError, match="thread died"):
        list(FfcvLoader(ShardSet(tmp_path / "raw"), Plan(40, 8), 0, 50))


SCRIPT = """
import sys
from shards import ShardSet, load
from shards.ffcv_loader import FfcvLoader
from shards.order import Plan
records = ShardSet(sys.argv[1])
for batch in FfcvLoader(records, Plan(len(records), 8), 0, 10**9):
    if 3 <= batch.step < 23:
        print("running", flush=True)
        {then}
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupt", "terminate", "exception"])
def test_nothing_hangs_and_nothing_stays_in_shared_memory(how, built, tmp_path):
    convert_to_ffcv(built, tmp_path / "raw", "raw")
    before = {*os.listdir("/dev/shm")}  # what others leave there may have our number
    code = SCRIPT.format(then="raise RuntimeError('consumer')" if how == "exception" else "pass")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "raw")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "running\n"
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    mine = set(re.findall(r"/dev/shm/(\S+)", maps))
    for _ in range(19 if how != "exception" else 0):
        assert process.stdout.readline() == "running\n"
    if how == "interrupt":
        process.send_signal(signal.SIGINT)
    elif how == "terminate":
        process.terminate()
    assert process.wait(timeout=300) != 0
    # Tests beside this one put theirs there: it is held to what it had open, and what has its name.
    named = re.compile(rf"(?<!\d){process.pid}(?!\d)")
    # What was terminated cannot tidy up: Python's resource tracker does so a moment later.
    wait = time.monotonic() + 60
    while left := [n for n in {*os.listdir("/dev/shm")} - before if n in mine or named.search(n)]:
        assert time.monotonic() < wait, left
        time.sleep(0.1)


def test_a_truncated_beton_is_one_line(built, tmp_path, monkeypatch):
    convert_to_ffcv(built, tmp_path / "raw", "raw")
    path = tmp_path / "raw" / layout.BETON
    os.truncate(path, path.stat().st_size // 2)
    monkeypatch.chdir(tmp_path)
    done = kamim("pretrain", tmp_path / "raw", "--recipe", "small")
    assert done.returncode == 2
    assert errors(done) == 1
    assert "bytes, the manifest says" in done.stderr


def test_a_conversion_killed_at_any_moment_is_done_again(built, tmp_path):
    convert_to_ffcv(built, tmp_path / "calm", "raw")
    command = [sys.executable, "-m", "kamim", "shards", "convert", str(built), "--frames", "raw"]
    command += ["--out", str(tmp_path / "killed")]
    whole = sum(map(len, contents(tmp_path / "calm").values()))

    def written():
        with suppress(FileNotFoundError):  # a temporary file may be renamed meanwhile
            return sum(path.stat().st_size for path in (tmp_path / "killed").glob("*"))
        return 0

    for number in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and written() < number * whole / 6:
            time.sleep(0.001)
        process.kill()
        process.wait()
    (tmp_path / "killed").mkdir(exist_ok=True)
    for name in (layout.BETON, "index.npy.0123456789ab.tmp", "manifest.json.0123456789ab.tmp"):
        (tmp_path / "killed" / name).write_bytes(b"cut of")  # wherever a kill may fall
    (tmp_path / "killed" / "manifest.json").unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "40 records" in done.stdout
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")


def test_one_cv2_and_a_doctor_that_says_so():
    from kamim.doctor import examine

    rows = {part: (state, hint) for part, state, hint in examine()}
    assert rows["FFCV"][0] == "1.0.2"
    assert rows["OpenCV"][1] == ""
    assert rows["OpenCV"][0].endswith("(headless)")
