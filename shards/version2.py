"""Converts sets of format version 2 to version 3. No other file knows version 2.

It kept densities of 16 levels, two to a byte. One member `maps.npy` held all maps of a record, and
behind them its bank: rows of a box, its flips and the counts of every detector.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, pairwise
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import spec
from shards.beton import finished_copy
from shards.card import write_card
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.files import MANIFEST, alone
from shards.index import flaws_of_files
from shards.progress import progress
from shards.record import Bank, Record, from_members, key_of, npy_bytes
from shards.spec import INDEX, REJECTED, File, Manifest
from shards.tar import ShardWriter, members_in

LEVELS, STEP = 16, 17  # densities were 0, 17, ... 255 of 255
BOX = np.dtype([("box", "<u4", 4), ("flips", "u1", 2)])  # before the counts of a bank's row
INDEX_DTYPE = np.dtype(
    [(name, "<u8") for name in ("key", "start", "frame", "maps")]
    + [(name, "<u4") for name in ("frame_bytes", "maps_bytes", "bank_bytes", "bytes")]
    + [("height", "<u4"), ("width", "<u4"), ("label", "<i4")]
)


def upgrade_set(folder: Path, out: Path) -> Manifest:
    """Write the version 2 set in `folder` as version 3 into `out`; returns its manifest.

    Every file of `folder` is hashed first. At the end every record is read back and compared:
    frames and counts to the byte, densities to the number. The set is the one that a build of the
    source with 16 levels of density gives. A finished, whole `out` is left as it is; what a killed
    upgrade left is done again. Raises UserError at damage, and if `out` holds anything else.
    """
    manifest = read_manifest(folder)
    if manifest.container != "webdataset":
        raise UserError(
            f"{folder} is an FFCV set of format version 2: upgrade the set it was made from, and "
            "convert that again by kamim shards convert"
        )
    finished = finished_copy(out, manifest.fingerprint, {file.name for file in manifest.shards})
    if finished:
        return finished
    flaws = flaws_of_files(folder, [*manifest.shards, manifest.index, manifest.rejected])
    if flaws:
        raise UserError(min(flaws.values()))
    index = np.load(folder / INDEX, mmap_mode="r", allow_pickle=False)
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.count,):
        raise UserError(f"{folder / INDEX} is damaged: {index.dtype} {index.shape}")
    firsts = np.cumsum([0, *(shard.count for shard in manifest.shards)]).tolist()
    parts = [
        (shard.name, index[a:b])
        for shard, (a, b) in zip(manifest.shards, pairwise(firsts), strict=True)
    ]
    with alone(out):
        if finished_copy(out, manifest.fingerprint, {file.name for file in manifest.shards}):
            raise UserError(f"{out} was finished by another process; run the same command again")
        files, rows = list[File](), list[NDArray[np.void]]()
        with progress("upgrading", len(index)) as bar:
            for name, part in parts:
                with ShardWriter(out / name) as writer:
                    for record in _records(folder / name, part, manifest.detectors):
                        writer.add(record)
                        bar.update()
                files.append(writer.file)
                rows.append(writer.index)
        rejected = (folder / REJECTED).read_bytes()
        made = replace(
            manifest,
            shards=files,
            index=spec.write_file(out / INDEX, npy_bytes(np.concatenate(rows)), len(index)),
            rejected=spec.write_file(out / REJECTED, rejected, manifest.rejected.count),
        )
        written, number = ShardSet(out, made), count()
        with progress("comparing", len(index)) as bar:
            for name, part in parts:
                for record in _records(folder / name, part, manifest.detectors):
                    if not record.equals(written[next(number)]):
                        raise UserError(f"record {record.key} reads back otherwise; check the disk")
                    bar.update()
        write_card(out, made)
        spec.write(out, made)
    return made


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the version 2 set in `folder`, as version 3 says the same; its files are
    those of version 2. Raises UserError if it is another version's, or damaged.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} has no {MANIFEST}: it is not a finished set of shards") from None
    try:
        content = json.loads(data)
        version, checksum = content["format_version"], content.pop("checksum")
        whole = spec.as_json(content | {"checksum": checksum}) == data
        if version == 2 and whole and spec.fingerprint(content) == checksum:
            return spec.parse(path, spec.as_json(_of_version_3(content)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if version == 2:
        raise UserError(f"{path} is damaged: its content does not match its checksum; restore it")
    raise UserError(f"{path} has format version {version}; only version 2 can be upgraded")


def _of_version_3(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a manifest of version 2 as one of version 3."""
    settings = content["settings"] | {"weights": None, "levels": LEVELS}
    facts = {name: content[name] for name in ("source", "versions")}
    facts |= {"format_version": spec.FORMAT_VERSION, "settings": settings}
    made = content | facts | {"fingerprint": spec.fingerprint(facts)}
    return made | {"checksum": spec.fingerprint(made)}


def _records(path: Path, index: NDArray[np.void], detectors: list[str]) -> Iterator[Record]:
    """The records of a shard. Raises UserError, naming shard and key, at a damaged one."""
    with path.open("rb") as file:
        for row in index:
            try:
                file.seek(int(row["start"]))
                key, parts = members_in(file.read(int(row["bytes"])))
                if key != key_of(int(row["key"])):
                    raise UserError(f"it is record {key} by its name")
                yield record_of(key, parts, detectors)
            except (ValueError, OverflowError) as error:
                raise UserError(f"{path}: record {key_of(int(row['key']))}: {error}") from None


def record_of(key: str, parts: dict[str, bytes], detectors: list[str]) -> Record:
    """The record of members (suffix to bytes) of version 2. Raises UserError if one is wrong."""
    stream = io.BytesIO(parts.pop("maps.npy", b""))
    try:
        halves = np.lib.format.read_array(stream, allow_pickle=False)
        rest = stream.tell() < len(stream.getvalue())
        rows = np.lib.format.read_array(stream, allow_pickle=False) if rest else None
        plain = from_members(key, parts)
        fours = np.stack([halves & 15, halves >> 4], axis=-1)
        levels = fours.reshape(*halves.shape[:2], -1) * np.uint8(STEP)
        maps = dict(zip(detectors, levels, strict=True))
        bank = None if rows is None else _bank_of(rows, detectors)
    except Exception as error:  # NumPy tokenizes the header: hostile bytes raise anything
        raise UserError(f"maps.npy or another member is damaged: {error}") from None
    return replace(plain, maps=maps, bank=bank)


def _bank_of(rows: NDArray[np.uint8], detectors: list[str]) -> Bank:
    """The bank of its rows, uint8 [K, 18 + D * c * c]."""
    slots, head = len(rows), BOX.itemsize
    cells = isqrt((rows.shape[1] - head) // len(detectors))
    crops = np.ascontiguousarray(rows[:, :head]).view(BOX)[:, 0]
    counts = rows[:, head:].reshape(slots, len(detectors), cells, cells)
    by_detector = {name: counts[:, row] for row, name in enumerate(detectors)}
    return Bank(crops["box"].astype(np.int64), crops["flips"].astype(bool), by_detector)
