"""Densities without frames: each shard is one plain .npy block of maps, looked up by a source's
name.

`ShardSet.density` reads them. A look-up reads from the file, so that little stays in memory.
"""

import hashlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from operator import index
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.files import replacing
from shards.names import Names
from shards.record import Record, npy_header
from shards.spec import File, Settings
from shards.tar import INDEX_DTYPE

if TYPE_CHECKING:
    from shards.dataset import Held, ShardSet

OPEN_FILES = 512  # at a time, of a process: half of what Linux allows by default


def block_shape(count: int, settings: Settings) -> tuple[int, int, int, int]:
    """The shape of a shard of `count` maps: [count, detectors, grid, grid], uint8."""
    return (count, len(settings.detectors), settings.grid, settings.grid)


def places(count: int, settings: Settings) -> tuple[int, int]:
    """The first byte of the maps in a shard of `count` records, and the bytes of one record."""
    shape = block_shape(count, settings)
    return len(npy_header(shape)), int(np.prod(shape[1:]))


def index_rows(facts: Sequence[tuple[int, int, int, int]], settings: Settings) -> NDArray[np.void]:
    """The index of a shard from (key, height, width, label) of each of its records."""
    first, size = places(len(facts), settings)
    rows = [
        (key, at, at, at, 0, size, height, width, label)
        for n, (key, height, width, label) in enumerate(facts)
        for at in [first + n * size]
    ]
    return np.array(rows, INDEX_DTYPE)


class MapsWriter:
    """As ShardWriter, for a shard without frames: the maps of its records, uint8 [n, D, G, G]."""

    file: File
    index: NDArray[np.void]

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings
        self.maps: list[NDArray[np.uint8]] = []
        self.facts: list[tuple[int, int, int, int]] = []

    def __enter__(self) -> "MapsWriter":
        return self

    def add(self, record: Record) -> None:
        """Append the maps of `record`; they stay in memory until the block ends."""
        self.maps.append(np.stack([*record.maps.values()]))
        self.facts.append((int(record.key), record.height, record.width, record.label))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            count, digest, size = len(self.maps), hashlib.sha256(), 0
            with replacing(self.path) as temporary, temporary.open("wb") as file:
                header = npy_header(block_shape(count, self.settings))
                for part in (memoryview(header), *(each.data for each in self.maps)):
                    size += file.write(part)
                    digest.update(part)
            self.file = File(self.path.name, count, size, digest.hexdigest())
            self.index = index_rows(self.facts, self.settings)


def flaw_of_block(path: Path, rows: NDArray[np.void], settings: Settings) -> str:
    """What is wrong with a shard's header, or with its `rows` of the index; empty if nothing is."""
    header = npy_header(block_shape(len(rows), settings))
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return f"{path} is no .npy file of {len(rows)} records"
    facts = [tuple(map(int, row)) for row in rows[["key", "height", "width", "label"]].tolist()]
    if not np.array_equal(index_rows(facts, settings), rows):  # type: ignore[arg-type]
        return f"{path}: its records do not lie where the index says"
    return ""


class Maps:
    """The densities of a set without frames, by name. Threads and forked processes may share it."""

    def __init__(self, records: "ShardSet") -> None:
        self.records, self.names = records, Names(records.folder, records.manifest)
        settings = records.manifest.settings
        self.inputs = records.index["key"]
        self.grid, self.cells = settings.grid, settings.grid**2
        counts = [shard.count for shard in records.shards]
        self.ends = records.ends.tolist()
        self.size = places(0, settings)[1]
        # Where record 0 would lie in each shard, if the records before it did.
        self.zeros = [
            places(count, settings)[0] - (end - count) * self.size
            for count, end in zip(counts, self.ends, strict=True)
        ]
        self.offsets = {name: n * self.cells for n, name in enumerate(records.manifest.detectors)}
        self.held = lru_cache(OPEN_FILES)(records.hold)

    def density(self, name: str | int, detector: str) -> NDArray[np.uint8]:
        """As ShardSet.density."""
        found = np.empty((self.grid, self.grid), np.uint8)
        self._read(name, detector, found)
        return found

    def densities(self, names: Sequence[str | int], detector: str) -> NDArray[np.uint8]:
        """As ShardSet.densities."""
        if isinstance(names, str):
            raise UserError(
                f"densities is for several names, not {names!r}; use density, or a list"
            )
        found = np.empty((len(names), self.grid, self.grid), np.uint8)
        for name, row in zip(names, found, strict=True):
            self._read(name, detector, row)
        return found

    def _read(self, name: str | int, detector: str, into: Any) -> None:
        number = self.names.find(name) if isinstance(name, str) else self._of_input(index(name))
        offset = self.offsets.get(detector)
        if offset is None:
            self.records.find_maps([detector])  # says what there is
            raise AssertionError(detector)
        shard = bisect_right(self.ends, number)
        held: Held = self.held(shard)
        at = self.zeros[shard] + number * self.size + offset
        if os.preadv(held.descriptor, [into], at) != self.cells:
            raise UserError(f"{self.records.shards[shard].name} ends before record {number}")

    def _of_input(self, key: int) -> int:
        """The record of input number `key` of the listing."""
        number = bisect_left(self.inputs, key)  # NumPy's would copy the column to search it
        if number == len(self.inputs) or self.inputs[number] != key:
            inputs = self.records.manifest.ledger.inputs
            raise UserError(
                f"{self.records.folder} has no density of input {key}: it was rejected, or there "
                f"are no more than {inputs}"
            )
        return number
