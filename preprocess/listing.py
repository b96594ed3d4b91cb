"""What lies below a place of a source, by path or URL, in a fixed order.

In: a folder, here or in a store. Out: names, files and their facts. Nothing is followed out of its
folder: such a name comes back with a flaw, or is refused where it is a part of many.
"""

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from preprocess.decode import Rejected
from preprocess.files import join, kind_of, read_file
from shards.errors import UserError
from shards.files import MANIFEST
from shards.remote import storage as remote
from shards.remote.retry import retried
from shards.remote.storage import is_url

LONGEST = 1 << 28  # bytes of a manifest.json that is looked into
OURS = "shards"  # the flaw of a folder that holds a finished set


class Found(NamedTuple):
    """A file below a root: its name there, bytes, a stamp that changes with it, and any flaw.

    A folder comes only with a flaw, and its name ends in a slash.
    """

    name: str
    size: int
    stamp: int
    flaw: str = ""


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


def files_below(folder: str, root: str, home: str) -> Iterator[Found]:
    """Every file of the local `folder` at any depth, in byte order, files before folders.

    A folder comes in place of its files where it cannot be listed (flaw unreadable), leads out of
    `home` (link) or, below `root`, holds a finished set of ours (OURS).
    """
    unlisted: list[OSError] = []
    # followlinks stays off: a link to a parent folder would never end.
    for here, below, files in os.walk(folder, onerror=unlisted.append):
        yield from _folders((error.filename for error in unlisted), root, "unreadable")
        unlisted.clear()
        if here != root and MANIFEST in files and holds_set(here):
            below.clear()
            yield from _folders([here], root, OURS)
            continue
        below.sort(key=os.fsencode)
        for name in sorted(files, key=os.fsencode):
            yield facts_of(os.path.join(here, name), root, home)
        links = (path for name in below if os.path.islink(path := os.path.join(here, name)))
        yield from _folders((path for path in links if not inside(path, home)), root, "link")
    yield from _folders((error.filename for error in unlisted), root, "unreadable")


def _folders(paths: Iterable[str], root: str, flaw: str) -> Iterator[Found]:
    yield from (Found(path[len(root) :].lstrip("/") + "/", 0, 0, flaw) for path in paths)


def facts_of(path: str, root: str, home: str) -> Found:
    """What is known of the local file `path` below `root`; links may lead anywhere in `home`."""
    name = path[len(root) :].lstrip("/")  # relpath costs more than the rest of a listing
    try:
        facts = os.lstat(path)
        if stat.S_ISLNK(facts.st_mode):
            if not inside(path, home):
                return Found(name, 0, 0, "link")
            facts = os.stat(path)
    except OSError:
        return Found(name, 0, 0, "unreadable")
    if not stat.S_ISREG(facts.st_mode):
        return Found(name, 0, 0, "not-a-file")
    return Found(name, facts.st_size, facts.st_mtime_ns)


def inside(path: str, home: str) -> bool:
    """Whether `path`, with all its links followed, lies in `home`."""
    return os.path.commonpath([os.path.realpath(path), home]) == home


def look_up(root: str, names: Iterable[str]) -> Iterator[Found]:
    """The files called `names` below `root`, as a dataset's list names them, in that order."""
    if is_url(root):
        there = {file.name: Found(*file) for file in remote.find(root)}
        yield from (there.get(name, Found(name, 0, 0, "vanished")) for name in names)
        return
    home = os.path.realpath(root)
    folders: dict[str, bool] = {}
    for name in names:
        folder = os.path.dirname(name)
        if folder not in folders:
            safe = ".." not in PurePosixPath(folder).parts and not os.path.isabs(folder)
            folders[folder] = safe and inside(os.path.join(root, folder), home)
        if not folders[folder] or "\0" in name:
            yield Found(name, 0, 0, "link")
        elif _is_gone(path := os.path.join(root, name)):
            yield Found(name, 0, 0, "vanished")
        else:
            yield facts_of(path, root, home)._replace(name=name)


def _is_gone(path: str) -> bool:
    """Whether nothing is there, which os.path.lexists also says of what may not be looked at."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def parts_below(root: str, suffixes: tuple[str, ...]) -> list[Found]:
    """The archives below `root`, by name; `root` itself, as the part "", if it is one.

    Raises UserError if there is none, at one that leads out of the folder or is no file, and at a
    folder that cannot be listed; a finished set of ours below `root` is left out.
    """
    if kind_of(root) == "file":
        return [_whole(root)]
    if is_url(root):
        found = [Found(*file) for file in remote.find(root)]
    else:
        found = list(files_below(root, root, _home(os.path.realpath(root))))
    found = [file for file in found if file.name.lower().endswith((*suffixes, "/"))]
    found = [file for file in found if file.flaw != OURS]
    for file in found:
        if file.flaw:
            raise UserError(f"{join(root, file.name.lstrip('/'))!r} cannot be read: {file.flaw}")
    if not found:
        raise UserError(f"{root} holds no {suffixes[0]}; name one, or a folder of them")
    return sorted(found, key=lambda file: os.fsencode(file.name))


def _whole(path: str) -> Found:
    if is_url(path):
        files, there = remote.filesystem(path)
        return Found("", int(retried(path, lambda: files.info(there))["size"] or 0), 0)
    return Found("", os.stat(path).st_size, 0)


def _home(root: str) -> str:
    """Where links below `root` may lead: the Hugging Face cache keeps all files of a dataset in
    `blobs`, and links to them in `snapshots/REVISION`.
    """
    before, snapshots, _ = root.partition("/snapshots/")
    return before if snapshots and os.path.isdir(os.path.join(before, "blobs")) else root
