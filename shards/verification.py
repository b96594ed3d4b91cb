"""Check a finished set of shards: a folder in, a list of problems out.

structure: manifest, ledger, files, sizes, index against every tar header. checksum: sha256 of
every file. decode: every record parses and its frame decodes. Each level includes those before.
(The fourth, redetect, needs detectors and lives in preprocess.)
"""

import re
from collections import Counter
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np
from numpy.typing import NDArray

from shards import spec
from shards.beton import beton_format, check_tables, values
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.files import check_size
from shards.index import flaws_of_files, load_index
from shards.maps import flaw_of_block
from shards.names import Names
from shards.progress import progress
from shards.record import (
    COUNTS,
    DENSITY,
    JPEG,
    LABEL,
    META,
    RAW,
    WEIGHTS,
    Bank,
    Record,
    decode_frame,
    fields_of,
    key_of,
)
from shards.spec import BANK_CELL, FIXED_POINT, INDEX, REJECTED, Manifest, Settings
from shards.tar import headers, padded, places_of

SHARD = re.compile(r".*\.tar|shard-.*\.npy")
LEVELS = ("structure", "checksum", "decode")


def verify_shards(folder: Path | str, level: str = "checksum") -> list[str]:
    """Everything wrong with the set in `folder`, a line each; empty if it is sound."""
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}; there are {', '.join(LEVELS)}")
    folder = Path(folder)
    try:
        manifest = spec.load(folder)
        index = load_index(folder, manifest)
    except ValueError as error:
        return [str(error)]
    problems = _structure(folder, manifest, index)
    if level != "structure" and not problems:
        problems += damaged_files(folder, manifest)
    if level == "decode" and not problems:
        problems += _decode(folder)
    return problems


def _structure(folder: Path, manifest: Manifest, index: NDArray[np.void]) -> list[str]:
    problems = []
    listed = {shard.name for shard in manifest.shards}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".tmp") or (SHARD.fullmatch(path.name) and path.name not in listed):
            problems.append(f"{path} is not in the manifest; move it out of the folder")
    keys = index["key"].astype(np.int64)
    if (np.diff(keys) <= 0).any():
        problems.append(f"{folder / INDEX}: keys do not rise; records are doubled or out of order")
    begin = 0
    for shard in progress("checking", len(manifest.shards), manifest.shards, unit="shard", delay=1):
        rows = index[begin : begin + shard.count]
        begin += shard.count
        try:
            check_size(folder / shard.name, shard.bytes)
            if manifest.container == "webdataset":
                problems += _against_index(folder / shard.name, rows, manifest.settings)
            elif manifest.container == "maps":
                flaw = flaw_of_block(folder / shard.name, rows, manifest.settings)
                problems += [flaw] if flaw else []
            else:
                problems += _beton_against_index(folder / shard.name, manifest, rows)
        except ValueError as error:
            problems.append(str(error))
    try:
        if manifest.container == "maps":
            Names(folder, manifest)
        check_size(folder / REJECTED, manifest.rejected.bytes)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _against_index(path: Path, rows: NDArray[np.void], settings: Settings) -> list[str]:
    """Whether the tar's headers are those of `rows`: each member at the place it says."""
    found, (places, size) = list(headers(path)), places_of(settings)
    frame = JPEG if settings.quality else RAW
    many = 3 + len(places)
    if len(found) != many * len(rows):
        return [
            f"{path} has {len(found)} members, {many * len(rows)} belong to {len(rows)} records"
        ]
    for row, these in zip(rows, zip(*[iter(found)] * many, strict=True), strict=True):
        key, start, arrays = (int(row[name]) for name in ("key", "start", "arrays"))
        meta = padded(int(row["frame"] + row["frame_bytes"]))
        wanted = [(frame, start, int(row["frame_bytes"])), (META, meta, these[1][2])]
        for array, at in places:
            head, size_of_file = len(array.header), len(array.header) + array.bytes
            wanted.append((f"{array.name}.npy", arrays + at - head - BLOCKSIZE, size_of_file))
        wanted.append((LABEL, arrays + size, these[-1][2]))
        named = [(f"{key_of(key)}.{suffix}", *place) for suffix, *place in wanted]
        inside = (
            start + BLOCKSIZE == row["frame"] and padded(sum(these[1][1:])) + BLOCKSIZE == arrays
        )
        if not inside or named != list(these):
            return [f"{path}: record {key_of(key)} does not lie where {INDEX} says"]
    return []


def _beton_against_index(path: Path, manifest: Manifest, rows: NDArray[np.void]) -> list[str]:
    flaw = check_tables(path, rows, beton_format(manifest.settings))
    return [flaw] if flaw else []


def damaged_files(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """A line for each file whose bytes are not as written; hashes on all cores.

    Several processes can check a `part` of `parts` each; the first shows how far it is. The index
    is left out: it is checked whenever it is loaded.
    """
    files = [*manifest.shards, manifest.rejected, *manifest.names][part::parts]
    return list(flaws_of_files(folder, files, shown=part == 0).values())


def _decode(folder: Path) -> list[str]:
    records = ShardSet(folder)
    problems = []
    for number in progress("decoding", len(records), range(len(records)), delay=1):
        path, row = records.locate(number)
        try:
            record = records[number]
        except ValueError as error:
            problems.append(str(error))
            continue
        if problem := _flaw(record, row, records.manifest):
            problems.append(f"{path}: record {record.key}: {problem}")
    return problems


def _flaw(record: Record, row: NDArray[np.void], manifest: Manifest) -> str:
    settings = manifest.settings
    frame = (settings.frame, settings.frame, 3)
    try:
        shape = decode_frame(record.frame).shape if settings.frame else frame
        for array in fields_of(settings):
            values(record, array)
    except ValueError as error:
        return str(error)
    if shape != frame:
        return f"the frame is {shape}, the settings say {frame}"
    whole = Counter(array.kind for array in fields_of(settings))
    counts = record.bank.counts if record.bank else {}
    if any(
        len(found) != whole[kind]
        for kind, found in ((DENSITY, record.maps), (COUNTS, counts), (WEIGHTS, record.weights))
    ):
        return "it has arrays that the settings do not know"
    if record.bank and (flaw := _flaw_of_bank(record, record.bank)):
        return flaw
    if any((found < FIXED_POINT).any() for found in record.weights.values()):
        return "it has a weight below 1"
    if any(row[name] != getattr(record, name) for name in ("height", "width", "label")):
        return "the index has another size or label"
    if not -1 <= record.label < max(1, len(manifest.classes)):
        return f"label {record.label} is none of the {len(manifest.classes)} classes"
    return ""


def _flaw_of_bank(record: Record, bank: Bank) -> str:
    top, left, height, width = bank.boxes.T
    outside = (top + height > record.height) | (left + width > record.width)
    if (outside | (height < 1) | (width < 1)).any():
        return "the bank has a box that is not inside its source"
    most = max(counts.max() for counts in bank.counts.values())
    return "the bank counts more than a cell holds" if most > BANK_CELL**2 else ""
