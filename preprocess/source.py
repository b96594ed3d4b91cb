"""Where source images come from: a dataset by name, or a folder or tar by path or URL.

In: what a user names. Out: a Source, every input listed in a fixed order without being decoded, and
`read` to fetch the bytes of one.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePosixPath

from preprocess.datasets import NAMED, PLACED, check_counts, list_dataset
from preprocess.decode import Rejected
from preprocess.entry import FLAWS, MAX_BYTES, SUFFIXES, Entry, Source
from preprocess.files import join, kind_of, read_file, read_part
from preprocess.layouts import cifar, demo, finished, parquet
from preprocess.layouts.folder import list_folder
from preprocess.layouts.tar import list_tar
from preprocess.listing import inside, names_in
from shards.errors import UserError
from shards.remote.storage import is_url

AHEAD = 16  # requests under way at a time: a store answers each after tens of milliseconds

__all__ = ["Entry", "Source", "check_outside", "open_source", "read", "read_in_order"]


def open_source(where: str, split: str = "", partial: bool = False) -> Source:
    """List the source `where`: a dataset's name as `imagenet` or `imagenet:PATH`, or the path or
    URL of a folder or an uncompressed tar of class folders.

    Sub-folders of a root, in byte order, are the classes 0, 1, ...; images beside them get label
    -1. `split` names one of a dataset's; empty is its training set. Raises UserError if there is
    no such place or no image in it, and OSError if a store cannot be reached; also UserError,
    unless `partial` takes what is there, if a folder in it cannot be listed or a dataset's classes
    or images are far from those published.
    """
    name, colon, given = where.partition(":")
    if where == "demo":
        source = _demo(split)
    elif name in NAMED or name in PLACED:
        if not given and (colon or name in PLACED):
            raise UserError(_unplaced(name))
        source = list_dataset(name, _place(given), split)
    else:
        source = _list_place(where, split)
    if not partial:
        _check_listed(source)
        if name in NAMED:
            check_counts(source, name, split)
    if not source.entries:
        raise UserError(
            f"no images under {source.root}; expected class folders of files named "
            f"{', '.join(SUFFIXES[:4])} ... ({source.ignored} other files){_hint(source.root)}"
        )
    return source


def _place(where: str) -> str:
    """`where` in full: links and ~ resolved, or a URL as it is."""
    where = where.removeprefix("file://")
    if is_url(where) or not where:
        return where.rstrip("/")
    return os.path.realpath(os.path.expanduser(where))


def _demo(split: str) -> Source:
    if split:
        raise UserError(f"the demo has no split {split}; leave --split out")
    entries = [Entry(name, label, 0) for name, label in demo.names()]
    return Source("demo", str(demo.folder()), entries, list(demo.PHOTOGRAPHS), 0)


def _list_place(where: str, split: str) -> Source:
    place = _place(where)
    kind = kind_of(place)
    if not kind:
        raise UserError(
            f"no source at {where}: {_nearest(where)}give a folder or a .tar by its path or URL, "
            f"or a dataset as NAME or NAME:PATH; there are demo, {', '.join((*NAMED, *PLACED))}"
        )
    if split:
        return list_dataset("folder", place, split)
    if kind == "folder":
        return list_folder(place)
    try:
        return list_tar(place)
    except ValueError:
        if {".tar", ".tgz"} & set(PurePosixPath(place).suffixes):
            raise
        raise UserError(
            f"{where} is a file, and no uncompressed .tar; give a folder of photographs, such a "
            f".tar, or a dataset as NAME:PATH{_hint(place)}"
        ) from None


def _nearest(where: str) -> str:
    """The dataset that was likely meant, as the beginning of a sentence."""
    name, colon, given = where.partition(":")
    near = get_close_matches(name.lower(), ("demo", *NAMED, *PLACED), 1)
    if not near:
        return ""
    place = f":{given or 'PATH'}" if near[0] in PLACED or (colon and near[0] != "demo") else ""
    return f"is it {near[0]}{place}? Else "


def _unplaced(name: str) -> str:
    """What to say of a name whose place is not given."""
    if name in NAMED:
        return f"{name}: gives no place; give {name}:PATH, or {name} alone to have it looked for"
    line = f"{name} is read from a place of yours; give {name}:PATH (make: DATA=PATH)"
    return f"{line}, or ./{name} for the folder of that name" if os.path.isdir(name) else line


def check_outside(source: Source, out: Path) -> None:
    """UserError if `out` is in the source's folder, whose next listing would then be another."""
    root = source.root
    if not is_url(root) and os.path.isdir(root) and inside(str(out), os.path.realpath(root)):
        raise UserError(
            f"{out} lies in the source's folder {root}, and its files would be inputs of the next "
            "build; name a folder outside of it (make: OUT=folder)"
        )


def _check_listed(source: Source) -> None:
    """UserError at a folder that could not be listed: nobody knows how many images are in it."""
    for entry in source.entries:
        if entry.flaw == "unreadable" and entry.name.endswith("/"):
            raise UserError(
                f"{join(source.root, entry.name)!r} cannot be listed, and its images would be left "
                "out; make it readable for this user (chmod -R u+rX), or take what is there by "
                "--partial (make: FLAGS=--partial)"
            )


def _hint(root: str) -> str:
    """What else may lie at a place without images, as the end of a sentence."""
    names = names_in(root) if kind_of(root) == "folder" else [root]
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if any(name.endswith(suffix) for name in names):
            return f"; if it holds a {kind} set, say {kind}:{root}"
    return ""


def read(kind: str, root: str | Path, entry: Entry) -> bytes:
    """The bytes of `entry`. Raises Rejected with reason vanished, unreadable, not-a-file, link,
    too-large or changed; OSError if a store cannot be reached.
    """
    if entry.flaw:
        raise Rejected(entry.flaw, FLAWS[entry.flaw])
    if entry.size > MAX_BYTES:
        raise Rejected("too-large", f"{entry.size} bytes, the limit is {MAX_BYTES}")
    place = os.fspath(root)
    if kind == "folder":
        data = read_file(join(place, entry.name), entry.size + 1)
    elif kind == "tar":
        data = read_part(join(place, entry.part), entry.offset, entry.size)
    elif kind == "cifar":
        return cifar.image(place, entry.part, entry.offset)
    elif kind == "parquet":
        return parquet.image(place, entry.part, entry.offset)
    elif kind == "shards":
        return finished.image(place, entry.offset)
    else:
        return demo.read(Path(root), entry.name)
    if len(data) != entry.size:
        raise Rejected("changed", f"listed with {entry.size} bytes, read {len(data)}")
    return data


def read_in_order(
    kind: str, root: str, entries: Sequence[Entry]
) -> Iterator[tuple[Entry, Callable[[], bytes]]]:
    """Each of `entries` with a call for its bytes, which does as `read`.

    From a store, the bytes of AHEAD entries are under way before they are asked for.
    """
    if not is_url(root) or kind == "parquet":  # a Parquet row group is one request as it is
        yield from ((entry, partial(read, kind, root, entry)) for entry in entries)
        return
    under_way: deque[tuple[Entry, Future[bytes]]] = deque()
    pool = ThreadPoolExecutor(AHEAD)
    try:
        for entry in entries:
            under_way.append((entry, pool.submit(read, kind, root, entry)))
            if len(under_way) > AHEAD:
                entry, future = under_way.popleft()
                yield entry, future.result
        yield from ((entry, future.result) for entry, future in under_way)
    finally:
        pool.shutdown(cancel_futures=True)
