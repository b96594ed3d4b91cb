"""A finished set of shards, opened: its manifest, its index, and any record by its number.

`shards.open` is how others get one. Everything that reads a set for training begins here.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards import spec
from shards.crops import Ints
from shards.errors import UserError
from shards.files import MANIFEST, check_size
from shards.index import load_index, places_of
from shards.order import Plan
from shards.record import (
    COUNTS,
    DENSITY,
    WEIGHTS,
    Bank,
    Record,
    key_of,
    npy_bytes,
)
from shards.remote.retry import PATIENCE
from shards.remote.storage import is_url
from shards.spec import AREA, Manifest
from shards.tar import parse_record

if TYPE_CHECKING:
    from shards.ffcv_loader import FfcvLoader
    from shards.loader import Loader, RecordLoader
    from shards.maps import Maps
    from shards.remote.cache import Copies
    from shards.torchdata import RecordDataset
    from shards.weighting import Crops

Decode = Literal["cpu", "gpu"]


def open_set(
    where: str | os.PathLike[str],
    *,
    cache: str | os.PathLike[str] | None = None,
    cache_limit: int = 0,
    patience: float = PATIENCE,
    checksum: bool = True,
) -> "ShardSet":
    """The finished set in a folder, or at an s3://, gs://, hf:// or https:// URL.

    cache: the local folder that the shards of a URL are fetched into as they are read; cache_limit:
    bytes that all sets in it may take, 0 for any. patience: seconds to wait for a store that does
    not answer. checksum: hash what is found in the cache before its first use. Raises UserError if
    there is no such set, if it is damaged, or if there is no access; ConnectionError when patience
    has ended.
    """
    if not is_url(where):
        if cache is not None:
            raise UserError(f"a cache is for shards at a URL; {where} is read where it is")
        return ShardSet(Path(where))
    if cache is None:
        raise UserError(f"{where} needs a cache: a folder on a fast local disk, for copies")
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


class ShardSet:
    """The records 0 to len - 1 of a set, in the order of its shards.

    Opening costs the manifest and a memory map, whatever the size. Raises UserError if the
    manifest or the index is damaged or a shard is missing or has another size. With `copies`, of
    a remote set, `folder` holds the shards that are here.
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
        self.shards = self.manifest.shards
        self.ends = np.cumsum([shard.count for shard in self.shards], dtype=np.int64)
        for shard in self.shards if copies is None else []:
            check_size(self.folder / shard.name, shard.bytes)

    def __len__(self) -> int:
        return self.manifest.count

    def batches(
        self,
        size: int = 192,
        batch: int = 256,
        *,
        epochs: float = 1,
        seed: int = 0,
        weights: str | None = None,
        temperature: float = 0.25,
        w_ps: int = 8,
        normalise: Literal["min", "mean", "batch"] = "min",
        bank: bool = False,
        correct: bool = True,
        area: tuple[float, float] = AREA,
        flips: tuple[float, float] = (0.5, 0.5),
        device: str = "auto",
        decode: Decode = "cpu",
        workers: int = 0,
        first: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> Iterator["Crops"]:
        """Random crops with their loss weights, on `device`, for the steps from `first` on.

        Each is a Crops: images float32 [b, 3, size, size] of 0 to 1, weights float32 [b, c, c] with
        c = size / w_ps, or None without `weights`, the name of a detector of the set. The order,
        boxes (area: least and most share of the source; flips: chance of a horizontal and a
        vertical one) and weights depend on seed, epoch and sample alone. A process of `ranks` gets
        its part of each batch. bank: show the stored crops with their exact densities. correct: as
        of WeightedCrops, decode: as of `loader`. Raises UserError, with the first batch, if set or
        arguments cannot serve.
        """
        from shards.weighting import WeightedCrops, find_device, to_device

        plan = Plan(len(self), batch, seed, area=area, horizontal=flips[0], vertical=flips[1])
        if plan.steps(epochs) < 1:
            make = f"{epochs:g} epochs of {len(self)} records make no batch of {batch}"
            raise UserError(f"{make}; give more epochs or a smaller batch")
        where = find_device(device)
        how: dict[str, Any] = {"temperature": temperature, "normalise": normalise}
        how["correct"] = correct
        crops = WeightedCrops(self, weights, size=size, w_ps=w_ps, bank=bank, **how).to(where)
        loader = self.loader(
            plan,
            first,
            plan.steps(epochs),
            maps=[weights] if weights else [],
            bank=bank,
            workers=workers,
            rank=rank,
            ranks=ranks,
            device=str(where),
            decode=decode,
        )
        for _, tensors in to_device(loader, where):
            yield crops(tensors)

    def loader(
        self,
        plan: Plan,
        first: int = 0,
        last: int | None = None,
        *,
        maps: Sequence[str] = (),
        bank: bool = False,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        prefetch: int = 3,
        skip: bool = False,
        device: str = "cpu",
        decode: Decode = "cpu",
        processes: bool = False,
    ) -> "Loader | RecordLoader | FfcvLoader":
        """The batches of steps `first` to `last` - 1 (all of one epoch by default) of `plan`.

        maps: the detectors whose densities are wanted; with `bank` those of the stored crops. Each
        Batch holds uint8 frames and densities, boxes and flips, in arrays that are used again for
        a later one. workers: decoding threads, 0 for one per core. skip: put the next sound record
        in the place of a damaged one. device: `cuda` has buffers pinned. decode: `gpu` leaves
        JPEG frames to the device, by torchvision; `to_device` then has them decoded there.
        processes: workers are processes, which take less of this one's interpreter lock.
        """
        self._check_frames()
        last = plan.steps() if last is None else last
        if decode == "gpu":
            from shards.decoding import check_decoding
            from shards.weighting import find_device

            check_decoding(self, find_device(device), skip)
        if self.manifest.container == "ffcv" and plan.in_order:
            from shards.loader import RecordLoader

            return RecordLoader(self, plan, first, last, maps)
        if self.manifest.container == "ffcv":
            from shards.ffcv_loader import FfcvLoader

            if skip:
                raise UserError("FFCV decodes damage in silence: skipping needs WebDataset shards")
            return FfcvLoader(
                self,
                plan,
                first,
                last,
                maps=maps,
                bank=bank,
                rank=rank,
                ranks=ranks,
                workers=workers,
                prefetch=prefetch,
            )
        from shards.loader import Loader

        allocate, shared = None, None
        if processes and decode == "cpu":  # what only reads needs none
            from shards.processes import Shared

            shared = Shared()
        if device.startswith("cuda"):
            from shards.weighting import pin, pinned

            allocate = pinned
            if shared:
                shared.pin = pin
        return Loader(
            self,
            plan,
            first,
            last,
            maps=maps,
            bank=bank,
            rank=rank,
            ranks=ranks,
            workers=workers,
            prefetch=prefetch,
            skip=skip,
            coded=decode == "gpu",
            shared=shared,
            allocate=allocate,
        )

    def dataset(
        self, plan: Plan, *, maps: Sequence[str] = (), bank: bool = False
    ) -> "RecordDataset":
        """A map-style torch Dataset of the set's frames, densities, boxes and flips.

        An item is asked for by (epoch, sample), as PlanSampler does, or by sample, of epoch 0. For
        a DataLoader; `loader` is several times as fast.
        """
        from shards.torchdata import RecordDataset

        self._check_frames()
        return RecordDataset(self, plan, maps, bank)

    def density(self, name: str | int, detector: str) -> NDArray[np.uint8]:
        """The density of one source, uint8 [G, G], density = value / 255, of a set without frames.

        name: the source's own, below the root that the set was built from; of a member of a tar
        also its WebDataset key; or the number of the input in the listing, from 0, as of a Parquet
        file's rows or an FFCV file's samples. From any process or thread. Raises UserError if there
        is no such density, or more than one of that name.
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

    def _check_frames(self) -> None:
        """UserError if there are none."""
        if self.manifest.container == "maps":
            raise UserError(
                f"{self.folder} holds densities without frames: load images as you do, and read "
                "each one's by `density`; shards with frames come from kamim shards build"
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.manifest.container == "maps":  # its files are opened anew, not copied
            return ShardSet, (self.folder,)
        return super().__reduce_ex__(protocol)

    def find_maps(self, names: Sequence[str], bank: bool = False) -> list[int]:
        """Rows of the detectors `names` among the set's maps. Raises UserError if one is absent."""
        if bank and not self.manifest.settings.bank:
            raise UserError(
                f"{self.folder} has no bank; add one by `kamim shards build SOURCE NEW --bank 4 "
                f"--reuse {self.folder}`"
            )
        known = self.manifest.detectors
        for name in names:
            if name not in known:
                both = ",".join([*known, name])
                door = "maps" if self.manifest.container == "maps" else "shards"
                raise UserError(
                    f"{self.folder} has no maps of {name!r}, only of {', '.join(known)}; add them: "
                    f"kamim {door} build SOURCE NEW --detector {both} --reuse {self.folder}"
                )
        return [known.index(name) for name in names]

    def locate(self, number: int) -> tuple[Path, NDArray[np.void]]:
        """The shard's path and the index row of record `number`. Raises IndexError past the end."""
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of a set of {len(self)}")
        return self.folder / self.shards[self.shard_of(number)].name, self.index[number]

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

    def __del__(self) -> None:
        os.close(self.descriptor)
