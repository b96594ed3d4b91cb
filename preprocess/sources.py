"""Where source images come from: a folder or a tar of class folders, or the demo photographs.

In: a path or the word `demo`. Out: a Source: every input listed in a fixed order without being
decoded, and `read` to fetch the bytes of one. Links that lead out of the source are not followed.
"""

import errno
import hashlib
import json
import os
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from preprocess import demo
from preprocess.decode import Rejected

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_BYTES = 1 << 30
# Not the image's fault: a build stops, and goes on when the machine is well again.
MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
FLAWS = {
    "link": "it leads out of the source; build from the folder it leads to, or copy the file in",
    "not-a-file": "it is a folder, pipe, socket, device, link or sparse member",
    "unreadable": "its facts could not be read when the source was listed",
}


class Entry(NamedTuple):
    """One input: its name below the root, label, and what tells one version of it from another.

    `offset` is where its bytes begin in a tar, `stamp` its modification time in a folder (ns),
    `flaw` why it cannot be read, if listing already showed it.
    """

    name: str
    label: int
    size: int
    offset: int = 0
    stamp: int = 0
    flaw: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A listed source. `classes` name the labels; `ignored` files have no image's name."""

    kind: str
    root: Path
    entries: list[Entry]
    classes: list[str]
    ignored: int

    def description(self) -> dict[str, Any]:
        """What the manifest says of the source; equal descriptions mean equal inputs."""
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(json.dumps(entry).encode("ascii") + b"\n")
        facts = {"kind": self.kind, "inputs": len(self.entries), "ignored": self.ignored}
        return {**facts, "sha256": digest.hexdigest()}


def open_source(where: str) -> Source:
    """List the source at `where`: `demo`, a .tar file, or a folder.

    Sub-folders of the root, in byte order, are the classes 0, 1, ...; images beside them get
    label -1. Raises ValueError if there is no such place or no image in it.
    """
    if where == "demo":
        entries = [Entry(name, label, 0) for name, label in demo.names()]
        return Source("demo", demo.folder(), entries, list(demo.PHOTOGRAPHS), 0)
    path = Path(where)
    if path.is_dir():
        source = _list_folder(path)
    elif path.is_file():
        source = _list_tar(path)
    else:
        raise ValueError(f"no source at {where}: give a folder, a .tar file, or the word demo")
    if not source.entries:
        raise ValueError(
            f"no images under {where}; expected class folders of files named "
            f"{', '.join(SUFFIXES[:4])} ... ({source.ignored} other files)"
        )
    return source


def read(kind: str, root: Path, entry: Entry) -> bytes:
    """The bytes of `entry`. Raises Rejected with reason vanished, unreadable, not-a-file, link,
    too-large or changed, and OSError where the machine is at fault.
    """
    if entry.flaw:
        raise Rejected(entry.flaw, FLAWS[entry.flaw])
    if kind == "demo":
        return demo.read(root, entry.name)
    if entry.size > MAX_BYTES:
        raise Rejected("too-large", f"{entry.size} bytes, the limit is {MAX_BYTES}")
    path = root if kind == "tar" else os.path.join(root, entry.name)
    try:
        # Without O_NONBLOCK, opening a pipe that took a file's name would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Rejected("not-a-file", "it is a folder, pipe, socket or device")
            file.seek(entry.offset)
            data = file.read(entry.size + (kind == "folder"))
    except FileNotFoundError:
        raise Rejected("vanished", "it was listed and is gone") from None
    except OSError as error:
        if error.errno in MACHINE:
            raise
        raise Rejected("unreadable", error.strerror or str(error)) from None
    if len(data) != entry.size:
        raise Rejected("changed", f"listed with {entry.size} bytes, read {len(data)}")
    return data


def _list_folder(root: Path) -> Source:
    entries: list[Entry] = []
    ignored = 0
    home = os.path.realpath(root)
    children = sorted(os.scandir(root), key=lambda child: os.fsencode(child.name))
    folders = [child for child in children if child.is_dir() and not child.name.startswith(".")]
    classes: list[str] = []
    for folder in folders:
        if folder.is_symlink() and not _inside(folder.path, home):
            entries.append(Entry(folder.name, -1, 0, flaw="link"))
            continue
        label = len(classes)
        classes.append(folder.name)
        # followlinks stays off: a link to a parent folder would never end.
        for here, below, files in os.walk(folder.path):
            below.sort(key=os.fsencode)
            for name in sorted(files, key=os.fsencode):
                found = _entry(os.path.join(here, name), root, home, label)
                ignored += found is None
                entries += [found] if found else []
    for child in children:
        if not child.is_dir() and not child.name.startswith("."):
            found = _entry(child.path, root, home, -1)
            ignored += found is None
            entries += [found] if found else []
    return Source("folder", root, entries, classes, ignored)


def _entry(path: str, root: Path, home: str, label: int) -> Entry | None:
    """The entry of one file of a folder, or None if it is not named as an image."""
    if not path.lower().endswith(SUFFIXES):
        return None
    name = os.path.relpath(path, root)
    try:
        facts = os.lstat(path)
        if stat.S_ISLNK(facts.st_mode):
            if not _inside(path, home):
                return Entry(name, label, 0, flaw="link")
            facts = os.stat(path)
    except OSError:
        return Entry(name, label, 0, flaw="unreadable")
    if not stat.S_ISREG(facts.st_mode):
        return Entry(name, label, 0, flaw="not-a-file")
    return Entry(name, label, facts.st_size, 0, facts.st_mtime_ns)


def _inside(path: str, home: str) -> bool:
    return os.path.commonpath([os.path.realpath(path), home]) == home


def _list_tar(path: Path) -> Source:
    """Entries of an uncompressed tar, by name; classes are the folders below the one they share.

    Only headers are read. Names are data here and never become paths, so nothing can escape.
    """
    found: list[Entry] = []
    ignored = 0
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # 1 kB an image
                if info.isdir() or not info.name.lower().endswith(SUFFIXES):
                    ignored += not info.isdir()
                    continue
                flaw = "" if info.isreg() and not info.issparse() else "not-a-file"
                name = info.name.removeprefix("./")
                found.append(Entry(name, -1, info.size, info.offset_data, flaw=flaw))
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a whole uncompressed .tar ({error}); if it is compressed, unpack it "
            "once with gunzip or the like, so that images can be read in any order"
        ) from None
    found.sort()
    folders = [entry.name.rpartition("/")[0].strip("/") for entry in found]
    shared = os.path.commonpath(folders) if found else ""
    tops = [folder[len(shared) :].strip("/").partition("/")[0] for folder in folders]
    classes = sorted(set(tops) - {""})
    labels = {name: label for label, name in enumerate(classes)}
    entries = [
        entry._replace(label=labels.get(top, -1)) for entry, top in zip(found, tops, strict=True)
    ]
    return Source("tar", path, entries, classes, ignored)
