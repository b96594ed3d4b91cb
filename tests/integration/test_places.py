"""Builds into stores, and in parts: the bytes of a build on a disk, whatever fails on the way."""

import errno
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

import cv2
import failing
import fsspec
import numpy as np
import pytest
from conftest import REPOSITORY, contents, settings
from stores import s3_server
from test_cli import SMALL
from typed import KAMIM, kamim, kamim_process

import preprocess.building
import shards
from preprocess import BuildError, build_part, build_shards, join_parts, open_source
from preprocess.building import hold
from preprocess.compare import WORK
from preprocess.parts import parse_part
from preprocess.repair import repair_shards
from shards.errors import UserError
from shards.remote import place as places
from shards.remote import retry
from shards.remote.copy import copy_set
from shards.remote.place import Place

FRAMES, MAPS = settings(), settings(frame=0, quality=0)
FLAGS = {"shards": SMALL, "maps": SMALL[2:]}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """No long waits; a folder for scratch that tests can look into; a store that works."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.001)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(failing.Failing, "fault", staticmethod(lambda request, path: ""))
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of 3 classes with 21 images, of which one is damaged: 6 shards of 4."""
    root = tmp_path_factory.mktemp("places") / "source"
    rng = random.Random(0)
    for n in range(21):
        path = root / f"class{n % 3}" / f"{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.frombuffer(rng.randbytes(12 * 16 * 3), np.uint8).reshape(12, 16, 3)
        image = cv2.resize(noise, (64, 48), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(str(path), image)
    (root / "class1" / "04.png").write_bytes(b"damaged")
    return root


@pytest.fixture(scope="module")
def listed(source):
    return open_source(str(source))


@pytest.fixture(scope="module")
def disk(listed, tmp_path_factory):
    """The slow twin: what a build on a disk gives, by the side of its frames."""
    made = {}
    for chosen in (FRAMES, MAPS):
        out = tmp_path_factory.mktemp("disk") / "set"
        build_shards(listed, out, chosen, 1, max_rejected=1)
        made[chosen.frame] = contents(out)
    return made


def of(url):
    """All files below a URL or in a folder, by name."""
    files, root = fsspec.core.url_to_fs(str(url))
    files.invalidate_cache()
    root = root.rstrip("/") + "/"
    return {name[len(root) :]: files.cat_file(name) for name in files.find(root)}


def built(listed, out, chosen=FRAMES, jobs=1, **options):
    return build_shards(listed, out, chosen, jobs, max_rejected=1, **options)


def part_of(listed, out, part, chosen=FRAMES, jobs=1):
    return build_part(listed, out, chosen, part, jobs, max_rejected=1)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The URL of a folder of an empty bucket; the client finds server and keys as one does."""
    with s3_server(tmp_path_factory.mktemp("s3")):
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("places")
        numbers = count()
        yield lambda: f"s3://places/set{next(numbers)}"


@pytest.fixture(params=["memory", "local", "failing", "s3"])
def store(request, tmp_path):
    """A URL of each kind of store, where nothing is yet."""
    if request.param == "s3":
        return request.getfixturevalue("s3")()
    return f"{request.param}://{tmp_path}/store/set"


@pytest.mark.parametrize("chosen", [FRAMES, MAPS], ids=["frames", "maps"])
def test_a_store_gets_the_bytes_of_a_disk(chosen, store, listed, disk, tmp_path, monkeypatch):
    built(listed, store, chosen)
    assert of(store) == disk[chosen.frame]
    assert not list((tmp_path / "scratch").iterdir())
    monkeypatch.setattr(preprocess.building, "write_shard", None)  # nothing is written again
    assert built(listed, store, chosen).count == 20
    with pytest.raises(BuildError, match=r"4.8% of the inputs were rejected.*/rejected.jsonl, and"):
        build_shards(listed, store, chosen, 1)
    with pytest.raises(ValueError, match=r"of other inputs or settings: settings\.grid"):
        built(listed, store, settings(frame=chosen.frame, quality=chosen.quality, grid=8))


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_two_processes_write_into_a_store(kind, request, source, disk, tmp_path):
    url = request.getfixturevalue("s3")() if kind == "s3" else f"local://{tmp_path}/store"
    # Workers that earlier tests left behind know nothing of this store's credentials.
    line = ["shards", "build", source, url, *SMALL, "--max-rejected", 1, "--jobs", 2]
    done = kamim_process(*line)
    assert done.returncode == 0, done.stderr
    assert of(url) == disk[FRAMES.frame]


@pytest.mark.parametrize("backend", ["dask", pytest.param("ray", marks=pytest.mark.slow)])
def test_workers_of_a_cluster_write_into_a_store(backend, source, disk, tmp_path):
    pytest.importorskip({"dask": "distributed", "ray": "ray"}[backend])
    url = f"local://{tmp_path}/store"
    line = ["shards", "build", source, url, *SMALL, "--max-rejected", 1, "--jobs", 2]
    done = kamim(*line, "--backend", backend)
    assert done.returncode == 0, done.stderr
    assert of(url) == disk[FRAMES.frame]


def test_a_restart_builds_only_what_the_store_lacks(store, listed, disk, monkeypatch):
    real, written = preprocess.building.write_shard, []

    def stopping(job, number, entries):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(number)
        return real(job, number, entries)

    monkeypatch.setattr(preprocess.building, "write_shard", stopping)
    with pytest.raises(KeyboardInterrupt):
        built(listed, store)
    assert "manifest.json" not in of(store)
    files, root = fsspec.core.url_to_fs(store)
    files.rm_file(f"{root}/shard-000001.tar")
    files.pipe_file(f"{root}/shard-000002.tar", b"cut")
    files.pipe_file(f"{root}/{WORK}/000003.json", b'{"file"')
    with pytest.raises(ValueError, match=r"settings\.quality is 90 there, 50 here; use the same"):
        built(listed, store, settings(quality=50))
    written.clear()
    monkeypatch.setattr(
        preprocess.building, "write_shard", lambda j, n, e: (written.append(n), real(j, n, e))[1]
    )
    built(listed, store)
    assert written == [1, 2, 3, 4, 5]
    assert of(store) == disk[FRAMES.frame]


def test_what_is_in_a_store_already_is_left_alone(store, listed):
    files, root = fsspec.core.url_to_fs(store)
    files.makedirs(root, exist_ok=True)
    files.pipe_file(f"{root}/chapter.tex", b"precious")
    with pytest.raises(ValueError, match=r"holds other files \(chapter.tex\); name a new"):
        built(listed, store)
    files.rm_file(f"{root}/chapter.tex")
    built(listed, store)
    files.rm_file(f"{root}/shard-000002.tar")
    with pytest.raises(BuildError, match=r"shard-000002.tar has no bytes, the manifest says \d+"):
        built(listed, store)
    with pytest.raises(ValueError, match=r"--repair works in a folder"):
        repair_shards(listed, store, FRAMES, 1)
    files.rm_file(f"{root}/manifest.json")
    with pytest.raises(ValueError, match=r"has shards but no manifest.json"):
        built(listed, store)


def test_an_empty_object_that_stands_for_the_folder_is_nothing(s3, listed, disk, tmp_path):
    """As the web consoles of stores make one where a person makes a folder."""
    url = s3()
    files, root = fsspec.core.url_to_fs(url)
    files.call_s3("put_object", Bucket="places", Key=root.partition("/")[2] + "/", Body=b"")
    built(listed, url)
    assert built(listed, url).count == 20
    copy_set(url, str(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == disk[FRAMES.frame]
    assert len(shards.open(url, cache=tmp_path / "cache")) == 20


def test_scratch_has_room_for_one_shard_of_each_process(listed, tmp_path, monkeypatch):
    put, most = Place.put, []

    def counted(place, name, path):
        most.append([each for each in (tmp_path / "scratch").rglob("*") if each.is_file()])
        put(place, name, path)

    monkeypatch.setattr(Place, "put", counted)
    built(listed, f"memory://{tmp_path}")
    assert [[each.name for each in files if each.suffix != ".lock"] for files in most] == [
        [f"shard-{n:06d}.tar"] for n in range(6)
    ]


def test_a_full_scratch_disk_is_named(listed, tmp_path, monkeypatch):
    def full(job, number, entries):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preprocess.building, "write_shard", full)
    with pytest.raises(OSError, match="the disk is full; free space") as caught:
        built(listed, f"memory://{tmp_path}")
    assert caught.value.filename == str(tmp_path / "scratch")


@pytest.mark.parametrize("whole", [False, True], ids=["moves", "whole"])
@pytest.mark.parametrize("fault", failing.FAULTS)
@pytest.mark.parametrize("request_", ["list", "get", "put", "move", "remove"])
def test_a_request_that_fails_once_is_made_again(
    request_, fault, whole, listed, disk, tmp_path, monkeypatch
):
    """Each request fails the first time that it is made, on any file."""
    seen = set()

    def once(request, path):
        path = re.sub(r"\.[0-9a-f]{12}\.tmp$", "", path)
        if request == request_ and path not in seen:
            seen.add(path)
            return fault
        return ""

    if whole:  # as of a store that shows only whole objects: it need not be a true one
        monkeypatch.setattr(places, "WHOLE", {"failing"})
    monkeypatch.setattr(failing.Failing, "fault", staticmethod(once))
    url = f"failing://{tmp_path}/store"
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / WORK).mkdir()
    built(listed, url)
    assert seen or (whole and request_ == "move")
    assert contents(tmp_path / "store") == disk[FRAMES.frame]


@pytest.mark.parametrize("fault", ["before", "cut"])
@pytest.mark.parametrize("name", ["facts.json", "shard-000003.tar", "000003.json", "manifest.json"])
def test_an_upload_that_fails_for_good_is_one_line_and_a_rerun_finishes(
    name, fault, listed, disk, tmp_path, monkeypatch
):
    wrong = staticmethod(lambda request, path: fault if request == "put" and name in path else "")
    monkeypatch.setattr(failing.Failing, "fault", wrong)
    monkeypatch.setattr(retry, "PATIENCE", 0.2)
    url = f"failing://{tmp_path}/store"
    with pytest.raises(OSError, match=rf"{name} could not be reached for 0.2 s") as caught:
        built(listed, url)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store" / "manifest.json").exists()
    monkeypatch.setattr(failing.Failing, "fault", staticmethod(lambda request, path: ""))
    built(listed, url)
    assert contents(tmp_path / "store") == disk[FRAMES.frame]


def dying(at):
    """A fault that ends everything at request number `at`, and all after it."""
    numbers = count()

    def fault(request, path):
        if next(numbers) >= at:
            raise failing.Died
        return ""

    return staticmethod(fault)


@pytest.mark.parametrize("what", ["build", "parts"])
def test_it_goes_on_wherever_it_ended(what, listed, disk, tmp_path, monkeypatch):
    """Ended at every request in turn, of a build, or of two parts and their joining."""

    def work(url):
        if what == "build":
            built(listed, url)
        elif "manifest.json" not in os.listdir(url.removeprefix("failing://")):
            part_of(listed, url, (1, 2))
            part_of(listed, url, (2, 2))
            join_parts(url, 1)
        else:
            join_parts(url, 1)

    for at in count(0, 3 if what == "build" else 5):
        out = tmp_path / f"store{at}"
        out.mkdir()
        monkeypatch.setattr(failing.Failing, "fault", dying(at))
        try:
            work(f"failing://{out}")
        except failing.Died:
            ended = False
        else:
            ended = True
        monkeypatch.setattr(failing.Failing, "fault", staticmethod(lambda request, path: ""))
        work(f"failing://{out}")
        assert contents(out) == disk[FRAMES.frame], at
        if ended:
            break
    assert at > 50


def test_two_builds_of_one_machine_into_one_place(store, listed, disk):
    with hold(Place.of(store)), pytest.raises(ValueError, match="another process is writing into"):
        built(listed, store)
    built(listed, store)
    assert of(store) == disk[FRAMES.frame]


def test_two_machines_that_build_the_same_are_safe(store, listed, disk, tmp_path, monkeypatch):
    """The other one begins, ends and tidies up while this one builds."""
    real, others = preprocess.building.write_shard, []

    def meanwhile(job, number, entries):
        if number == 2 and not others:
            others.append(True)
            with monkeypatch.context() as elsewhere:
                (tmp_path / "their scratch").mkdir()
                elsewhere.setattr(tempfile, "tempdir", str(tmp_path / "their scratch"))
                built(listed, store)
                assert of(store) == disk[FRAMES.frame]
        return real(job, number, entries)

    monkeypatch.setattr(preprocess.building, "write_shard", meanwhile)
    with pytest.raises(BuildError, match=r"another one has finished there.*run the same command"):
        built(listed, store)
    assert of(store) == disk[FRAMES.frame]
    assert built(listed, store).count == 20


def test_another_build_that_takes_the_place_stops_this_one(store, listed, disk, monkeypatch):
    """As if a store without conditions had let a second build begin at the same moment."""
    real = preprocess.building.write_shard

    def robbed(job, number, entries):
        if number == 2:
            job.work.write("facts.json", b'{"other": 1}')
        return real(job, number, entries)

    monkeypatch.setattr(preprocess.building, "write_shard", robbed)
    with pytest.raises(BuildError, match="taken the place"):
        built(listed, store)
    assert "shard-000002.tar" not in of(store)


def test_the_first_of_two_creates_a_file(store, monkeypatch):
    place = Place.of(store)
    place.create("x", b"first")
    place.create("x", b"second")
    assert place.read("x") == b"first"
    if store.startswith("s3"):  # where both found nothing there
        read, early = Place.read, [True]
        late = lambda place, name: None if early and early.pop() else read(place, name)  # noqa: E731
        monkeypatch.setattr(Place, "read", late)
        place.create("x", b"third")
        assert not early
        assert place.read("x") == b"first"


def test_a_place_in_the_source_is_refused(s3, source, tmp_path):
    url = s3()
    files, root = fsspec.core.url_to_fs(url)
    files.put(str(source), f"{root}/photos", recursive=True)
    listed = open_source(f"{url}/photos")
    with pytest.raises(ValueError, match="lies in the source's folder"):
        built(listed, f"{url}/photos/set")
    built(listed, f"{url}/photos-set")
    with pytest.raises(ValueError, match="a web server takes no files"):
        built(listed, "https://x/y")
    with pytest.raises(FileNotFoundError, match="no-such-bucket"):
        built(listed, "s3://no-such-bucket/set")


def test_a_set_in_a_store_is_copied_and_read(store, listed, disk, tmp_path):
    built(listed, store)
    copy_set(store, str(tmp_path / "back"))
    assert contents(tmp_path / "back") == disk[FRAMES.frame]
    copy_set(str(tmp_path / "back"), f"{store}-copy")
    assert of(f"{store}-copy") == disk[FRAMES.frame]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("jobs", [1, 2])
def test_parts_joined_are_one_build(parts, jobs, listed, disk, tmp_path):
    """Built last to first, on a disk; their ledgers add up to the set's."""
    out = tmp_path / "out"
    ledgers = [part_of(listed, out, (n, parts), jobs=jobs) for n in range(parts, 0, -1)]
    assert sum(each.inputs for each in ledgers) == 21
    assert sum(each.written for each in ledgers) == 20
    assert not (out / "manifest.json").exists()
    manifest = join_parts(out, 1)
    assert manifest.ledger.balanced
    assert contents(out) == disk[FRAMES.frame]
    assert part_of(listed, out, (1, parts)) is None  # it says that all is finished
    assert join_parts(out, 1) == manifest
    assert contents(out) == disk[FRAMES.frame]


@pytest.mark.parametrize(("chosen", "parts"), [(FRAMES, 2), (MAPS, 3), (MAPS, 9)])
def test_parts_in_a_store(chosen, parts, store, listed, disk):
    """More parts than shards are no harm."""
    for n in range(1, parts + 1):
        part_of(listed, store, (n, parts), chosen)
    join_parts(store, 1)
    assert of(store) == disk[chosen.frame]


@pytest.mark.parametrize("door", ["shards", "maps"])
def test_a_missing_part_is_named_with_what_to_type(door, source, listed, disk, tmp_path):
    out, chosen = tmp_path / "out", FRAMES if door == "shards" else MAPS
    with pytest.raises(ValueError, match=r"no parts to join; .* SOURCE .*/out --part 1/N"):
        join_parts(out)
    part_of(listed, out, (2, 3), chosen)
    for name in ("1/3", "3/3"):
        done = kamim("shards", "join", out)
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert f"cannot be joined yet: it lacks part {name}" in line
        words = line.partition("where its source is: ")[2].replace("SOURCE", str(source))
        assert f"kamim {door} build" in words
        words += " --max-rejected 1 --json"
        done = subprocess.run(
            [*KAMIM, *shlex.split(words)[1:]], capture_output=True, text=True, check=True
        )
        assert json.loads(done.stdout)["part"] == name
    done = kamim("shards", "join", out)
    assert done.returncode == 1
    assert "4.8% of the inputs were rejected" in done.stderr
    assert contents(out) == disk[chosen.frame]
    done = kamim("shards", "join", out, "--max-rejected", 1)
    assert "21 inputs = 20 written + 1 rejected, 1 " in done.stdout


def test_what_a_part_lost_is_named_and_built_again(store, listed, disk, monkeypatch):
    files, root = fsspec.core.url_to_fs(store)
    part_of(listed, store, (1, 2))
    part_of(listed, store, (2, 2))
    real, written = preprocess.building.write_shard, []
    monkeypatch.setattr(
        preprocess.building, "write_shard", lambda j, n, e: (written.append(n), real(j, n, e))[1]
    )
    ledger = f"{root}/{WORK}/part-2-of-2.json"
    content = json.loads(files.cat_file(ledger))

    def lose():
        files.rm_file(f"{root}/shard-000004.tar")

    def cut():
        files.pipe_file(f"{root}/shard-000004.tar", b"cut")

    def miscount():
        files.pipe_file(ledger, json.dumps({**content, "written": 7}).encode())

    def rename():
        files.pipe_file(ledger, json.dumps({**content, "classes": ["a", "b", "c"]}).encode())

    def forget():
        files.rm_file(ledger)

    def halve():
        files.pipe_file(ledger, json.dumps(content).encode()[:20])

    def others():
        files.pipe_file(ledger, json.dumps({**content, "fingerprint": "0"}).encode())

    gone = "shard-000004.tar of part 2/2 is gone, or cut short"
    for harm, words, again in (
        (lose, gone, [4]),
        (cut, gone, [4]),
        (miscount, "part 2/2 has shards that it does not count", []),
        (rename, "part 2/2 has other classes than part 1/2", []),
        (forget, "it lacks part 2/2", []),
        (others, "it lacks part 2/2", []),
        (halve, "it lacks part 2/2", []),
    ):
        harm()
        written.clear()
        with pytest.raises(BuildError, match=rf"{words}; type.* --part 2/2"):
            join_parts(store, 1)
        part_of(listed, store, (2, 2))
        assert written == again
    join_parts(store, 1)
    assert of(store) == disk[FRAMES.frame]


def test_parts_of_other_settings_or_inputs_are_refused(store, listed, disk, source):
    part_of(listed, store, (1, 2))
    with pytest.raises(ValueError, match=r"settings\.grid is 16 there, 8 here"):
        part_of(listed, store, (2, 2), settings(grid=8))
    fewer = open_source(str(source / "class0"))
    with pytest.raises(ValueError, match="files were added, removed or changed"):
        part_of(fewer, store, (2, 2))
    part_of(listed, store, (2, 3))  # of another number of parts: the same shards all the same
    built(listed, store)  # a whole build takes what parts have done
    assert of(store) == disk[FRAMES.frame]


def test_who_may_write_at_the_same_time(listed, disk, tmp_path):
    out = tmp_path / "out"
    place = Place.of(out)
    refused = pytest.raises(UserError, match="another process is writing into")
    part_of(listed, out, (1, 2))
    with hold(place, "part-2-of-2"):
        with refused:
            part_of(listed, out, (2, 2))
        with refused:
            built(listed, out)
        with refused:
            join_parts(out)
        part_of(listed, out, (1, 2))
    with hold(place), refused:
        part_of(listed, out, (2, 2))
    part_of(listed, out, (2, 2))
    join_parts(out, 1)
    assert contents(out) == disk[FRAMES.frame]


def test_a_part_leaves_what_others_are_writing(listed, disk, tmp_path):
    """Only who joins may know that nobody writes any more."""
    out = tmp_path / "out"
    out.mkdir()
    part_of(listed, out, (1, 2))
    end = "0123456789ab.tmp"
    theirs = [out / f"shard-000005.tar.{end}", out / WORK / f"000005.json.{end}"]
    for path in theirs:
        path.write_bytes(b"half")
    part_of(listed, out, (2, 2))
    assert all(path.exists() for path in theirs)
    join_parts(out, 1)
    assert contents(out) == disk[FRAMES.frame]


SLOW = {
    "PYTHONPATH": f"{REPOSITORY}/tests/slow_build:{REPOSITORY}",
    "SLOW_SECONDS": "0.15",  # or on a busy machine a kill comes after the build
}


@pytest.mark.parametrize("kind", ["folder", pytest.param("s3", marks=pytest.mark.slow)])
def test_three_parts_at_once_killed_again_and_again(kind, request, source, disk, tmp_path):
    """SIGKILL to one part after another, each begun again; then they are joined."""
    out = request.getfixturevalue("s3")() if kind == "s3" else tmp_path / "out"
    environment = {**os.environ, **SLOW, "TMPDIR": str(tmp_path / "scratch")}
    rng = random.Random(0)

    def begin(n):
        line = [*KAMIM, "shards", "build", source, out, *SMALL, "--jobs", "1", "--part", f"{n}/3"]
        line += ["--max-rejected", "1"]
        return subprocess.Popen(
            list(map(str, line)), env=environment, start_new_session=True, stderr=subprocess.PIPE
        )

    def rows():
        return sum(name.startswith("00") for name in (Place.of(out) / WORK).sizes())

    parts = {n: begin(n) for n in (1, 2, 3)}
    kills = 0
    for n in (1, 2, 3) * 2:
        goal = rows() + rng.randint(0, 1)
        while rows() < goal and any(each.poll() is None for each in parts.values()):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.2))
        if parts[n].poll() is None:
            os.killpg(parts[n].pid, signal.SIGKILL)
            kills += 1
        parts[n].communicate()
        parts[n] = begin(n)
    for process in parts.values():
        assert process.communicate()[1] is not None
        assert process.returncode == 0
    assert kills >= 2
    assert kamim("shards", "join", out, "--max-rejected", 1).returncode == 0
    assert of(out) == disk[FRAMES.frame]
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.slow
def test_a_build_into_s3_killed_again_and_again(s3, source, disk, tmp_path):
    """SIGKILL to all of its processes; what they had put there counts."""
    out, rng, kills = s3(), random.Random(1), 0
    line = [*KAMIM, "shards", "build", source, out, *SMALL, "--jobs", "2", "--max-rejected", "1"]
    environment = {**os.environ, **SLOW, "TMPDIR": str(tmp_path / "scratch")}

    def rows():
        return sum(name.startswith("00") for name in (Place.of(out) / WORK).sizes())

    for goal in (0, 1, 2, 3, 4):
        process = subprocess.Popen(
            list(map(str, line)), env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )
        while rows() < goal and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    done = subprocess.run(list(map(str, line)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert of(out) == disk[FRAMES.frame]
    assert not list((tmp_path / "scratch").iterdir())


def test_joining_goes_on_wherever_it_was_killed(listed, disk, tmp_path, monkeypatch):
    """On a disk, ended before each of its writes in turn."""
    write = places.write_atomically
    for at in count():
        out = tmp_path / f"out{at}"
        part_of(listed, out, (1, 1))
        numbers = count()

        def dying(path, data, durable=True, numbers=numbers, at=at):
            if next(numbers) == at:
                raise failing.Died
            write(path, data, durable)

        monkeypatch.setattr(places, "write_atomically", dying)
        try:
            join_parts(out, 1)
        except failing.Died:
            assert not (out / "manifest.json").exists()
        else:
            break
        monkeypatch.setattr(places, "write_atomically", write)
        join_parts(out, 1)
        assert contents(out) == disk[FRAMES.frame]
    assert at == 4  # index, rejected, card, manifest


@pytest.mark.parametrize("text", ["", "0/3", "4/3", "1", "1/0", "x/3", "-1/3", "1/3/3", "1.5/3"])
def test_a_part_that_there_is_not_is_one_line(text):
    with pytest.raises(ValueError, match=r"is not i/n with i from 1 to n"):
        parse_part(text)
    assert parse_part("3/3") == (3, 3)


def test_the_command_line_of_stores_and_parts(source, disk, tmp_path):
    url = f"local://{tmp_path}/store"
    build = ["shards", "build", source, url, *SMALL, "--max-rejected", 1, "--jobs", 1]
    done = kamim(*build)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{url}: 21 inputs = 20 written + 1 rejected, 1 ")
    assert f"are in {url}/rejected.jsonl" in done.stderr
    assert contents(tmp_path / "store") == disk[FRAMES.frame]
    done = kamim(*build, "--part", "1/2")
    assert done.stdout == f"{url}, part 1/2: the whole set is finished\n"
    for words, line in (
        (["--part", "3/2"], "--part 3/2 is not i/n"),
        (["--part", "1/2", "--repair"], "--repair works on the whole set"),
        (["--repair"], "--repair works in a folder"),
        (["--detector", "fast,orb"], "detectors is fast there, fast,orb here"),
    ):
        done = kamim(*build, *words)
        assert done.returncode == 2
        assert line in done.stderr
    done = kamim("shards", "join", tmp_path / "nothing")
    assert done.returncode == 2
    assert "holds no parts to join" in done.stderr
    assert not (tmp_path / "nothing").exists()
    for command in ("verify", "inspect", "fidelity"):
        done = kamim("shards", command, "s3://bucket/set")
        assert done.returncode == 2
        assert "s3://bucket/set is not on this machine; copy it" in done.stderr
    done = kamim("shards", "join", "--help")
    assert "Make one finished set of the parts" in done.stdout


@pytest.mark.slow
def test_the_sbatch_file_builds_parts_and_joins_them(source, disk, tmp_path):
    """By a SLURM that runs its jobs at once: the array of parts, then what depends on it."""
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(
        f"""#!{sys.executable}
import os, re, subprocess, sys
from pathlib import Path
words = sys.argv[1:]
if "--wrap" in " ".join(words):
    assert "--dependency=afterok:7" in words, words
    (line,) = [each.removeprefix("--wrap=") for each in words if each.startswith("--wrap=")]
    sys.exit(subprocess.run(["bash", "-c", line]).returncode)
assert words[0] == "--parsable", words
first, last = re.search(r"#SBATCH --array=(\\d+)-(\\d+)", Path(words[1]).read_text()).groups()
count = int(last) - int(first) + 1
for n in range(int(first), int(last) + 1):
    task = dict(os.environ, SLURM_ARRAY_TASK_ID=str(n), SLURM_ARRAY_TASK_COUNT=str(count))
    task["SLURM_CPUS_PER_TASK"] = "1"
    subprocess.run(["bash", *words[1:]], env=task, check=True, stdout=sys.stderr)
print(7)
"""
    )
    fake.chmod(0o755)
    (tmp_path / "bin" / "kamim").write_text(f'#!/bin/sh\nexec {sys.executable} -m kamim "$@"\n')
    (tmp_path / "bin" / "kamim").chmod(0o755)
    out = tmp_path / "out of it"
    example = REPOSITORY / "examples" / "parts.sbatch"
    line = ["bash", example, source, out, *SMALL]
    path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MAX_REJECTED": "1"}
    done = subprocess.run(
        list(map(str, line)), env=os.environ | path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert contents(out) == disk[FRAMES.frame]
    assert len(Path(example).read_text().splitlines()) <= 40
