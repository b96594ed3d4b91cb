"""Check a finished set of shards: its folder in, a list of what is wrong with it out.

structure: manifest, ledger, files, sizes, index against every tar header. checksum: sha256 of
every file. decode: every record parses and its frame decodes. Each level includes those before.
(The fourth, redetect, needs detectors and lives in preprocess.)
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards import spec as _manifest
from shards.beton import check_tables, layout_of
from shards.dataset import ShardSet, flaws_of_files, load_index
from shards.errors import UserError
from shards.files import check_size
from shards.progress import progress
from shards.record import Record, decode_frame, key_of
from shards.spec import BANK_CELL, INDEX, REJECTED, Manifest, Settings
from shards.tar import headers

LEVELS = ("structure", "checksum", "decode")


def verify_shards(folder: Path | str, level: str = "checksum") -> list[str]:
    """Everything wrong with the set in `folder`, a line each; empty if it is sound."""
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r}; there are {', '.join(LEVELS)}")
    folder = Path(folder)
    try:
        manifest = _manifest.load(folder)
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
        if path.name.endswith(".tmp") or (path.suffix == ".tar" and path.name not in listed):
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
                problems += _against_index(folder / shard.name, rows)
            else:
                problems += _beton_against_index(folder / shard.name, manifest, rows)
        except ValueError as error:
            problems.append(str(error))
    try:
        check_size(folder / REJECTED, manifest.rejected.bytes)
    except ValueError as error:
        problems.append(str(error))
    return problems


def _against_index(path: Path, rows: NDArray[np.void]) -> list[str]:
    """Whether the tar's headers are those of `rows`: four a record, at the places it says."""
    found = list(headers(path))
    if len(found) != 4 * len(rows):
        return [f"{path} has {len(found)} members, {4 * len(rows)} belong to {len(rows)} records"]
    for row, four in zip(rows, zip(*[iter(found)] * 4, strict=True), strict=True):
        frame, maps = four[0], four[1]
        size = row["maps_bytes"] + row["bank_bytes"]
        wanted = (row["start"], row["frame"], row["frame_bytes"], row["maps"], size)
        actual = (frame[1], frame[1] + 512, frame[2], maps[1] + 512, maps[2])
        key = key_of(int(row["key"]))
        if wanted != actual or any(name.partition(".")[0] != key for name, _, _ in four):
            return [f"{path}: record {key} does not lie where {INDEX} says"]
    return []


def _beton_against_index(path: Path, manifest: Manifest, rows: NDArray[np.void]) -> list[str]:
    flaw = check_tables(path, rows, layout_of(manifest))
    return [flaw] if flaw else []


def damaged_files(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """A line for each file whose bytes are not as written; hashes on all cores.

    Of several processes, each can check its `part` of `parts`. The index is left out: it is
    checked whenever it is loaded.
    """
    files = [*manifest.shards, manifest.rejected][part::parts]
    return list(flaws_of_files(folder, files).values())


def _decode(folder: Path) -> list[str]:
    records = ShardSet(folder)
    problems = []
    for number in progress("decoding", len(records), range(len(records)), delay=1):
        try:
            problem = _flaw(records[number], records.manifest)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problem:
            path, _ = records.locate(number)
            problems.append(f"{path}: record {records[number].key}: {problem}")
    return problems


def _flaw(record: Record, manifest: Manifest) -> str:
    settings = manifest.settings
    frame, maps = (settings.frame,) * 2 + (3,), (len(settings.detectors),) + (settings.grid,) * 2
    try:
        shape = decode_frame(record.frame).shape
    except ValueError as error:
        return str(error)
    if shape != frame:
        return f"the frame is {shape}, the settings say {frame}"
    if record.maps.shape != maps:
        return f"the maps are {record.maps.shape}, the settings say {maps}"
    flaw = _flaw_of_bank(record, settings)
    if flaw:
        return flaw
    if not -1 <= record.label < max(1, len(manifest.classes)):
        return f"label {record.label} is none of the {len(manifest.classes)} classes"
    return ""


def _flaw_of_bank(record: Record, settings: Settings) -> str:
    bank, cells = record.bank, settings.crop // BANK_CELL
    if bank is None or not settings.bank:
        return "" if bank is None and not settings.bank else "bank and settings do not agree"
    shape = (settings.bank, len(settings.detectors), cells, cells)
    if bank.counts.shape != shape:
        return f"the bank is {bank.counts.shape}, the settings say {shape}"
    top, left, height, width = bank.boxes.astype(np.int64).T
    outside = (top + height > record.height) | (left + width > record.width)
    if (outside | (height < 1) | (width < 1)).any() or bank.flips.max() > 1:
        return "the bank has a box that is not inside its source"
    return "the bank counts more than a cell holds" if bank.counts.max() > BANK_CELL**2 else ""
