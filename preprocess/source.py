"""A source: its inputs in a fixed order, listed without being decoded, and the bytes of each.

Layouts fill it with what is found below a path or URL. Nothing is followed out of its folder: such
a name comes back with a flaw, or is refused where it is a part of many.
"""

import hashlib
import json
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from preprocess.decode import Rejected
from preprocess.files import join, kind_of, read_file, read_part
from shards.errors import UserError
from shards.files import MANIFEST
from shards.remote import storage as remote
from shards.remote.retry import retried
from shards.remote.storage import is_url

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
KEPT = (*SUFFIXES, "/")  # how the names end of what becomes an entry: images, flawed folders
MAX_BYTES = 1 << 30
MAX_CLASSES = 1_000_000  # a label beyond is damage
AHEAD = 16  # requests under way at a time: a store answers each after tens of milliseconds
FLAWS = {
    "link": "it leads out of the source, or to a folder; build from there, or copy the files in",
    "not-a-file": "it is a folder, pipe, socket, device, link or sparse member",
    "unreadable": "it could not be read, or as a folder listed, when the source was listed",
    "vanished": "the dataset's list names it and it is not there",
}
OURS = "shards"  # the flaw of a folder that holds a finished set of ours
LONGEST = 1 << 28  # bytes of a manifest.json that is looked into
SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation"},
    "test": {"test", "testing"},
}  # by the words that tell them in the names of files


class Entry(NamedTuple):
    """One input: its name below the root, label, and what tells one version of it from another.

    `part` is the file below the root that holds it (empty: the root itself, or a file of its own),
    `offset` where it begins there: a byte in a tar, else the number of a row. `stamp` is the
    modification time of a file (ns) or of a tar's member (s), a store's tag as a number, a checksum
    of the pixels (CIFAR), or one of a part's footer (Parquet). `flaw` is why it cannot be read, if
    listing already showed it; a folder comes only with a flaw, as one entry whose name ends in a
    slash.
    """

    name: str
    label: int
    size: int
    offset: int = 0
    stamp: int = 0
    flaw: str = ""
    part: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A listed source. `kind` says how an image is read: from a folder, a tar, or by the layout of
    that name. `root` is a path or URL, `classes` name the labels; `ignored` files have no image's
    name; `sets` are folders in it, left out, of finished shards of ours.
    """

    kind: str
    root: str
    entries: list[Entry]
    classes: list[str]
    ignored: int = 0
    sets: tuple[str, ...] = ()

    def description(self) -> dict[str, Any]:
        """What the manifest says of the source; equal descriptions mean equal inputs."""
        digest = hashlib.sha256()
        for entry in self.entries:
            facts = entry if entry.part else entry[:-1]
            digest.update(json.dumps(facts).encode("ascii") + b"\n")
        described = {"kind": self.kind, "inputs": len(self.entries), "ignored": self.ignored}
        return {**described, "sha256": digest.hexdigest()}

    def read(self, entry: Entry) -> bytes:
        """The bytes of `entry`. Raises Rejected with reason vanished, unreadable, not-a-file, link,
        too-large or changed; OSError if a store cannot be reached.
        """
        if entry.flaw:
            raise Rejected(entry.flaw, FLAWS[entry.flaw])
        if entry.size > MAX_BYTES:
            raise Rejected("too-large", f"{entry.size} bytes, the limit is {MAX_BYTES}")
        if self.kind == "folder":
            data = read_file(join(self.root, entry.name), entry.size + 1)
        elif self.kind == "tar":
            data = read_part(join(self.root, entry.part), entry.offset, entry.size)
        else:
            image: bytes = import_module(f"preprocess.layouts.{self.kind}").image(self.root, entry)
            return image
        if len(data) != entry.size:
            raise Rejected("changed", f"listed with {entry.size} bytes, read {len(data)}")
        return data

    def read_in_order(
        self, entries: Sequence[Entry]
    ) -> Iterator[tuple[Entry, Callable[[], bytes]]]:
        """Each of `entries` with a call for its bytes, which does as `read`.

        From a store, the bytes of AHEAD entries are under way before they are asked for.
        """
        if not is_url(self.root) or self.kind == "parquet":  # a row group is one request as it is
            yield from ((entry, partial(self.read, entry)) for entry in entries)
            return
        under_way: deque[tuple[Entry, Future[bytes]]] = deque()
        pool = ThreadPoolExecutor(AHEAD)
        try:
            for entry in entries:
                under_way.append((entry, pool.submit(self.read, entry)))
                if len(under_way) > AHEAD:
                    entry, future = under_way.popleft()
                    yield entry, future.result
            yield from ((entry, future.result) for entry, future in under_way)
        finally:
            pool.shutdown(cancel_futures=True)


def names_in(folder: str) -> list[str]:
    """Names right below a folder, in byte order; none if there is no such folder.

    Raises UserError if a folder here cannot be listed.
    """
    if not is_url(folder):
        names = [child.name for child in children_of(folder)] if os.path.isdir(folder) else []
    else:
        files, path = remote.filesystem(folder)
        files.invalidate_cache()
        try:
            rows = retried(folder, lambda: files.ls(path, detail=False))
        except FileNotFoundError:
            rows = []
        names = [row.rstrip("/").rpartition("/")[2] for row in rows]
    return sorted(names, key=os.fsencode)


def children_of(folder: str) -> list[os.DirEntry[str]]:
    """What lies right below a local folder, in byte order; UserError if it cannot be listed."""
    try:
        with os.scandir(folder) as children:
            return sorted(children, key=lambda child: os.fsencode(child.name))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be listed ({error.strerror or error}); make it readable for this "
            "user, or name another place"
        ) from None


def holds_set(folder: str) -> bool:
    """Whether a manifest.json of ours, whole or not, lies right below `folder`."""
    try:
        data = read_file(join(folder, MANIFEST), LONGEST)
    except Rejected:
        return False
    return b'"fingerprint"' in data and b'"format_version"' in data


def files_below(folder: str, root: str, home: str, label: int = -1) -> Iterator[Entry]:
    """Every file of the local `folder` at any depth, in byte order, files before folders.

    A folder comes in place of its files if it cannot be listed (flaw unreadable), leads out of
    `home` (link) or, below `root`, holds a finished set of ours (OURS).
    """

    def flawed(paths: Iterable[str], flaw: str) -> Iterator[Entry]:
        names = (path[len(root) :].lstrip("/") + "/" for path in paths)
        return (Entry(name, label, 0, flaw=flaw) for name in names)

    unlisted: list[OSError] = []
    # followlinks stays off: a link to a parent folder would never end.
    for here, below, files in os.walk(folder, onerror=unlisted.append):
        yield from flawed((error.filename for error in unlisted), "unreadable")
        unlisted.clear()
        if here != root and MANIFEST in files and holds_set(here):
            below.clear()
            yield from flawed([here], OURS)
            continue
        below.sort(key=os.fsencode)
        for name in sorted(files, key=os.fsencode):
            yield entry_of(os.path.join(here, name), root, home, label)
        paths = (os.path.join(here, name) for name in below)
        yield from flawed((path for path in paths if os.path.islink(path)), "link")
    yield from flawed((error.filename for error in unlisted), "unreadable")


def entry_of(path: str, root: str, home: str, label: int = -1) -> Entry:
    """What is known of the local file `path` below `root`; links may lead anywhere in `home`."""
    name = path[len(root) :].lstrip("/")  # relpath costs more than the rest of a listing
    try:
        facts = os.lstat(path)
        if stat.S_ISLNK(facts.st_mode):
            if not inside(path, home):
                return Entry(name, label, 0, flaw="link")
            facts = os.stat(path)
    except OSError:
        return Entry(name, label, 0, flaw="unreadable")
    if not stat.S_ISREG(facts.st_mode):
        return Entry(name, label, 0, flaw="not-a-file")
    return Entry(name, label, facts.st_size, 0, facts.st_mtime_ns)


def inside(path: str, home: str) -> bool:
    """Whether `path`, with all its links followed, lies in `home`."""
    return os.path.commonpath([os.path.realpath(path), home]) == home


def look_up(root: str, listed: Iterable[tuple[str, int]]) -> Iterator[Entry]:
    """The files below `root` that a dataset's list names, (name, label) each, in that order."""
    if is_url(root):
        there = {file.name: file for file in remote.find(root)}
        for name, label in listed:
            file = there.get(name)
            size, stamp = (file.size, file.stamp) if file else (0, 0)
            yield Entry(name, label, size, 0, stamp, "" if file else "vanished")
        return
    home = os.path.realpath(root)
    folders: dict[str, bool] = {}
    for name, label in listed:
        folder = os.path.dirname(name)
        if folder not in folders:
            strange = "\0" in folder or ".." in PurePosixPath(folder).parts
            safe = not strange and not os.path.isabs(folder)
            folders[folder] = safe and inside(os.path.join(root, folder), home)
        if not folders[folder] or "\0" in name:
            yield Entry(name, label, 0, flaw="link")
        elif _is_gone(path := os.path.join(root, name)):
            yield Entry(name, label, 0, flaw="vanished")
        else:
            yield entry_of(path, root, home, label)._replace(name=name)


def _is_gone(path: str) -> bool:
    """Whether nothing is there. os.path.lexists also says so of what may not be looked at."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def parts_below(root: str, suffix: str) -> list[Entry]:
    """The archives below `root`, by name; `root` itself, as the part "", if it is one.

    Raises UserError if there is none, at one that leads out of the folder or is no file, and at a
    folder that cannot be listed; a finished set of ours below `root` is left out.
    """
    if kind_of(root) == "file":
        return [Entry("", -1, _size(root))]
    if is_url(root):
        found = [Entry(file.name, -1, file.size) for file in remote.find(root)]
    else:
        found = list(files_below(root, root, _home(os.path.realpath(root))))
    found = [file for file in found if file.name.lower().endswith((suffix, "/"))]
    found = [file for file in found if file.flaw != OURS]
    for file in found:
        if file.flaw:
            raise UserError(f"{join(root, file.name.lstrip('/'))!r} cannot be read: {file.flaw}")
    if not found:
        raise UserError(f"{root} holds no {suffix}; name one, or a folder of them")
    return sorted(found, key=lambda file: os.fsencode(file.name))


def _size(path: str) -> int:
    if is_url(path):
        files, there = remote.filesystem(path)
        return int(retried(path, lambda: files.info(there))["size"] or 0)
    return os.stat(path).st_size


def _home(root: str) -> str:
    """Where links below `root` may lead: the Hugging Face cache keeps all files of a dataset in
    `blobs`, and links to them in `snapshots/REVISION`.
    """
    before, snapshots, _ = root.partition("/snapshots/")
    return before if snapshots and os.path.isdir(os.path.join(before, "blobs")) else root


def of_split(names: list[str], split: str) -> list[str]:
    """The `names` of `split` (empty: train), in their order, by the words in them; all of them, if
    none tells its split and none was asked for.

    Raises UserError if only others are there, or if some names tell and some do not.
    """
    told = {name: found for name in names if (found := _split_of(name))}
    if names == [""] or not (told or split):
        return names
    silent = [name for name in names if name not in told]
    if silent:
        how = "as others do; move it away" if told else "so leave --split out"
        raise UserError(f"{silent[0]!r} does not tell its split, {how}, or name one file")
    chosen = [name for name in names if told[name] == (split or "train")]
    if not chosen:
        there = ", ".join(sorted(set(told.values())))
        raise UserError(f"there is no split {split or 'train'}; by --split there is {there}")
    return chosen


def _split_of(name: str) -> str:
    """The split that the words of a path tell, the file's own name first."""
    for piece in reversed(name.split("/")):
        words = set(re.split(r"[^a-z]+", piece.lower()))
        for split, telling in SPLITS.items():
            if words & telling:
                return split
    return ""
