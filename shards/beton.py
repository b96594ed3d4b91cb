"""FFCV's .beton container, written, checked and converted to without FFCV.

Layout (FFCV 1.0.2, ffcv/types.py and ffcv/fields): header, field descriptors, one metadata row a
record, pages of data that no region crosses, then a table of all regions. Writing it here copies
JPEG bytes as they are, needs no compiler, and cannot hang as FFCV's writer does on a bad record.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards import spec
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.files import LEFT, LOCK, MANIFEST, alone, replacing, sha256_of
from shards.index import flaws_of_files
from shards.progress import progress, waiting
from shards.record import (
    COUNTS,
    DENSITY,
    WEIGHTS,
    Array,
    Record,
    decode_frame,
    fields_of,
    npy_bytes,
)
from shards.spec import EXTRAS, INDEX, REJECTED, File, Manifest, Settings
from shards.tar import INDEX_DTYPE

BETON = "records.beton"
PAGE = 1 << 23  # bytes, FFCV's default
JPG, RAW = 0, 1
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")]
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
REGION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
IMAGES, ARRAYS, NUMBERS = 2, 4, 1  # FFCV's types of RGBImageField, NDArrayField, IntField
FACTS = ("label", "index", "height", "width")  # integers of a record, behind its arrays
LONGEST = 16  # bytes of a field's name


def field_of(array: Array) -> str:
    """The name of an array's field. A density whose name is too long for FFCV gets the detector's
    name alone.
    """
    short = array.kind == DENSITY and len(array.name) > LONGEST
    return array.detector if short else array.name


@dataclass(frozen=True, slots=True)
class BetonFormat:
    """What the records of a .beton look like: side of the frames in px, whether they are raw, and
    their arrays.
    """

    side: int
    raw: bool
    arrays: tuple[Array, ...]

    @property
    def fields(self) -> dict[str, Array | None]:
        """The fields in their order, with the array that each is.

        Raises UserError if FFCV has no room for a name.
        """
        fields: dict[str, Array | None] = {"frame": None}
        fields |= {field_of(array): array for array in self.arrays}
        long = [name for name in fields if len(name) > LONGEST]
        if long or len(fields) != 1 + len(self.arrays):
            names = ", ".join(long or fields)
            raise UserError(
                f"FFCV's fields have different names of at most {LONGEST} letters, not {names}"
            )
        return fields | dict.fromkeys(FACTS)

    @property
    def row(self) -> np.dtype[np.void]:
        """A metadata row, aligned as FFCV does it: 13 bytes of image, 3 of padding, then 8 each."""
        fields = self.fields
        numbers = ["<u8" if array else "<i8" for array in fields.values()][1:]
        offsets = [0, *(16 + 8 * place for place in range(len(numbers)))]
        return np.dtype(
            {
                "names": list(fields),
                "formats": [IMAGE, *numbers],
                "offsets": offsets,
                "itemsize": 16 + 8 * len(numbers),
            }
        )


def beton_format(settings: Settings) -> BetonFormat:
    """The layout of an FFCV set with `settings`."""
    return BetonFormat(settings.frame, settings.quality == 0, tuple(fields_of(settings)))


def _descriptors(layout: BetonFormat) -> bytes:
    fields = layout.fields
    rows = np.zeros(len(fields), DESCRIPTOR)
    for row, (name, array) in zip(rows, fields.items(), strict=True):
        row["type"] = IMAGES if name == "frame" else ARRAYS if array else NUMBERS
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        if array:
            dtype = json.dumps(array.dtype.descr).encode("ascii")
            shape = np.zeros(33, "<u8")  # 32 dimensions, then the length of the dtype's text
            shape[: len(array.shape)], shape[32] = array.shape, len(dtype)
            arguments = shape.tobytes() + dtype
            row["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
    return rows.tobytes()


def tables(index: NDArray[np.void], layout: BetonFormat) -> tuple[bytes, bytes, int]:
    """(all bytes before the first page, all bytes after the last, where the latter begin).

    They follow from the set's index alone, so a file can be checked against them to the last bit.
    """
    count = len(index)
    rows = np.zeros(count, layout.row)
    rows["frame"]["mode"] = RAW if layout.raw else JPG
    rows["frame"]["width"] = rows["frame"]["height"] = layout.side
    rows["frame"]["pointer"] = index["frame"]
    rows["index"] = np.arange(count)
    for name in ("label", "height", "width"):
        rows[name] = index[name]
    regions = np.zeros((count, 1 + len(layout.arrays)), REGION)
    regions["sample"] = np.arange(count)[:, None]
    regions["pointer"][:, 0], regions["size"][:, 0] = index["frame"], index["frame_bytes"]
    at = index["arrays"].copy()
    for column, array in enumerate(layout.arrays, start=1):
        rows[field_of(array)] = regions["pointer"][:, column] = at
        regions["size"][:, column] = array.bytes
        at += np.uint64(array.bytes)
    end = int((regions["pointer"] + regions["size"]).max())
    table = -(-end // PAGE) * PAGE
    header = np.array([(2, len(layout.fields), PAGE, count, table)], HEADER)
    before = header.tobytes() + _descriptors(layout) + rows.tobytes()
    return before, regions.tobytes(), table


def first_page(count: int, layout: BetonFormat) -> int:
    """Where the data of `count` records begin."""
    size = HEADER.itemsize + len(layout.fields) * DESCRIPTOR.itemsize + count * layout.row.itemsize
    return -(-size // PAGE) * PAGE


def write_beton(
    path: Path, records: Iterable[Record], count: int, layout: BetonFormat
) -> NDArray[np.void]:
    """Write `count` records to `path`; returns their index, INDEX_DTYPE [count].

    Frames are copied as JPEG bytes, or decoded where the layout is raw. Places in the index are
    the file's. Raises UserError if a record is larger than a page.
    """
    index = np.zeros(count, INDEX_DTYPE)
    at = first_page(count, layout)
    with path.open("wb") as file:
        for number, record in enumerate(records):
            frame = decode_frame(record.frame).tobytes() if layout.raw else record.frame
            arrays = b"".join(values(record, array).tobytes() for array in layout.arrays)
            size = len(frame) + len(arrays)
            if size > PAGE:
                raise UserError(f"record {record.key} has {size} bytes, more than FFCV's page")
            if at // PAGE != (at + size - 1) // PAGE:
                at = -(-at // PAGE) * PAGE
            file.seek(at)
            file.write(frame + arrays)
            places = (int(record.key), at, at, at + len(frame), len(frame), size)
            index[number] = (*places, record.height, record.width, record.label)
            at += size
        before, after, table = tables(index, layout)
        file.seek(table)
        file.write(after)
        file.seek(0)
        file.write(before)
    return index


def values(record: Record, array: Array) -> NDArray[Any]:
    """The values of `array` in a record, of the array's dtype. Raises UserError if it has none."""
    bank, crops = record.bank, {}
    if bank:
        crops = {"boxes": {"bank": bank.boxes}, "flips": {"bank": bank.flips}, COUNTS: bank.counts}
    parts: dict[str, Any] = {DENSITY: record.maps, WEIGHTS: record.weights, **crops}
    found = parts.get(array.kind, {}).get(array.detector)
    if found is None or found.shape != array.shape:
        raise UserError(f"record {record.key} has no {array.name} of {array.shape}")
    return np.asarray(found, array.dtype)


def check_tables(path: Path, index: NDArray[np.void], layout: BetonFormat) -> str:
    """What is wrong with the tables of the .beton at `path`, or nothing."""
    before, after, table = tables(index, layout)
    with path.open("rb") as file:
        head = file.read(len(before))
        file.seek(table)
        tail = file.read()
    if head == before and tail == after:
        return ""
    part = "header or metadata" if head != before else "table of regions"
    return f"{path}: its {part} are not those of its index"


def convert_to_ffcv(folder: Path, out: Path, frames: str = "jpeg") -> Manifest:
    """Write the set in `folder` as an FFCV set into `out`; returns its manifest.

    frames: `jpeg` copies the JPEG bytes, `raw` stores pixels. A finished `out` of the same source
    is hashed, and left as it is if it is whole; what is damaged there, or was left by a killed
    conversion, is done again. Raises UserError, naming shard and key, at a damaged record, and if
    `out` holds anything else.
    """
    source = ShardSet(folder)
    settings = source.manifest.settings
    if source.manifest.container != "webdataset":
        what = "holds no frames" if settings.frame == 0 else "is an FFCV set already"
        raise UserError(f"{folder} {what}; convert WebDataset shards")
    if frames == "jpeg" and settings.quality == 0:
        raise UserError(f"{folder} holds raw frames; convert it with --frames raw")
    raw = frames == "raw"
    facts = {"from": source.manifest.fingerprint, "frames": frames, "container": "ffcv"}
    fingerprint = spec.fingerprint(facts)
    finished = finished_copy(out, fingerprint, {BETON})
    if finished:
        return finished
    manifest = replace(
        source.manifest,
        container="ffcv",
        settings=replace(settings, quality=0) if raw else settings,
        fingerprint=fingerprint,
    )
    with alone(out):
        if finished := finished_copy(out, fingerprint, {BETON}):  # by another process, meanwhile
            return finished
        flaws = flaws_of_files(folder, source.manifest.files)
        if flaws:  # whose bytes would be hashed anew, as if they were sound
            raise UserError(min(flaws.values()))
        with replacing(out / BETON) as temporary:
            numbers = progress("converting", len(source), range(len(source)))
            index = write_beton(
                temporary,
                map(source.__getitem__, numbers),
                len(source),
                beton_format(manifest.settings),
            )
            with waiting(f"hashing {BETON}"):
                size, digest = temporary.stat().st_size, sha256_of(temporary)
        rejected, rows = (folder / REJECTED).read_bytes(), source.manifest.rejected.count
        manifest = replace(
            manifest,
            shards=[File(BETON, len(source), size, digest)],
            index=spec.write_file(out / INDEX, npy_bytes(index), len(index)),
            rejected=spec.write_file(out / REJECTED, rejected, rows),
        )
        _compare(source, ShardSet(out, manifest), raw)
        spec.write(out, manifest)
    return manifest


def finished_copy(out: Path, fingerprint: str, shards: set[str]) -> Manifest | None:
    """The finished, whole set in `out`; None if a set is to be written there, whose shards are
    called `shards`. Raises UserError if `out` holds anything else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the new set")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if MANIFEST in names:
        manifest = spec.load(out)
        if manifest.fingerprint != fingerprint:
            raise UserError(f"{out} holds another set; name a new folder")
        if flaws_of_files(out, [*manifest.shards, manifest.index, manifest.rejected]):
            return None
        if LOCK in names:  # killed between the manifest and the tidying up
            (out / LOCK).unlink(missing_ok=True)
        return manifest
    ours = {*shards, INDEX, REJECTED, MANIFEST, LOCK, *EXTRAS}
    others = {name for name in names if LEFT.sub("", name) not in ours}
    if others:
        raise UserError(f"{out} holds something else ({min(others)}); name a new or empty folder")
    return None


def _compare(source: ShardSet, copy: ShardSet, raw: bool) -> None:
    for number in progress("verifying", len(source), range(len(source))):
        record = replace(source[number], source="")  # which has no field
        twin = copy[number]
        same = not raw or np.array_equal(decode_frame(record.frame), decode_frame(twin.frame))
        if raw:
            twin = replace(twin, frame=record.frame)
        if not same or not record.equals(twin):
            raise UserError(f"record {record.key} reads back otherwise; the disk may be at fault")
