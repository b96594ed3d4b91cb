"""Open a finished set of shards and read any record of it by number, without scanning.

In: the folder a build wrote, or the URL it was copied to. Out: its manifest, its index
(memory-mapped) and its records.
"""

import hashlib
import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shards import spec as _manifest
from shards.bank import BANK_CELL, from_rows, row_bytes
from shards.order import Ints
from shards.record import Record, key_of, npy_bytes, npy_header, unpacked
from shards.spec import INDEX, MANIFEST, Manifest
from shards.tar import INDEX_DTYPE, parse_record

if TYPE_CHECKING:
    from shards.remote.cache import Copies


class ShardSet:
    """The records 0..len-1 of the set in `folder`, in the order of its shards.

    Opening costs the manifest and a memory map, whatever the size. Raises ValueError if the
    manifest or the index is damaged or a shard is missing or has another size. With `copies`, of
    a remote set (open_remote), `folder` holds the shards that are here.
    """

    def __init__(
        self,
        folder: Path | str,
        manifest: Manifest | None = None,
        copies: "Copies | None" = None,
    ) -> None:
        self.folder, self.copies = Path(folder), copies
        self.manifest: Manifest = manifest or _manifest.load(self.folder)
        self.held = copies.hold(self.manifest.index) if copies else None
        self.index: NDArray[np.void] = load_index(self.folder, self.manifest)
        self.shards = self.manifest.shards
        self.ends = np.cumsum([shard.count for shard in self.shards], dtype=np.int64)
        for shard in self.shards if copies is None else []:
            check_size(self.folder / shard.name, shard.bytes)

    def __len__(self) -> int:
        return self.manifest.count

    def locate(self, number: int) -> tuple[Path, NDArray[np.void]]:
        """The shard's path and the index row of record `number`. Raises IndexError past the end."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of a set of {len(self)}")
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return self.folder / self.shards[shard].name, self.index[number]

    def hold(
        self,
        shard: int,
        needed: Callable[[], bool] = lambda: True,
        next_use: Callable[[], Ints] | None = None,
    ) -> "Held":
        """Shard number `shard`, open; that of a remote set is fetched first, as Copies.hold."""
        if self.copies:
            return self.copies.hold(self.shards[shard], needed, next_use)
        return Held(os.open(self.folder / self.shards[shard].name, os.O_RDONLY | os.O_CLOEXEC))

    def __getitem__(self, number: int) -> Record:
        """Record `number`. Raises ValueError, naming shard and key, if it is damaged."""
        path, row = self.locate(number)
        held = self.hold(int(np.searchsorted(self.ends, number, side="right")))
        data = os.pread(held.descriptor, int(row["bytes"]), int(row["start"]))
        if self.manifest.container == "ffcv":
            return self._of_regions(data, row)
        try:
            record = parse_record(data)
            if record.key != key_of(int(row["key"])):
                raise ValueError(f"it is record {record.key} by its name")
        except ValueError as error:
            raise ValueError(f"{path}: record {key_of(int(row['key']))}: {error}") from None
        return record

    def _of_regions(self, data: bytes, row: NDArray[np.void]) -> Record:
        """A record of a .beton: its frame and its maps without names; the index has the rest."""
        settings = self.manifest.settings
        detectors = len(settings.detectors)
        size, maps_size, bank_size = (int(row[f"{n}_bytes"]) for n in ("frame", "maps", "bank"))
        shape = (detectors, settings.grid, settings.grid // 2)
        slots = settings.bank * row_bytes(detectors, settings.crop // BANK_CELL)
        key = key_of(int(row["key"]))
        if len(data) != size + maps_size + slots or (maps_size, bank_size) != (prod(shape), slots):
            raise ValueError(f"{self.folder / self.shards[0].name}: record {key} is cut short")
        maps = unpacked(np.frombuffer(data, np.uint8, maps_size, size).reshape(shape))
        bank = None
        if slots:
            rows = np.frombuffer(data, np.uint8, offset=size + maps_size)
            bank = from_rows(rows.reshape(settings.bank, -1), detectors)
        frame = data[:size]
        if settings.quality == 0:
            pixels = np.frombuffer(frame, np.uint8)
            frame = npy_bytes(pixels.reshape(settings.frame, settings.frame, 3))
        label, height, width = (int(row[name]) for name in ("label", "height", "width"))
        return Record(key, frame, label, height, width, "", maps, bank)


class Held:
    """An open shard. It closes when the last reader lets go of it, never under one."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


def load_index(folder: Path, manifest: Manifest) -> NDArray[np.void]:
    """The set's index, INDEX_DTYPE [records], memory-mapped. Raises ValueError if it is wrong.

    Its sha256 is checked first, 60 bytes a record, and that its places lie in their shards: every
    later read trusts it.
    """
    path, sizes = folder / INDEX, sizes_of(manifest)
    check_size(path, manifest.index.bytes)
    check_sha256(path, manifest.index.sha256)
    index = np.load(path, mmap_mode="r", allow_pickle=False)
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.count,):
        raise ValueError(
            f"{path} is damaged: {index.dtype} {index.shape} for {manifest.count} records"
        )
    with path.open("rb") as file:  # not through the map, which would keep all of it in memory
        file.seek(index.offset)
        for shard in manifest.shards:
            rows = np.fromfile(file, INDEX_DTYPE, shard.count)
            if misplaced(rows, shard.bytes, *sizes).any():
                raise ValueError(
                    f"{path} has a record of {shard.name} that cannot lie in it; {mending(path)}"
                )
    return index


def sizes_of(manifest: Manifest) -> tuple[int, int]:
    """Bytes of each record's maps and bank, as the index has them."""
    settings = manifest.settings
    detectors = len(settings.detectors)
    maps = (detectors, settings.grid, settings.grid // 2)
    bank = (settings.bank, row_bytes(detectors, settings.crop // BANK_CELL))
    header = len if manifest.container == "webdataset" else lambda data: 0
    bank_bytes = header(npy_header(bank)) + prod(bank) if settings.bank else 0
    return header(npy_header(maps)) + prod(maps), bank_bytes


def misplaced(rows: NDArray[np.void], size: int, maps: int, bank: int) -> NDArray[np.bool_]:
    """Which rows of an index are of no record in a shard of `size` bytes, whose maps and bank have
    `maps` and `bank` bytes: whoever reads them would read elsewhere, or divide by zero.
    """
    start, end = rows["start"], rows["start"] + rows["bytes"]
    wrong = (start > size) | (end > size) | (rows["height"] == 0) | (rows["width"] == 0)
    wrong |= (rows["maps_bytes"] != maps) | (rows["bank_bytes"] != bank)
    for name, length in (("frame", rows["frame_bytes"]), ("maps", np.uint64(maps + bank))):
        place = rows[name]
        wrong |= (place < start) | (place > end) | (length > end - place)
    return np.asarray(wrong)


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError unless the content of `path` can be read and has this sha256 (hex)."""
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); {mending(path)}") from None
    if actual != expected:
        raise ValueError(
            f"{path} is damaged: its sha256 is {actual[:12]}..., the manifest says "
            f"{expected[:12]}...; {mending(path)}"
        )


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_size(path: Path, expected: int) -> None:
    """Raise ValueError unless the file `path` exists and has `expected` bytes."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path} is missing, the manifest lists it; {mending(path)}") from None
    if actual != expected:
        raise ValueError(
            f"{path} has {actual} bytes, the manifest says {expected}; {mending(path)}"
        )


def mending(path: Path) -> str:
    """What to do about `path`, a file of a set that is missing or damaged."""
    folder = path.parent
    if path.suffix == ".beton" or any(folder.glob("*.beton")):
        return f"convert it again: kamim shards convert FOLDER --out {folder}"
    if not (folder / MANIFEST).exists():  # a copy under way, or a cache of a store's shards
        return "restore it where it came from"
    return f"restore it, or type: kamim shards build SOURCE {folder} --repair"
