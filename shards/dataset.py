"""A finished set of shards, opened: its manifest, its index, and any record by its number.

`shards.open` is how others get one. Everything that reads a set for training begins here.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from math import prod
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from shards import spec
from shards.crops import Ints
from shards.errors import UserError
from shards.files import MANIFEST, check_size
from shards.index import load_index, places_of
from shards.order import Plan, Windows
from shards.record import (
    COUNTS,
    DENSITY,
    WEIGHTS,
    Bank,
    Record,
    key_of,
    npy_bytes,
)
from shards.records import Records
from shards.remote.retry import PATIENCE
from shards.remote.storage import is_url
from shards.spec import Manifest
from shards.tar import parse_record

if TYPE_CHECKING:
    from shards.maps import Maps
    from shards.remote.cache import Copies
    from shards.sets import ShardSets

Where = str | os.PathLike[str]


@overload
def open_set(
    where: Where,
    *,
    cache: Where | None = None,
    cache_limit: int = 0,
    patience: float = PATIENCE,
    checksum: bool = True,
) -> "ShardSet": ...
@overload
def open_set(
    where: Sequence[Where],
    *,
    shares: Sequence[float] | None = None,
    cache: Where | None = None,
    cache_limit: int = 0,
    patience: float = PATIENCE,
    checksum: bool = True,
) -> "ShardSet | ShardSets": ...
def open_set(
    where: Where | Sequence[Where],
    *,
    shares: Sequence[float] | None = None,
    cache: Where | None = None,
    cache_limit: int = 0,
    patience: float = PATIENCE,
    checksum: bool = True,
) -> "ShardSet | ShardSets":
    """The finished set in a folder or at an s3://, gs://, hf:// or https:// URL; or several sets as
    one.

    shares: the share of an epoch that each of several sets gives, in any scale; without shares each
    record is shown once. cache: local folder for shards of URLs, fetched as they are read.
    cache_limit: most bytes of all sets in it; 0: no limit. patience: seconds to wait for a store
    that does not answer. checksum: hash files that are in the cache before their first use.
    Raises UserError if there is no such set, it is damaged, access is denied, or sets cannot be
    mixed; ConnectionError when patience has ended.
    """
    how: dict[str, Any] = {"cache_limit": cache_limit, "patience": patience, "checksum": checksum}
    if not isinstance(where, str | os.PathLike):
        from shards.sets import ShardSets

        if where and cache is not None and not any(map(is_url, where)):
            raise UserError(f"a cache is for shards at a URL; {where[0]} is read where it is")
        sets = [open_set(each, cache=cache if is_url(each) else None, **how) for each in where]
        return sets[0] if len(sets) == 1 else ShardSets(sets, shares)
    if not is_url(where):
        if cache is not None:
            raise UserError(f"a cache is for shards at a URL; {where} is read where it is")
        return ShardSet(Path(where))
    if cache is None:
        raise UserError(f"{where} needs a cache: a folder on a fast local disk (--cache FOLDER)")
    from shards.remote.cache import Copies
    from shards.remote.storage import Store

    store = Store(str(where), patience)
    try:
        manifest = spec.parse(f"{store.url}/{MANIFEST}", store.read(MANIFEST))
    except FileNotFoundError as error:
        raise UserError(f"{error}: no finished set of shards, or the wrong place") from None
    if manifest.container != "webdataset":
        raise UserError(
            f"{store.url} is no set of WebDataset shards, and is read from local files only; copy "
            "it to a local folder"
        )
    copies = Copies(store, manifest, Path(cache), cache_limit, checksum)
    return ShardSet(copies.folder, manifest, copies)


class ShardSet(Records):
    """The records 0 to len - 1 of a set, in the order of its shards.

    Opening reads the manifest, hashes the index (52 bytes per record), and looks at the size of
    each shard. Raises UserError if the manifest or the index is damaged or a shard is missing or
    has another size. `classes`: the names of the classes; a label is a place in this list. With
    `copies`, of a remote set, `folder` holds the shards that are here.
    """

    def __init__(
        self,
        folder: Path | str,
        manifest: Manifest | None = None,
        copies: "Copies | None" = None,
    ) -> None:
        self.folder, self.copies = Path(folder), copies
        self.manifest: Manifest = manifest or spec.load(self.folder)
        self.held = copies.hold(self.manifest.index) if copies else None
        self.places = places_of(self.manifest)[0]
        self.index: NDArray[np.void] = load_index(self.folder, self.manifest)
        self.shards, self.classes = self.manifest.shards, self.manifest.classes
        self.ends = np.cumsum([shard.count for shard in self.shards], dtype=np.int64)
        for shard in self.shards if copies is None else []:
            check_size(self.folder / shard.name, shard.bytes)

    def __len__(self) -> int:
        return self.manifest.count

    def density(self, name: str | int, detector: str) -> NDArray[np.uint8]:
        """The density of one image, uint8 [G, G], density = value / 255, of a set without frames.

        name: the image's name below the root of the source; for a member of a tar also its
        WebDataset key; or its number in the listing, from 0, as rows of Parquet and samples of FFCV
        are numbered. It may be called from any process or thread. Raises UserError if there is no
        such density, or more than one of that name.
        """
        return self.maps.density(name, detector)

    def densities(self, names: Sequence[str | int], detector: str) -> NDArray[np.uint8]:
        """As `density`, of several sources, uint8 [len(names), G, G]."""
        return self.maps.densities(names, detector)

    @cached_property
    def maps(self) -> "Maps":
        """The densities of a set without frames, opened when they are first asked for."""
        from shards.maps import Maps

        return Maps(self)

    def __reduce__(self) -> Any:  # its files are opened anew: a descriptor is of one process
        return ShardSet, (self.folder, self.copies and self.manifest, self.copies)

    def find_maps(self, names: Sequence[str], bank: bool = False) -> list[int]:
        """Rows of the detectors `names` among the set's maps. Raises UserError if one is absent."""
        if bank and not self.manifest.settings.bank:
            raise UserError(
                f"{self.folder} has no bank; add one by `kamim shards build SOURCE NEW --bank 4 "
                f"--reuse {quote(str(self.folder))}`"
            )
        known = self.manifest.detectors
        for name in names:
            if name not in known:
                both = ",".join(
                    [*(each.call for each in self.manifest.settings.detectors), str(name)]
                )
                door = "maps" if self.manifest.container == "maps" else "shards"
                raise UserError(
                    f"{self.folder} has no maps of {name!r}, only of {', '.join(known)}; add them: "
                    f"kamim {door} build SOURCE NEW --detector {both} "
                    f"--reuse {quote(str(self.folder))}"
                )
        return [known.index(name) for name in names]

    def locate(self, number: int) -> tuple[Path, NDArray[np.void]]:
        """The shard's path and the index row of record `number`. Raises IndexError past the end."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of a set of {len(self)}")
        return self.folder / self.shards[self.shard_of(number)].name, self.index[number]

    @property
    def sets(self) -> "list[ShardSet]":
        """Itself."""
        return [self]

    def rows(self, samples: Ints) -> NDArray[np.void]:
        """Rows of the index of `samples`, INDEX_DTYPE [n]."""
        return self.index[samples]

    def plan(
        self,
        batch: int,
        seed: int = 0,
        *,
        window: int = 0,
        subset: Ints | None = None,
        **crops: Any,
    ) -> Plan:
        """The order of training. window: shards that are shuffled together, 0 for all. subset: the
        numbers of the samples that it shows, ascending; None: all. crops: area, ratio, horizontal,
        vertical of Plan.
        """
        plain = subset is None and (window == 0 or window >= len(self.shards))
        windows = None if plain else self.windows(window, seed, subset)
        return Plan(len(self), batch, seed, windows=windows, **crops)

    def windows(self, window: int, seed: int, subset: Ints | None = None) -> Windows:
        """The order of samples in windows of so many shards, 0 for all at once."""
        counts = [shard.count for shard in self.shards]
        return Windows(counts, window or max(1, len(counts)), seed, subset)

    def mean_densities(
        self, detector: str, update: Callable[[int], object] = int
    ) -> NDArray[np.float32]:
        """The mean density of each record's whole map, 0 to 1, float32 [records]; no frame is read.
        `update` is called per shard with the number of records done.
        """
        self.find_maps([detector])
        array, at = self.places[f"{detector}.{DENSITY}"]
        found, ends = np.empty(len(self), np.float32), [0, *self.ends.tolist()]
        for shard, (begin, end) in enumerate(pairwise(ends)):
            held = self.hold(shard)
            for number, place in enumerate(self.index["arrays"][begin:end].tolist(), begin):
                data = os.pread(held.descriptor, array.bytes, place + at)
                found[number] = np.frombuffer(data, array.dtype).mean() / 255
            update(end - begin)
        return found

    def shard_of(self, number: int) -> int:
        """The number of the shard that holds record `number`."""
        return int(np.searchsorted(self.ends, number, side="right"))

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
        """Record `number`. Raises UserError, naming shard and key, if it is damaged."""
        path, row = self.locate(number)
        held = self.hold(self.shard_of(number))
        data = os.pread(held.descriptor, int(row["bytes"]), int(row["start"]))
        key = key_of(int(row["key"]))
        try:
            if self.manifest.container != "webdataset":
                record = self._of_regions(key, data, row)
                named = self.manifest.container == "maps"
                return replace(record, source=self.maps.names[number]) if named else record
            record = parse_record(data)
            if record.key != key:
                raise ValueError(f"it is record {record.key} by its name")
        except ValueError as error:
            raise UserError(f"{path}: record {key}: {error}") from None
        return record

    def _of_regions(self, key: str, data: bytes, row: NDArray[np.void]) -> Record:
        """A record of what is no tar: frame and arrays without names; the index has the rest."""
        settings, begin = self.manifest.settings, int(row["arrays"] - row["start"])
        arrays: dict[str, dict[str, NDArray[Any]]] = {DENSITY: {}, COUNTS: {}, WEIGHTS: {}}
        arrays |= {"boxes": {}, "flips": {}}
        for array, at in self.places.values():
            found = np.frombuffer(data, array.dtype, prod(array.shape), begin + at)
            arrays[array.kind][array.detector] = found.reshape(array.shape)
        bank = None
        if settings.bank:
            boxes, flips = arrays["boxes"]["bank"], arrays["flips"]["bank"]
            bank = Bank(boxes.astype(np.int64), flips.astype(bool), arrays[COUNTS])
        frame = data[: int(row["frame_bytes"])]
        if settings.frame and settings.quality == 0:
            pixels = np.frombuffer(frame, np.uint8)
            frame = npy_bytes(pixels.reshape(settings.frame, settings.frame, 3))
        label, height, width = (int(row[name]) for name in ("label", "height", "width"))
        maps = arrays[DENSITY]
        return Record(key, frame, label, height, width, "", maps, bank, arrays[WEIGHTS])


class Held:
    """An open shard. It closes when the last reader lets go of it, never under one."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)  # when the interpreter ends, `os` may be gone
