"""The build: same bytes whatever happens, a ledger that balances, refusals in one line."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, contents, settings

import preprocess
import shards
from preprocess import BuildError, build_shards, building, open_source
from preprocess.building import shard_size_for, sized
from preprocess.parts import build_part, join_parts
from preprocess.repair import repair_shards
from preprocess.source import Source
from shards import ShardSet
from shards.beton import convert_to_ffcv
from shards.errors import UserError
from shards.progress import progress
from shards.remote.place import Place
from shards.verification import verify_shards

THREE = tuple(preprocess.detector_settings(name) for name in ("fast", "orb", "sift"))


def test_records_are_what_the_sources_say(small_source, tmp_path):
    manifest = build_shards(open_source(str(small_source)), tmp_path / "out", settings(), jobs=1)
    records = ShardSet(tmp_path / "out")
    assert len(records) == 40 == manifest.ledger.written
    assert manifest.classes == ["class0", "class1", "class2", "class3"]
    for number in range(40):
        record = records[number]
        assert record.source.startswith(f"class{record.label}/")
        assert (record.height, record.width) == (80, 96)
        assert {n: m.shape for n, m in record.maps.items()} == {"fast": (16, 16)}
        assert shards.decode_frame(record.frame).shape == (64, 64, 3)
    assert len({records[n].source for n in range(40)}) == 40
    with pytest.raises(IndexError):
        records[40]


def test_each_core_builds_unless_one_says_otherwise(small_source, tmp_path, monkeypatch):
    """And no more processes than there are shards to build."""
    asked, run = [], preprocess.building.backends.run

    def one_process(backend, scheduler, most, *rest):
        asked.append(most)
        return run(backend, scheduler, 1, *rest)

    monkeypatch.setattr(preprocess.building.backends, "run", one_process)
    monkeypatch.setattr(preprocess.building.joblib, "cpu_count", lambda: 3)
    source, chosen = open_source(str(small_source)), settings()  # ten shards
    for number, jobs in enumerate(((), (0,), (2,), (50,))):
        build_shards(source, tmp_path / str(number), chosen, *jobs)
    preprocess.build(str(small_source), tmp_path / "by-name", frame=64, shard_size=4)
    assert asked == [3, 3, 2, 10, 3]


def test_the_same_bytes_for_any_number_of_jobs(small_source, tmp_path):
    source = open_source(str(small_source))
    for jobs in (1, 2, 3):
        build_shards(source, tmp_path / str(jobs), settings(detectors=THREE), jobs)
    one = contents(tmp_path / "1")
    assert len(one) == 10 + 4
    assert one == contents(tmp_path / "2") == contents(tmp_path / "3")


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_the_same_bytes_after_kills(count, small_source, tmp_path):
    """SIGKILL to the whole build at random moments, the same command again after each."""
    build_shards(open_source(str(small_source)), tmp_path / "calm", settings(shard_size=2), 1)
    command = [sys.executable, "-m", "kamim", "shards", "build", str(small_source)]
    command += [
        str(tmp_path / "out"),
        "--frame",
        "64",
        "--crop",
        "64",
        "--map-crops",
        "1",
        "--grid",
        "16",
    ]
    command += ["--shard-size", "2", "--jobs", "2"]
    rng, kills, midway, pids = random.Random(0), 0, 0, list[str]()

    def rows():
        return len(list((tmp_path / "out").glob(".build/*[0-9].json")))

    slow = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/tests/slow_build:{REPOSITORY}"}
    while kills < count:
        process = subprocess.Popen(
            command, start_new_session=True, stderr=subprocess.DEVNULL, env=slow
        )
        # Before the work, or some shards into it: a busy machine starts a process in seconds.
        goal = rows() + rng.randint(0, 5)
        while rows() < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        pids.append(str(process.pid))
        midway += 0 < rows() < 20
        # Killed after the manifest, it leaves the tidying up to the next.
        done = (tmp_path / "out" / "manifest.json").exists()
        if done and not (tmp_path / "out" / ".build").exists():
            assert contents(tmp_path / "out") == contents(tmp_path / "calm")
            for path in (tmp_path / "out").iterdir():  # finished early: begin again
                path.unlink()
    folders = [name for name in os.listdir("/dev/shm") if name.startswith("joblib")]
    assert not [name for name in folders if any(f"_{pid}_" in name for pid in pids)]
    assert midway >= count // 4  # or the kills fell beside the work and proved nothing
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "40 inputs = 40 written + 0 rejected" in done.stdout
    assert contents(tmp_path / "out") == contents(tmp_path / "calm")
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert verify_shards(tmp_path / "out", "decode") == []


def test_a_restart_does_only_what_is_missing(small_source, tmp_path, monkeypatch):
    source, out = open_source(str(small_source)), tmp_path / "out"
    written = []
    real = preprocess.building.write_shard

    def stopping(job, number, entries):
        if len(written) == 6:
            raise KeyboardInterrupt
        written.append(number)
        return real(job, number, entries)

    monkeypatch.setattr(preprocess.building, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        build_shards(source, out, settings(), jobs=1)
    assert not (out / "manifest.json").exists()
    (out / "shard-000001.tar").unlink()  # lost after its row was written
    (out / "shard-000009.tar.0123456789ab.tmp").write_bytes(b"left by a kill")
    (out / ".build" / "facts.json").rename(out / ".build" / "plan.json")  # its name before
    with pytest.raises(ValueError, match=r"settings\.quality is \d+ there, 50 here"):
        build_shards(source, out, settings(quality=50), jobs=1)
    written.clear()
    shown = []

    def bar(title, total, initial):
        shown.append((title, total, initial))
        return progress(title, total, initial=initial)

    monkeypatch.setattr(preprocess.building, "progress", bar)
    build_shards(source, out, settings(), jobs=1)
    assert shown == [("building", 40, 20)]
    assert written == [1, 6, 7, 8, 9]
    assert verify_shards(out, "decode") == []
    written.clear()
    assert build_shards(source, out, settings(), jobs=1).count == 40
    assert written == []


def test_rejected_inputs_are_listed_and_the_ledger_balances(small_source, tmp_path):
    (small_source / "class0" / "empty.jpg").write_bytes(b"")
    (small_source / "class1" / "text.jpg").write_text("no picture")
    whole = (small_source / "class0" / "000.jpg").read_bytes()
    (small_source / "class2" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (small_source / "class3" / "link.jpg").symlink_to("/etc/hostname")
    source, out = open_source(str(small_source)), tmp_path / "out"
    (small_source / "class3" / "007.jpg").unlink()  # vanishes between listing and reading
    with pytest.raises(BuildError, match=r"11.4% of the inputs were rejected, more than 1.0%"):
        build_shards(source, out, settings(), jobs=2)
    manifest = build_shards(source, out, settings(), jobs=2, max_rejected=0.2)
    reasons = {"empty": 1, "not-an-image": 1, "truncated": 1, "link": 1, "vanished": 1}
    assert manifest.ledger == shards.Ledger(44, 39, reasons)
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in lines} == {
        "class0/empty.jpg": "empty",
        "class1/text.jpg": "not-an-image",
        "class2/cut.jpg": "truncated",
        "class3/007.jpg": "vanished",
        "class3/link.jpg": "link",
    }
    assert verify_shards(out, "decode") == []


def test_on_error_fail_stops_at_the_first_and_names_it(small_source, tmp_path):
    (small_source / "class1" / "bad 'one'.jpg").write_bytes(b"x")
    source = open_source(str(small_source))
    with pytest.raises(BuildError, match=r"class1/bad 'one'.jpg.*not-an-image.*quarantine"):
        build_shards(source, tmp_path / "out", settings(), 1, "fail")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_on_error_fail_is_kept_by_what_was_built_without_it(small_source, tmp_path):
    (small_source / "class1" / "bad.jpg").write_bytes(b"x")
    source, out = open_source(str(small_source)), tmp_path / "out"
    build_shards(source, out, settings(), 1, max_rejected=0.5)
    with pytest.raises(BuildError, match=r"2.4% .* were rejected: .*--on-error quarantine"):
        build_shards(source, out, settings(), 1, "fail", max_rejected=0.5)
    build_part(source, tmp_path / "part", settings(), (1, 1), 1, max_rejected=0.5)
    with pytest.raises(BuildError, match="--on-error quarantine"):
        build_part(source, tmp_path / "part", settings(), (1, 1), 1, "fail", max_rejected=0.5)


def test_a_build_that_another_finished_meanwhile_is_left_alone(small_source, tmp_path, monkeypatch):
    source, out, real = open_source(str(small_source)), tmp_path / "out", building.check_folder

    def slow(place, facts):
        found = real(place, facts)
        monkeypatch.setattr(building, "check_folder", real)
        build_shards(source, out, settings(detectors=THREE), 1)
        return found

    monkeypatch.setattr(building, "check_folder", slow)
    with pytest.raises(ValueError, match="finished by another process; run the same command again"):
        build_shards(source, out, settings(), 1)
    assert len(ShardSet(out).manifest.detectors) == 3
    assert verify_shards(out) == []


def test_one_job_leaves_the_callers_threads(small_source, tmp_path):
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 1)
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_other_names_of_classes_are_another_source(small_source, tmp_path):
    out = tmp_path / "out"
    build_shards(open_source(str(small_source)), out, settings(), 1)
    source = open_source(str(small_source))
    renamed = replace(source, classes=[*source.classes[:-1], "other"])
    for again in (build_shards, repair_shards):
        with pytest.raises(ValueError, match="'class3' there, 'other' here; build into a new fol"):
            again(renamed, out, settings(), 1)
    with pytest.raises(ValueError, match="other names of classes: 4 there, 5 here"):
        build_shards(replace(source, classes=[*source.classes, "more"]), out, settings(), 1)


@pytest.mark.parametrize("facts", [[1], {}, {"settings": {}}, "x", 7])
def test_facts_that_no_build_writes_are_one_line(facts, small_source, tmp_path):
    (tmp_path / "out" / ".build").mkdir(parents=True)
    (tmp_path / "out" / ".build" / "facts.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=r"facts.json is damaged; remove .*\.build to begin"):
        build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 1)
    with pytest.raises(UserError, match="is damaged"):
        join_parts(tmp_path / "out")


def test_a_shard_whose_inputs_are_all_bad_is_empty_but_there(small_source, tmp_path):
    for number in (0, 4, 8, 12):
        (small_source / "class0" / f"{number:03d}.jpg").write_bytes(b"")
    out = tmp_path / "out"
    manifest = build_shards(open_source(str(small_source)), out, settings(), 1, max_rejected=1)
    assert [shard.count for shard in manifest.shards] == [0] + [4] * 9
    assert verify_shards(out, "decode") == []
    assert ShardSet(out)[0].key == "000000004"


def test_nothing_usable_publishes_nothing(tmp_path):
    (tmp_path / "s" / "a").mkdir(parents=True)
    (tmp_path / "s" / "a" / "x.jpg").write_bytes(b"")
    with pytest.raises(BuildError, match="all 1 inputs were rejected"):
        build_shards(open_source(str(tmp_path / "s")), tmp_path / "out", settings(), 1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_other_settings_or_inputs_are_refused_by_name(small_source, tmp_path):
    source, out = open_source(str(small_source)), tmp_path / "out"
    build_shards(source, out, settings(), 1)
    before = contents(out)
    for changed, words in [
        (settings(frame=72), r"settings.frame is 64 there, 72 here"),
        (settings(detectors=THREE), r"settings.detectors"),
    ]:
        with pytest.raises(ValueError, match=words):
            build_shards(source, out, changed, 1)
    (small_source / "class0" / "new.jpg").write_bytes(b"new")
    with pytest.raises(ValueError, match=r"source.inputs is 40 there, 41 here"):
        build_shards(open_source(str(small_source)), out, settings(), 1)
    assert contents(out) == before


def test_an_unfinished_build_is_refused_with_other_settings(small_source, tmp_path):
    (small_source / "class3" / "zzz.jpg").write_bytes(b"")
    source, out = open_source(str(small_source)), tmp_path / "out"
    with pytest.raises(BuildError):
        build_shards(source, out, settings(), 1, "fail")
    with pytest.raises(ValueError, match=r"settings.grid is 16 there, 20 here"):
        build_shards(source, out, settings(grid=20), 1, "fail")


def test_a_folder_with_something_else_is_left_alone(small_source, tmp_path):
    source, out = open_source(str(small_source)), tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files \(chapter.tex\)"):
        build_shards(source, out, settings(), 1)
    with pytest.raises(ValueError, match="is a file"):
        build_shards(source, out / "chapter.tex", settings(), 1)
    assert contents(out) == {"chapter.tex": b"precious"}


def test_two_builds_into_one_folder(small_source, tmp_path):
    source, out = open_source(str(small_source)), tmp_path / "out"
    facts = preprocess.building.facts_of(source, settings())
    with (
        preprocess.building.claim(source, settings(), Place.of(out), facts),
        pytest.raises(ValueError, match="another process is"),
    ):
        build_shards(source, out, settings(), 1)


def test_parts_are_built_beside_each_other_and_a_whole_build_is_not(small_source, tmp_path):
    source, out = open_source(str(small_source)), Place.of(tmp_path / "out")
    facts, claim = building.facts_of(source, settings()), building.claim
    with claim(source, settings(), out, facts, "part-1-of-2") as one:
        with claim(source, settings(), out, facts, "part-2-of-2") as two:
            assert one.work.where == two.work.where
        for again in ("part-1-of-2", ""):
            with (
                pytest.raises(ValueError, match="another process is"),
                claim(source, settings(), out, facts, again),
            ):
                pass


def test_raw_frames_and_detection_on_frames(small_source, tmp_path):
    source = open_source(str(small_source))
    chosen = settings(quality=0, detect_on="frame")
    build_shards(source, tmp_path / "out", chosen, 2)
    records = ShardSet(tmp_path / "out")
    assert verify_shards(tmp_path / "out", "decode") == []
    assert preprocess.redetect_maps(records, None) == []
    rgb = shards.decode_frame(records[3].frame)
    again = preprocess.density_maps(rgb, 3, chosen, (records[3].height, records[3].width))
    np.testing.assert_array_equal(records[3].maps["fast"], again["fast"])


@pytest.mark.parametrize(
    "before",
    [
        {},
        {"bank": 1},
        {"map_crops": 2},
        {"detectors": (preprocess.detector_settings("orb"),), "bank": 2, "shard_size": 7},
    ],
)
def test_adding_to_a_finished_set_gives_the_bytes_of_a_fresh_build(before, small_source, tmp_path):
    """Frames and shared maps are copied, not made again; bad inputs are listed again."""
    (small_source / "class1" / "zz.jpg").write_bytes(b"not a picture")
    source = open_source(str(small_source))
    detectors = tuple(preprocess.detector_settings(n) for n in ("orb", "fast"))
    wanted = settings(detectors=detectors, bank=2)
    build_shards(source, tmp_path / "old", settings(**before), 1, max_rejected=1)
    build_shards(source, tmp_path / "fresh", wanted, 1, max_rejected=1)
    build_shards(source, tmp_path / "new", wanted, 2, max_rejected=1, reuse=tmp_path / "old")
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")
    assert verify_shards(tmp_path / "new", "decode") == []
    assert preprocess.redetect_maps(ShardSet(tmp_path / "new"), source) == []


def test_a_bank_is_of_the_source_where_maps_are_of_the_frame(small_source, tmp_path):
    source = open_source(str(small_source))
    build_shards(source, tmp_path / "out", settings(detect_on="frame", bank=1), 1)
    records = ShardSet(tmp_path / "out")
    assert preprocess.redetect_maps(records, source) == []
    with pytest.raises(ValueError, match="give the source of these shards"):
        preprocess.redetect_maps(records, None)


def test_a_worker_leaves_ctrl_c_to_its_parent(small_source, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(multiprocessing.current_process(), "name", "LokyProcess-1")
    try:
        build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 1)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_reuse_neither_encodes_nor_detects_again(small_source, tmp_path, monkeypatch):
    source = open_source(str(small_source))
    build_shards(source, tmp_path / "old", settings(), 1)
    for name in ("encode_frame", "maps_of"):
        monkeypatch.setattr(f"preprocess.shard.{name}", None)
    build_shards(source, tmp_path / "new", settings(bank=1), 1, reuse=tmp_path / "old")
    assert len(ShardSet(tmp_path / "new")) == 40


@pytest.mark.parametrize("jobs", [1, 2])
def test_reuse_of_a_set_that_was_built_anew_takes_none_of_its_old_maps(
    jobs, small_source, tmp_path
):
    source, old = open_source(str(small_source)), tmp_path / "old"
    strict = settings(detectors=(preprocess.detector_settings("fast", {"threshold": "60"}),))
    for chosen in (settings(), strict):
        shutil.rmtree(old, ignore_errors=True)
        build_shards(source, old, chosen, 1)
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        build_shards(source, tmp_path / "new", settings(bank=1), jobs, reuse=old)
    build_shards(source, tmp_path / "plain", settings(bank=1), 1)
    assert contents(tmp_path / "new") == contents(tmp_path / "plain")


def test_reuse_refuses_another_source_other_frames_and_damage(small_source, tmp_path):
    source = open_source(str(small_source))
    build_shards(source, tmp_path / "old", settings(), 1)
    for changes, words in (({"frame": 72}, "settings.frame is 64 there"), ({"quality": 0}, "qual")):
        with pytest.raises(ValueError, match=words):
            build_shards(source, tmp_path / "a", settings(**changes), 1, reuse=tmp_path / "old")
    with pytest.raises(ValueError, match=r"source\."):
        build_shards(open_source("demo"), tmp_path / "b", settings(), 1, reuse=tmp_path / "old")
    shard = tmp_path / "old" / "shard-000002.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-000002.tar is damaged"):
        build_shards(source, tmp_path / "c", settings(bank=1), 1, reuse=tmp_path / "old")
    convert_to_ffcv(small_set(tmp_path, source), tmp_path / "ffcv")
    with pytest.raises(ValueError, match="is an FFCV set; reuse the WebDataset set"):
        build_shards(source, tmp_path / "d", settings(), 1, reuse=tmp_path / "ffcv")


def small_set(tmp_path, source):
    build_shards(source, tmp_path / "plain", settings(), 1)
    return tmp_path / "plain"


def test_marks_and_detector_options_change_the_maps(small_source, tmp_path):
    source = open_source(str(small_source))
    base = settings()
    fewer = preprocess.detector_settings("fast", {"threshold": "60"})
    means = []
    for name, chosen in {
        "ring": base,
        "disc": replace(base, mark="disc"),
        "point": replace(base, mark="point"),
        "fewer": replace(base, detectors=(fewer,)),
    }.items():
        build_shards(source, tmp_path / name, chosen, 1)
        records = ShardSet(tmp_path / name)
        means.append(np.mean([records[n].maps["fast"].mean() for n in range(len(records))]))
    ring, disc, point, few = means
    assert disc > ring > point > 0
    assert 0 < few < ring


def test_shard_sizes_share_out_small_sources_and_stay_at_a_thousand():
    assert [shard_size_for(n) for n in (1, 800, 50_000, 1_281_167)] == [16, 16, 781, 1000]
    chosen, many = settings(shard_size=0), Source("folder", "", range(1_281_167), [])
    assert sized(chosen, many).shard_size == 1000
    assert sized(replace(chosen, frame=0, quality=0), many).shard_size == 10_000


def damage(out, name):
    """One bit of a file flipped, its size as before."""
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)


@pytest.mark.parametrize("name", ["shard-000003.tar", "index.npy", "rejected.jsonl"])
def test_a_finished_set_without_a_file_is_no_success(name, small_source, tmp_path):
    (small_source / "class0" / "bad.jpg").write_bytes(b"x")
    source, out = open_source(str(small_source)), tmp_path / "out"
    build_shards(source, out, settings(), 1, max_rejected=1)
    whole = (out / name).read_bytes()
    for content in (None, whole + b"x"):
        (out / name).unlink(missing_ok=True)
        if content:
            (out / name).write_bytes(content)
        with pytest.raises(BuildError, match=rf"{name} .*kamim shards build SOURCE .* --repair"):
            build_shards(source, out, settings(), 1, max_rejected=1)


def test_repair_builds_what_is_damaged_and_nothing_else(small_source, tmp_path, monkeypatch):
    (small_source / "class1" / "bad.jpg").write_bytes(b"x")
    (small_source / "class3" / "empty.jpg").write_bytes(b"")
    source, out, chosen = open_source(str(small_source)), tmp_path / "out", settings(bank=1)
    build_shards(source, out, chosen, 1, max_rejected=1)
    whole = contents(out)
    (out / "shard-000002.tar").unlink()
    damaged = ["shard-000005.tar", "index.npy", "rejected.jsonl"]
    for name in damaged:
        damage(out, name)
    (out / "inspect.html").write_text("a page")
    numbers, real = [], preprocess.building.write_shard
    monkeypatch.setattr(
        preprocess.building, "write_shard", lambda j, n, e: (numbers.append(n), real(j, n, e))[1]
    )
    assert repair_shards(source, out, chosen, 1) == ["shard-000002.tar", *damaged]
    assert numbers == [2, 5]
    assert contents(out) == {**whole, "inspect.html": b"a page"}
    assert repair_shards(source, out, chosen, 1) == []
    assert numbers == [2, 5]


def test_a_killed_repair_goes_on(small_source, tmp_path, monkeypatch):
    source, out = open_source(str(small_source)), tmp_path / "out"
    build_shards(source, out, settings(), 1)
    whole, real, numbers = contents(out), preprocess.building.write_shard, []
    for number in (1, 4, 7):
        damage(out, f"shard-{number:06d}.tar")

    def stopping(job, number, entries):
        if number == 7 and numbers == [1, 4]:
            raise KeyboardInterrupt
        numbers.append(number)
        return real(job, number, entries)

    monkeypatch.setattr(preprocess.building, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        repair_shards(source, out, settings(), 1)
    numbers.append("again")
    assert len(repair_shards(source, out, settings(), 1)) == 3
    assert numbers == [1, 4, "again", 7]
    assert contents(out) == whole


def test_repair_keeps_what_it_cannot_better(small_source, tmp_path):
    """An image that cannot be read any more: the damaged shard stays, the error names it."""
    source, out = open_source(str(small_source)), tmp_path / "out"
    build_shards(source, out, settings(), 1)
    whole = contents(out)
    damage(out, "shard-000000.tar")
    damaged = contents(out)
    image = small_source / source.entries[0].name
    image.rename(tmp_path / "away.jpg")
    for _ in range(2):
        with pytest.raises(BuildError, match=r"shard-000000.tar cannot be built to the bytes"):
            repair_shards(source, out, settings(), 1)
        assert contents_of_files(out) == damaged
    (tmp_path / "away.jpg").rename(image)
    assert repair_shards(source, out, settings(), 1) == ["shard-000000.tar"]
    assert contents(out) == whole


def contents_of_files(folder):
    """As contents, without the folder of an unfinished repair."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_repair_refuses_what_it_cannot_know(small_source, tmp_path):
    source, out = open_source(str(small_source)), tmp_path / "out"
    with pytest.raises(ValueError, match="is not a finished set"):
        repair_shards(source, out, settings(), 1)
    assert not out.exists()
    build_shards(source, out, settings(), 1)
    flags = r"settings.frame is 64 there, 72 here; give those of the set .*--detector fast --frame"
    with pytest.raises(ValueError, match=flags):
        repair_shards(source, out, settings(frame=72), 1)
    (out / "manifest.json").unlink()
    before = contents(out)
    for work in (repair_shards, build_shards):
        with pytest.raises(ValueError, match=r"has shards but no manifest.json.* restore"):
            work(source, out, settings(), 1)
    assert contents(out) == before


def test_pages_of_ours_are_nothing_foreign(small_source, tmp_path):
    source, out = open_source(str(small_source)), tmp_path / "out"
    out.mkdir()
    (out / "inspect.html").write_text("of a set that was removed")
    assert build_shards(source, out, settings(), 1).count == 40


def test_what_differs_is_said_by_name_and_never_nested(small_source, tmp_path):
    source, out = open_source(str(small_source)), tmp_path / "out"
    build_shards(source, out, settings(), 1)
    more = tuple(preprocess.detector_settings(n) for n in ("fast", "orb"))
    fewer = (preprocess.detector_settings("fast", {"threshold": "20"}),)
    for changes, words in [
        ({"detectors": more}, "settings.detectors is fast there, fast,orb here; keep its frames"),
        ({"detectors": fewer}, "fast.threshold is 10 there, 20 here;"),
        ({"area": (0.5, 1.0)}, "settings.area is 0.67 there, 0.5 here;"),
    ]:
        with pytest.raises(ValueError, match=r"\S") as caught:
            build_shards(source, out, settings(**changes), 1)
        assert words in str(caught.value)
        assert "{" not in str(caught.value)
        assert "[" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"build SOURCE {out}-orb --reuse {out}$"):
        build_shards(source, out, settings(detectors=more), 1)


def test_flags_of_settings_are_those_that_give_them():
    from preprocess.compare import flags_of

    chosen = settings(detectors=(preprocess.detector_settings("fast", {"threshold": "20"}),))
    assert flags_of(chosen, 4) == (
        "--detector fast --detector-option fast.threshold=20 --frame 64 --crop 64 --map-crops 1 "
        "--grid 16"
    )
    assert flags_of(replace(chosen, area=(0.5, 1.0)), 16).endswith("--area 0.5 --shard-size 4")


def test_a_full_disk_names_the_place_and_what_to_do(small_source, tmp_path, monkeypatch):
    def full(job, number, entries):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preprocess.building, "write_shard", full)
    with pytest.raises(OSError, match="the disk is full; free space, then run the same") as caught:
        build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 1)
    assert caught.value.filename == str(tmp_path / "out")


def test_from_python_it_gives_the_bytes_of_the_command(small_source, tmp_path):
    flags = ["--frame", "80", "--crop", "64", "--map-crops", "1", "--grid", "16"]
    line = [sys.executable, "-m", "kamim", "shards", "build", small_source, tmp_path / "a", *flags]
    subprocess.run(list(map(str, line)), check=True, capture_output=True)
    chosen = {"frame": 80, "crop": 64, "map_crops": 1, "grid": 16}
    manifest = shards.build(source=small_source, out=tmp_path / "b", detectors="fast", **chosen)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert manifest.count == 40
    again = {"source": small_source, "out": tmp_path / "b", "detectors": "fast", **chosen}
    assert preprocess.build(**again) == manifest


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"grid": 1}, "grid 1 is out of range; give 2 to 254"),
        ({"levels": 17}, "levels 17 is unknown; there are 256"),
        ({"weights": (0.1, 8)}, "reach beyond 255, the most that is stored; give 0.181 or more"),
        ({"weights": (0.25, 7)}, "w_ps 7 of the weights: give a divisor of the crop of 192 px"),
        ({"crop": 100}, "crop 100 is no multiple of 8; give 96"),
        ({"quality": 101}, "quality 101 is out of range; give 0 to 100"),
        ({"mark": "star"}, "mark is 'star'; there are ring, disc, point"),
        ({"fram": 80}, "there is no setting 'fram'; did you mean frame?"),
    ],
)
def test_wrong_settings_from_python_are_one_line(wrong, words, small_source, tmp_path):
    with pytest.raises(shards.UserError) as caught:
        shards.build(str(small_source), tmp_path / "out", **wrong)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_two_processes_build_in_a_folder_of_any_name(small_source, tmp_path):
    """joblib 1.6 tells its tracker of a temporary folder, in ASCII."""
    source, chosen = open_source(str(small_source)), settings(map_crops=1, shard_size=20)
    for name in ("plain", "sét ü"):
        build_shards(source, tmp_path / name, chosen, 2)
    assert contents(tmp_path / "plain") == contents(tmp_path / "sét ü")
