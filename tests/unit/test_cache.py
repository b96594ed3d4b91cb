"""The cache of a remote set's files, of a store in memory: what comes, stays and goes."""

import hashlib
import os
import re
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from shards.remote import cache
from shards.remote.cache import Copies
from shards.spec import File

SIZES = [100, 300, 200, 100, 100]  # bytes of the shards
INDEX = 10


class Shelf:
    """A store: file contents by name, and the names that were asked for."""

    url = "mem://set"

    def __init__(self, sizes=SIZES):
        names = [f"shard-{number:06d}.tar" for number in range(len(sizes))]
        sizes = dict(zip([*names, "index.npy"], [*sizes, INDEX], strict=True))
        self.files = {name: name[-8:].encode() * 99 for name in sizes}
        self.files = {name: data[: sizes[name]] for name, data in self.files.items()}
        rows = [
            File(name, 1, len(data), hashlib.sha256(data).hexdigest())
            for name, data in self.files.items()
        ]
        self.manifest = SimpleNamespace(shards=rows[:-1], index=rows[-1])
        self.asked = []

    def download(self, name, part, needed):
        self.asked.append(int(name[6:12]) if name.startswith("shard") else name)
        data = self.files[name]
        if isinstance(data, list):  # what comes first, then what comes next
            data = data.pop(0) if len(data) > 1 else data[0]
        if data is None:
            raise FileNotFoundError(f"{self.url}/{name} is not there")
        part.write_bytes(data)


@pytest.fixture
def shelf():
    return Shelf()


def copies_of(shelf, folder, limit=0, **more):
    return Copies(shelf, shelf.manifest, folder, limit, **more)


def shard(copies, number, *how, **more):
    return copies.hold(copies.store.manifest.shards[number], *how, **more)


def here(copies):
    """Numbers of the shards in the folder."""
    return sorted(int(path.name[6:12]) for path in copies.folder.glob("shard-*.tar"))


def text_of(held):
    return os.pread(held.descriptor, 1000, 0)


def test_a_file_comes_once_whole_and_is_found_again(shelf, tmp_path):
    copies = copies_of(shelf, tmp_path)
    for number in (1, 1, 0, 1):
        held = shard(copies, number)
        assert text_of(held) == shelf.files[f"shard-{number:06d}.tar"]
        del held
    again = copies_of(shelf, tmp_path)  # another process
    assert text_of(shard(again, 1)) == shelf.files["shard-000001.tar"]
    assert shelf.asked == [1, 0]
    assert not list(tmp_path.rglob("*.part"))


def test_a_set_has_a_folder_by_what_it_holds(shelf, tmp_path):
    name = copies_of(shelf, tmp_path).folder.name
    assert name == "kamim-21a9201f448333d472d480b63a93f33f"  # caches that people have are found
    shelf.manifest.shards[0] = File("shard-000000.tar", 1, 100, "0" * 64)
    other = copies_of(shelf, tmp_path).folder.name
    assert re.fullmatch("kamim-[0-9a-f]{32}", other)
    assert other != name


@pytest.mark.parametrize(("checksum", "asked"), [(True, [0, 1, 0, 1]), (False, [0, 1, 1])])
def test_what_is_damaged_here_is_fetched_again(checksum, asked, shelf, tmp_path):
    """Without checksum only what has another size is found."""
    copies = copies_of(shelf, tmp_path)
    for number in (0, 1):
        shard(copies, number)
    (copies.folder / "shard-000000.tar").write_bytes(b"x" * 100)
    (copies.folder / "shard-000001.tar").write_bytes(b"short")
    more = {} if checksum else {"checksum": False}  # hashed unless one says otherwise
    again = copies_of(shelf, tmp_path, **more)
    for number in (0, 1, 0, 1):
        shard(again, number)
    assert shelf.asked == asked


def test_what_arrives_damaged_is_asked_for_once_more(shelf, tmp_path):
    copies, data = copies_of(shelf, tmp_path), shelf.files["shard-000000.tar"]
    shelf.files["shard-000000.tar"] = [b"short", data]
    assert text_of(shard(copies, 0)) == data
    assert shelf.asked == [0, 0]
    shelf.files["shard-000001.tar"] = [b"x" * 300]
    with pytest.raises(ValueError, match=r"^mem://set/shard-000001.tar is damaged: its sha256"):
        shard(copies, 1)
    assert shelf.asked == [0, 0, 1, 1]
    shelf.files["shard-000002.tar"] = [None]
    with pytest.raises(ValueError, match=r"shard-000002.tar is not there, the manifest lists it"):
        shard(copies, 2)
    assert shelf.asked == [0, 0, 1, 1, 2]
    assert here(copies) == [0]
    assert not list(tmp_path.rglob("*.part"))


def used(copies, *numbers):
    """These shards were used in this order, long ago."""
    for at, number in enumerate(numbers):
        os.utime(copies.folder / f"shard-{number:06d}.tar", (at, at))


def test_what_somebody_else_keeps_beside_the_sets_stays(shelf, tmp_path):
    copies = copies_of(shelf, tmp_path, limit=500)
    others = [tmp_path / "kamim-main" / name for name in ("a.csv", "b.part", "c.2.part")]
    others += [copies.folder / "own" / "d.csv"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 400)
        os.utime(path, (0, 0))
    for number in (0, 1, 2, 3):
        shard(copies, number)
    assert all(path.exists() for path in others)
    assert len(here(copies)) < 4


def test_room_is_made_of_what_is_longest_unused(shelf, tmp_path):
    copies = copies_of(shelf, tmp_path, limit=500)
    for number in (0, 3, 4):
        shard(copies, number)
    used(copies, 3, 0, 4)
    shard(copies, 2)  # 500 bytes, exactly
    assert here(copies) == [0, 2, 3, 4]
    used(copies, 3, 0, 4, 2)
    shard(copies, 1)  # three must go, and no fourth
    assert here(copies) == [1, 2]


def test_what_the_order_reads_last_goes_first_and_what_it_reads_sooner_stays(tmp_path):
    copies = copies_of(Shelf([100] * 6), tmp_path, limit=300)
    for number in (0, 3, 4):
        shard(copies, number)
    used(copies, 0, 3, 4)
    waited = []

    def later():
        waited.append(here(copies))
        if len(waited) > 3:
            raise InterruptedError
        return False

    def uses():
        return np.array([1, 5, 7, 9, 2, 0])  # 3 is read last

    shard(copies, 1, lambda: False, uses)
    assert here(copies) == [0, 1, 4]
    with pytest.raises(InterruptedError):  # 2 is read after all that is here
        shard(copies, 2, later, uses)
    assert waited[-1] == [0, 1, 4]
    assert copies.store.asked == [0, 3, 4, 1]
    shard(copies, 2, lambda: True, uses)  # needed at once
    assert here(copies) == [0, 2, 4]


def test_other_sets_go_before_one_that_is_read(tmp_path):
    shelf, other = Shelf([100] * 3), Shelf([90] * 3)
    copies = copies_of(shelf, tmp_path, limit=390)
    theirs = copies_of(other, tmp_path)
    for number in (0, 1):
        shard(copies, number)
        shard(theirs, number)
    used(copies, 0, 1)  # theirs were used later
    shard(copies, 2, lambda: False, lambda: np.array([8, 9, 7]))
    assert here(copies) == [0, 1, 2]
    assert len(here(theirs)) == 1


def test_what_is_needed_is_fetched_whatever_the_limit_and_what_is_held_stays(shelf, tmp_path):
    copies = copies_of(shelf, tmp_path, limit=1)
    held = shard(copies, 0)
    shard(copies, 1)
    shard(copies, 2)
    assert here(copies) == [0, 2]
    assert text_of(held) == shelf.files["shard-000000.tar"]
    gone = weakref.ref(held)
    del held
    assert gone() is None
    shard(copies, 3)
    assert here(copies) == [3]


def test_a_download_of_others_counts_as_what_it_will_be(shelf, tmp_path):
    copies = copies_of(shelf, tmp_path, limit=400)
    shard(copies, 0)
    (copies.folder / "shard-000001.tar.300.part").write_bytes(b"half")
    assert {(entry.path.name, entry.bytes) for entry in copies.listed()} == {
        ("shard-000000.tar", 100),
        ("shard-000001.tar.300.part", 300),
    }


@pytest.mark.parametrize(
    ("limit", "window", "line"),
    [
        (0, 5, ""),  # no limit
        (810, 5, ""),  # all of it, and the index
        (809, 5, "a window of 5 shards and the next take up to 8e-07 GB; use --cache-limit 810, "),
        (809, 5, "or --window 1$"),
        (610, 1, ""),
        (609, 1, "a window of 1 shards and the next take up to 6e-07 GB; use --cache-limit 610$"),
        (810, 2, ""),  # twice the largest two are more than all
    ],
)
def test_a_limit_below_two_windows_is_refused(limit, window, line, shelf, tmp_path):
    copies = copies_of(shelf, tmp_path, limit)
    if not line:
        copies.check(window)
        return
    with pytest.raises(ValueError, match=line):
        copies.check(window)


def test_windows_of_more_files_than_may_be_open_are_refused(shelf, tmp_path, monkeypatch):
    copies = copies_of(shelf, tmp_path)
    for files, window, refused in (
        (110, 5, False),
        (109, 5, True),
        (109, 4, False),
        (-1, 5, False),
    ):
        monkeypatch.setattr(cache.resource, "getrlimit", lambda _, files=files: (files, files))
        if refused:
            with pytest.raises(ValueError, match=f"more open files than the {files} allowed"):
                copies.check(window)
        else:
            copies.check(window)
