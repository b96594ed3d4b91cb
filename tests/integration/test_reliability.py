"""What kills, damage and hostile input once broke, each in small; and the page of their figures."""

import errno
import fcntl
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
import simplejpeg
from conftest import REPOSITORY, settings
from mutants import table
from stress.broken import KINDS
from stress.cases import PAGE, RESULTS, SECTIONS, Case, renewed
from stress.forked import spawn
from stress.source_targets import parquet_of
from stress.watch import spawn_watched

import kamim.__main__
import preprocess.building
import preprocess.files
from preprocess import Rejected, build_shards, decode_image, open_source
from preprocess.densities import LONGEST, map_views
from preprocess.source import Entry, Source
from shards import ShardSet, decode_frame, load, spec
from shards.beton import convert_to_ffcv
from shards.files import LEFT, LOCK, alone, temporary_of
from shards.loader import Loader
from shards.order import Plan
from shards.record import npy_bytes
from shards.spec import INDEX
from shards.verification import damaged_files, verify_shards


def test_the_page_is_rendered_from_the_results_and_nothing_is_lost():
    results = json.loads(RESULTS.read_text())
    assert renewed(PAGE.read_text(), results) == PAGE.read_text()
    assert set(results) <= set(SECTIONS)  # the page says which were not run
    rows = [row for facts in results.values() for row in facts["rows"]]
    assert all(row["tried"] == row["survived"] + row["lost"] for row in rows)
    assert sum(row["lost"] for row in rows) == 0
    assert min(row["tried"] for row in rows) > 0  # or a case was not run where this was measured


def test_the_table_of_mutants_is_rendered_from_their_rows_and_few_survive():
    assert table.renewed(table.PAGE.read_text()) == table.PAGE.read_text()
    counts = table.by_module(table.found())
    assert len(counts) == 17
    assert table.share(sum(counts.values(), Counter())) >= 0.92


def test_a_loss_is_counted():
    case = Case("section", "name")
    assert case.trial("")
    assert not case.trial("it broke")
    assert (case.tried, case.survived, case.lost) == (2, 1, 1)
    assert case.row()["losses"] == ["it broke"]


def test_a_watched_process_cannot_hide_what_it_does(tmp_path):
    secret, out = tmp_path / "secret", tmp_path / "out"
    secret.write_text("s")
    out.mkdir()

    def deeds() -> None:
        (out / "mine").write_text("allowed")
        (tmp_path / "theirs").write_text("not")
        secret.read_text()
        os.rename(out / "mine", tmp_path / "moved")
        os.system("true")

    process = spawn_watched(
        deeds, log=tmp_path / "x.log", secret=secret, allowed=[out, tmp_path / "x.log"]
    )
    assert process.wait(300) == 0, process.text()
    noted = (tmp_path / "x.deeds").read_text().splitlines()
    assert [line.split(" ")[0] for line in noted] == ["open", "the", "os.rename", "os.system"]


def test_a_hung_process_ends_with_its_group_and_a_status_is_told(tmp_path):
    process = spawn(time.sleep, 60, log=tmp_path / "hung.log")
    assert process.wait(0.1) is None
    assert process.status == 128 + 9
    assert spawn(sys.exit, 3, log=tmp_path / "three.log").wait(300) == 3
    assert spawn(int, "x", log=tmp_path / "raised.log").wait(300) == 70


@pytest.mark.slow
def test_a_section_runs_and_writes_its_rows(tmp_path):
    path = tmp_path / "results.json"
    line = [sys.executable, "-m", "pytest", "-s", "-m", "stress", "-k", "damage", "tests/stress"]
    line += ["--scale", "0.01", "--results", str(path), "-p", "no:cacheprovider"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout
    facts = json.loads(path.read_text())["damage"]
    assert {"python", "commit", "date"} <= set(facts["provenance"])
    assert all(row["case"] in done.stdout for row in facts["rows"])


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_images_follow_from_the_seed(kind, photos):
    if kind == "bombs":
        pytest.skip("takes seconds to pack")
    data = [path.read_bytes() for path in photos[:3]]
    make = KINDS[kind][0]
    assert make(random.Random(3), data) == make(random.Random(3), data)


@pytest.mark.parametrize("size", [(65_500, 1), (1, 65_500), (10_000, 1)])
def test_a_view_of_a_thread_of_an_image_stays_small(size):
    """It had been 12 million px long: minutes, then no memory."""
    chosen = settings(crop=192)
    whole = map_views(0, size, chosen)[0]
    assert max(whole.rows, whole.columns) == LONGEST * 192
    assert map_views(0, (300, 400), chosen)[0].columns < 300


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ESTALE])
def test_a_machine_at_fault_is_not_blamed_on_the_images(number, tmp_path, monkeypatch):
    """All inputs had been rejected for good once file descriptors ran out."""

    def failing(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(preprocess.files.os, "open", failing)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        Source("folder", str(tmp_path), [], []).read(Entry("a.jpg", 0, 1))


def test_a_lock_left_behind_a_finished_conversion_goes(built, tmp_path):
    """Killed in the moment between the manifest and the lock's end, it had stayed for good."""
    made = convert_to_ffcv(built, tmp_path / "ffcv")
    (tmp_path / "ffcv" / LOCK).touch()
    assert convert_to_ffcv(built, tmp_path / "ffcv") == made
    assert not (tmp_path / "ffcv" / LOCK).exists()


def test_a_lock_that_its_last_holder_removed_is_not_held(tmp_path, monkeypatch):
    """Opened before and taken after its removal, it had let two write at once."""
    lock, take = tmp_path / "lock", fcntl.flock

    def late(file, how) -> None:
        lock.unlink()
        take(file, how)

    monkeypatch.setattr("shards.files.fcntl.flock", late)
    with pytest.raises(ValueError, match="another process is writing"), alone(tmp_path, lock):
        pass


def test_a_parquet_of_damaged_facts_is_refused_by_name(tmp_path):
    """Arrow's error of damage is an OSError: it had been taken for the disk's."""
    pytest.importorskip("pyarrow")
    data = bytearray(parquet_of([b"x", b"y"]))
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[footer : footer + 8] = b"\xff" * 8
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"x.parquet is no whole Parquet file"):
        open_source(f"parquet:{tmp_path}/x.parquet")


def test_two_that_tidy_up_after_a_finished_build_do_not_trip_over_each_other(
    built, small_source, monkeypatch
):
    remove = shutil.rmtree

    def late(path, **how):
        remove(path)  # the other was first
        remove(path, **how)

    (built / ".build").mkdir()
    monkeypatch.setattr(preprocess.building.shutil, "rmtree", late)
    manifest = load(built)
    source = open_source(str(small_source))
    assert build_shards(source, built, manifest.settings, 1) == manifest
    assert not (built / ".build").exists()


def test_what_a_killed_process_left_goes_and_what_a_user_left_stays(tmp_path):
    theirs = ["draft.tmp", "a.tar.123.tmp", "notes.0123456789ab.txt"]
    for name in [*theirs, temporary_of(tmp_path / "a.tar").name]:
        (tmp_path / name).touch()
    with alone(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {*theirs, LOCK}
    assert {path.name for path in tmp_path.iterdir()} == set(theirs)


def test_tensors_are_written_under_a_name_that_is_known(tmp_path, monkeypatch):
    """The library's own way left a nameless file behind a kill, one for each."""
    torch = pytest.importorskip("torch")
    from train.export import write_tensors

    seen, sync = [], os.fsync

    def look(descriptor):
        seen.extend(path.name for path in tmp_path.iterdir())
        sync(descriptor)

    monkeypatch.setattr("shards.files.os.fsync", look)
    write_tensors({"a": torch.zeros(2)}, tmp_path / "y.safetensors", {})
    assert LEFT.sub("", seen[0]) == "y.safetensors" != seen[0]


def test_two_evaluations_into_one_folder_are_refused(built, tmp_path):
    """Their checkpoints and metrics had become a mixture."""
    pytest.importorskip("torch")
    from kamim.evaluate import cli as commands

    encoder, out = "random:small", tmp_path / "out"
    with alone(out):
        for work in (
            lambda: commands.probe(encoder, built, built, out=out),
            lambda: commands.finetune(encoder, built, built, out=out),
            lambda: commands.analyse([encoder, str(built)], out),
        ):
            with pytest.raises(ValueError, match=r"another process is writing into .*out; wait"):
                work()
    assert not list(out.iterdir())


def test_a_thread_that_fails_is_a_line(capsys, monkeypatch):
    """TensorBoard's had printed a trace before the one line of the command that it served."""
    monkeypatch.setattr(threading, "excepthook", kamim.__main__._thread_failed)
    thread = threading.Thread(target=os.mkdir, args=("/proc/x/y",))
    thread.start()
    thread.join()
    assert capsys.readouterr().err.startswith("FileNotFoundError in a thread: ")


def test_a_frame_that_says_it_is_huge_is_refused_before_it_is_made():
    """Five kilobytes had become five gigabytes."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    data = bytearray(cv2.imencode(".jpg", pixels)[1].tobytes())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (40_000).to_bytes(2, "big") * 2
    with pytest.raises(ValueError, match=r"says 40000 x 40000 px"):
        decode_frame(bytes(data))


def test_a_jpeg_of_a_subsampling_without_a_name_is_damaged_not_a_crash():
    """simplejpeg raises KeyError at it, which had ended the build."""
    size, three = b"\x08\0x\0x\x03", b"\x01\x14\0\x02\x11\n\x03\x11\x01"
    data = b"\xff\xd8\xff\xc0\0\x11" + size + three
    data += b"\xff\xda\0\x0c\x03\x01\0\x02\x11\x03\x11..\xff\xd9"
    with pytest.raises(KeyError):
        simplejpeg.decode_jpeg_header(data)
    with pytest.raises(Rejected, match=r"damaged|truncated"):
        decode_image(data)
    with pytest.raises(ValueError, match="not a JPEG that decodes"):
        decode_frame(data)


def test_a_parquet_of_more_rows_than_bytes_is_refused(tmp_path):
    """A list of all its rows had been made first, however many it said it has."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    picture = pyarrow.array([b""]).dictionary_encode()
    rows = pyarrow.DictionaryArray.from_arrays(np.zeros(100_000, np.int32), picture.dictionary)
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"says 100000 rows in \d+ bytes"):
        open_source(f"parquet:{tmp_path}/x.parquet")


def test_a_parquet_group_of_more_rows_than_its_file_is_refused(tmp_path):
    """Arrow reserves memory by the group's own count: a kilobyte had asked for 256 GB."""
    pytest.importorskip("pyarrow")
    data = parquet_of([b"x"] * 100)
    hundred, many = b"\xc8\x01", b"\xc8\x7f"  # as Thrift writes 100 and 8,164
    at = data.rindex(hundred)
    (tmp_path / "x.parquet").write_bytes(data[:at] + many + data[at + 2 :])
    with pytest.raises(ValueError, match=r"says 8164 rows in \d+ bytes"):
        open_source(f"parquet:{tmp_path}/x.parquet")


def reseal(folder, index):
    """Write `index`, and a manifest that agrees with it, as an attacker would."""
    manifest = load(folder)
    file = spec.write_file(folder / INDEX, npy_bytes(index), len(index))
    spec.write(folder, replace(manifest, index=file))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start", 1 << 63),
        ("frame", 0),
        ("frame_bytes", 1 << 31),
        ("arrays", 1 << 40),
        ("arrays", 3),
        ("height", 0),
        ("frame_bytes", 20_000),
        ("bytes", 700),
        ("bytes", (1 << 32) - 1),
    ],
)
def test_an_index_of_false_places_is_refused(field, value, built):
    """The loader had divided by zero, or asked for 4 GB of a small file."""
    index = np.load(built / INDEX)
    index[field][3] = value
    reseal(built, index)
    with pytest.raises(ValueError, match="cannot lie in it"):
        ShardSet(built)
    assert "cannot lie in it" in verify_shards(built)[0]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"grid": 1 << 40}},
        {"settings": {"bank": "2"}},
        {"shards": [{"name": "a", "count": "1", "bytes": 1, "sha256": ""}]},
        {"ledger": {"inputs": 1.5, "written": 1.5, "rejected": {}}},
        {"classes": "abc"},
        {"versions": []},
        {"versions": {}},
        {"source": {}},
        {"fidelity": {"x": 1}},
        {"fidelity": {"detectors": {"fast": {"map": {}}}, "temperature": 1, "w_ps": 8}},
        {"shards": [], "ledger": {"inputs": 0, "written": 0, "rejected": {}}},
    ],
)
def test_a_manifest_of_other_types_is_damaged_not_a_crash(change, built):
    content = json.loads((built / "manifest.json").read_text())
    change = {k: content[k] | v if k == "settings" else v for k, v in change.items()}
    content |= change
    del content["checksum"]
    content["checksum"] = spec.fingerprint(content)
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (built / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        load(built)


def test_a_file_that_cannot_be_read_is_a_line_of_damage(built):
    manifest = load(built)
    (built / "rejected.jsonl").unlink()
    (line,) = damaged_files(built, manifest)
    assert "rejected.jsonl cannot be read" in line


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"boxes":[[', b'"boxes":{{{'),
        (b'"boxes":[[', b'"bones":[['),
        (b'"flips":[[', b'"flips":["'),
        (b'"flips":[[0,', b'"flips":[[[,'),
        (b"\x93NUMPY", b"\x93BUMPY"),
    ],
)
def test_a_changed_bank_of_sound_hashes_is_no_crash(old, new, built):
    records = ShardSet(built)
    row, (_, at) = records.index[0], records.places["fast.counts"]
    shard = built / records.shards[0].name
    data = shard.read_bytes()
    begin, end = int(row["frame"] + row["frame_bytes"]), int(row["arrays"]) + at
    part = bytearray(data[begin:end])
    where = part.rindex(old) if old in part else part.rindex(old[:10])
    part[where : where + len(new)] = new
    shard.write_bytes(data[:begin] + bytes(part) + data[end:])
    loader = Loader(ShardSet(built), Plan(len(records), 8, 0), 0, 5, maps=["fast"], bank=True)
    with pytest.raises(ValueError, match="that is not as the manifest says"):
        list(loader)


def test_weights_that_cannot_be_written_or_read_are_one_line(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    from kamim.evaluate.encoder import load_encoder
    from train import checkpoint
    from train.export import write_tensors

    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04not tensors")
    with pytest.raises(ValueError, match=r"no sound .safetensors file"):
        load_encoder(str(tmp_path / "x.safetensors"), torch.device("cpu"))
    with pytest.raises(OSError, match="No such file or directory"):
        write_tensors({"a": torch.zeros(2)}, tmp_path / "nowhere" / "y.safetensors", {})

    def full(*arguments: object) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint not written"):
        checkpoint.save(tmp_path / "checkpoints", 3, {})
    assert not list((tmp_path / "checkpoints").iterdir())


LOCKS = {
    "requirements.lock": ("demo", "train", "remote", "parquet", "dask", "ffcv"),
    "requirements-test.lock": ("demo", "train", "test"),
}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_has_hashes_for_all_that_is_needed_and_names_no_host(name):
    text = (REPOSITORY / name).read_text()
    assert "://" not in text
    assert "--index" not in text
    pins = re.split(r"\n(?=\S)", text.strip())
    pins = [pin for pin in pins if not pin.startswith("#")]
    assert all("==" in pin and "--hash=sha256:" in pin for pin in pins)
    locked = {normal(pin.split("==")[0].strip()) for pin in pins}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in LOCKS[name] for line in extras[extra])]
    names = {normal(re.split(r"[\s<>=!~;\[]", line)[0]) for line in wanted}
    assert names <= locked, names - locked


def normal(name):
    return name.lower().replace("_", "-")
