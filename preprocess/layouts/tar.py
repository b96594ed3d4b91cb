"""An uncompressed tar of class folders, read in place.

Only headers are looked at; names are data here and never become paths, so nothing can escape.
"""

import math
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from preprocess.files import opened
from preprocess.source import SUFFIXES, Entry, Source
from shards.errors import UserError

PART = 1 << 20


def list_tar(where: str) -> Source:
    """Entries of an uncompressed tar, by name; classes are the folders below the one they share."""
    endings = Counter[str]()

    def counted(infos: Iterator[tarfile.TarInfo]) -> Iterator[tarfile.TarInfo]:
        for info in infos:
            endings[os.path.splitext(info.name)[1].lower()] += 1
            yield info

    with opened(where) as file:
        found, ignored = images_of(counted(members(file, where)))
    if endings[".cls"]:
        raise UserError(f"{where} is a WebDataset tar, with labels; say webdataset:{where}")
    found.sort()
    ways = (entry.name.split("/")[:-1] for entry in found)
    folders = ["/".join(part for part in way if part not in ("", ".")) for way in ways]
    shared = os.path.commonpath(folders) if found else ""
    tops = [folder[len(shared) :].strip("/").partition("/")[0] for folder in folders]
    return by_class(where, found, tops, ignored)


def by_class(where: str, found: list[Entry], names: list[str], ignored: int) -> Source:
    """The source of the entries `found`, whose classes are called `names`; empty: it has none."""
    classes = sorted(set(names) - {""})
    labels = {name: label for label, name in enumerate(classes)} | {"": -1}
    pairs = zip(found, names, strict=True)
    entries = [entry._replace(label=labels[name]) for entry, name in pairs]
    return Source("tar", where, entries, classes, ignored)


def images_of(infos: Iterable[tarfile.TarInfo], folder: str = "") -> tuple[list[Entry], int]:
    """Entries of the members that are named as images, below `folder`, and how many are not."""
    images, ignored = [], 0
    for info in infos:
        if info.isdir() or not info.name.lower().endswith(SUFFIXES):
            ignored += not info.isdir()
        else:
            images.append(entry_of(info, folder + info.name.removeprefix("./")))
    return images, ignored


def entry_of(info: tarfile.TarInfo, name: str, label: int = -1, part: str = "") -> Entry:
    """The entry of a member: its bytes are read where they lie."""
    flaw = "" if info.isreg() and not info.issparse() else "not-a-file"
    stamp = int(info.mtime) if math.isfinite(info.mtime) else 0  # PAX has any float
    return Entry(name, label, info.size, info.offset_data, stamp, flaw, part)


def members(
    file: BinaryIO, where: str, start: int = 0, end: int | None = None
) -> Iterator[tarfile.TarInfo]:
    """Members of the tar in bytes `start` to `end` of `file`, their places counted in `file`.

    Raises UserError, calling it `where`, unless it is whole: tarfile takes a damaged header for
    the end, and so would lose all that follows.
    """
    try:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # 1 kB per image
                if info.size < 0 or (end is not None and info.offset_data + info.size > end):
                    raise tarfile.ReadError(f"a header at byte {info.offset} has a wrong size")
                yield info
            file.seek(archive.offset)
            left = PART if end is None else end - archive.offset
            while part := file.read(max(0, min(PART, left))):  # zeros, to the end
                if part.strip(b"\0"):
                    raise tarfile.ReadError(f"data, and no header, behind byte {archive.offset}")
                left -= 0 if end is None else len(part)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        if "range requests" in str(error):  # fsspec's words
            raise UserError(
                f"the server of {where} gives whole files only; download it, or name a server that "
                "gives parts of files (range requests)"
            ) from None
        raise UserError(
            f"{where} is not a whole uncompressed .tar ({error}); if it is compressed, unpack it "
            "once with gunzip or the like, else fetch it again or name another place"
        ) from None
