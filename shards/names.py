"""The names of a set's sources, and the record of a name, without reading all of them.

names.jsonl holds them in the order of the records. keys.npy holds their sorted hashes, each with
its record and the place of its name. The name is compared, so that a collision never gives another
record.
"""

import json
import mmap
import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from hashlib import blake2b
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.files import check_sha256, check_size
from shards.index import mapped
from shards.record import npy_bytes
from shards.spec import File, Manifest, write_file

NAMES, KEYS = "names.jsonl", "keys.npy"
TARS = re.compile(r"\.tar/", re.IGNORECASE | re.ASCII)
TAR = "tar"  # the kind of source whose members answer to their WebDataset keys, too


def webdataset_key(name: str) -> str:
    """What the webdataset library calls the sample of a member: `000.tar/a/b.seg.png` is a/b.

    `name` may begin with the path of its tar.
    """
    folder, slash, last = TARS.split(name)[-1].rpartition("/")
    return folder + slash + last.partition(".")[0]


def _line(name: str) -> bytes:
    return quoted(name).encode("ascii") + b"\n"


def _hash(line: bytes) -> int:
    return int.from_bytes(blake2b(line, digest_size=8).digest(), "little")


def lists_of(names: Sequence[str], kind: str) -> tuple[bytes, bytes]:
    """names.jsonl and keys.npy of `names`, one per record, of a source of `kind`."""
    lines = [_line(name) for name in names]
    starts = np.cumsum([0, *map(len, lines)])[:-1]
    rows = [(_hash(line), n) for n, line in enumerate(lines)]
    if kind == TAR:
        keys = map(webdataset_key, names)
        rows += [(_hash(_line(key)), n) for n, key in enumerate(keys) if key != names[n]]
    hashes, numbers = np.array(rows, np.uint64).reshape(-1, 2).T
    order = np.lexsort((numbers, hashes))
    table = np.stack([hashes[order], numbers[order], starts.astype("<u8")[numbers[order]]])
    return b"".join(lines), npy_bytes(table.astype("<u8"))


def write_names(folder: Path, names: Sequence[str], kind: str) -> list[File]:
    """Write the lists of `names`, one per record, of a source of `kind`; returns their rows."""
    lists = zip((NAMES, KEYS), lists_of(names, kind), strict=True)
    return [write_file(folder / name, data, len(names)) for name, data in lists]


class Names:
    """The names of the set in `folder`. Raises UserError if its lists are missing or damaged."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        if [file.name for file in manifest.names] != [NAMES, KEYS]:
            raise UserError(
                f"{folder} has no list of names to look densities up by: ask for records by number"
                ", or build one with `kamim maps build SOURCE OUT`"
            )
        for file in manifest.names:
            check_size(folder / file.name, file.bytes)
            check_sha256(folder / file.name, file.sha256)
        keys = mapped(folder / KEYS)
        whole = keys.dtype == np.uint64 and keys.ndim == 2 and len(keys) == 3 and keys.size
        most = manifest.count, manifest.names[0].bytes  # of a record, of a place in the text
        if not whole or any(keys[n + 1].max() >= most[n] for n in (0, 1)):
            raise UserError(f"{folder / KEYS} is damaged: it is no list of {manifest.count} names")
        self.folder, self.count = folder, manifest.count
        self.hashes, self.numbers, self.starts = (memoryview(row) for row in keys)
        self.keys, self.by_key = keys, manifest.source["kind"] == TAR
        with (folder / NAMES).open("rb") as lines:
            self.text = mmap.mmap(lines.fileno(), 0, access=mmap.ACCESS_READ)

    def find(self, name: str) -> int:
        """The number of the record whose source has this name.

        Raises UserError if there is none, or more than one.
        """
        line = _line(name)
        wanted, found = _hash(line), []
        at, end = bisect_left(self.hashes, wanted), len(self.hashes)
        while at < end and self.hashes[at] == wanted:
            start = self.starts[at]
            if self.text[start : start + len(line)] == line or self._is_key(start, name):
                found.append(self.numbers[at])
            at += 1
        if not found and name.startswith("./"):  # as tar -C FOLDER . calls members
            return self.find(name[2:])
        if len(found) != 1:
            raise UserError(self._why(name, found))
        return int(found[0])

    def _is_key(self, start: int, name: str) -> bool:
        """Whether `name` is the WebDataset key of the name at `start`."""
        return self.by_key and webdataset_key(self._name_at(start)) == name

    def _name_at(self, start: int) -> str:
        return str(json.loads(self.text[start : self.text.find(b"\n", start)]))

    def _why(self, name: str, found: list[int]) -> str:
        if found:
            return (
                f"{len(found)} images of {self.folder} are called {name!r}: give the whole name "
                "with its tar's, or the number of the input"
            )
        return (
            f"{self.folder} has no density of {name!r}: it was rejected (rejected.jsonl says so), "
            f"or names are others, as {self[0]!r}"
        )

    @cached_property
    def _places(self) -> NDArray[np.uint64]:
        """The place of each record's name, uint64 [records]."""
        places = np.zeros(self.count, np.uint64)
        places[self.keys[1].astype(np.int64)] = self.keys[2]
        return places

    def __getitem__(self, number: int) -> str:
        """The name of record `number`."""
        return self._name_at(int(self._places[number]))

    def __len__(self) -> int:
        return self.count
