"""FFCV's .beton container, written, checked and converted to without FFCV.

Layout (FFCV 1.0.2, ffcv/types.py and ffcv/fields): header, field descriptors, one metadata row a
record, pages of data that no region crosses, then a table of all regions. Writing it here copies
JPEG bytes as they are, needs no compiler, and cannot hang as FFCV's writer does on a bad record.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards import spec as _manifest
from shards.dataset import ShardSet, flaws_of_files
from shards.errors import UserError
from shards.files import LEFT, LOCK, MANIFEST, alone, replacing, sha256_of
from shards.progress import progress, waiting
from shards.record import Record, decode_frame, npy_bytes, packed, to_rows
from shards.spec import EXTRAS, INDEX, REJECTED, File, Manifest
from shards.tar import INDEX_DTYPE

BETON = "records.beton"
PAGE = 1 << 23  # bytes, FFCV's default
JPG, RAW = 0, 1
ARRAYS = ("maps", "bank")
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")]
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
REGION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
TYPES = {"frame": 2, "maps": 4, "bank": 4, "label": 1, "index": 1}  # RGBImage, NDArray, Int


@dataclass(frozen=True, slots=True)
class Layout:
    """What the records of a .beton look like: side of the frames in px, whether they are raw,
    shape of the packed maps [D, G, G / 2] and of the bank's rows [K, bytes], (0, 0) for none.
    """

    side: int
    raw: bool
    maps: tuple[int, ...]
    bank: tuple[int, ...]

    @property
    def fields(self) -> list[str]:
        """The fields in their order."""
        return [name for name in TYPES if name != "bank" or self.bank[0]]

    @property
    def row(self) -> np.dtype[np.void]:
        """A metadata row, aligned as FFCV does it: 13 bytes of image, 3 of padding, then 8 each."""
        numbers = [(name, "<u8" if name in ARRAYS else "<i8") for name in self.fields[1:]]
        offsets = [0, *(16 + 8 * place for place in range(len(numbers)))]
        return np.dtype(
            {
                "names": self.fields,
                "formats": [IMAGE, *(kind for _, kind in numbers)],
                "offsets": offsets,
                "itemsize": 16 + 8 * len(numbers),
            }
        )


def layout_of(manifest: Manifest) -> Layout:
    """The layout of the FFCV set that `manifest` describes."""
    settings = manifest.settings
    return Layout(settings.frame, settings.quality == 0, settings.maps_shape, settings.bank_shape)


def _descriptors(layout: Layout) -> bytes:
    rows = np.zeros(len(layout.fields), DESCRIPTOR)
    dtype = json.dumps(np.dtype(np.uint8).descr).encode("ascii")
    for row, name in zip(rows, layout.fields, strict=True):
        row["type"] = TYPES[name]
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        if name in ARRAYS:
            dimensions = layout.maps if name == "maps" else layout.bank
            shape = np.zeros(33, "<u8")  # 32 dimensions, then the length of the dtype's text
            shape[: len(dimensions)], shape[32] = dimensions, len(dtype)
            arguments = shape.tobytes() + dtype
            row["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
    return rows.tobytes()


def tables(index: NDArray[np.void], layout: Layout) -> tuple[bytes, bytes, int]:
    """(all bytes before the first page, all bytes after the last, where the latter begin).

    They follow from the set's index alone, so a file can be checked against them to the last bit.
    """
    count = len(index)
    rows = np.zeros(count, layout.row)
    rows["frame"]["mode"] = RAW if layout.raw else JPG
    rows["frame"]["width"] = rows["frame"]["height"] = layout.side
    rows["label"], rows["index"] = index["label"], np.arange(count)
    places = {"frame": index["frame"], "maps": index["maps"]}
    places["bank"] = index["maps"] + index["maps_bytes"]
    parts = ["frame", *(name for name in ARRAYS if name in layout.fields)]
    regions = np.zeros((count, len(parts)), REGION)
    regions["sample"] = np.arange(count)[:, None]
    for column, name in enumerate(parts):
        if name == "frame":
            rows["frame"]["pointer"] = places[name]
        else:
            rows[name] = places[name]
        regions["pointer"][:, column] = places[name]
        regions["size"][:, column] = index[f"{name}_bytes"]
    end = int((regions["pointer"] + regions["size"]).max())
    table = -(-end // PAGE) * PAGE
    header = np.array([(2, len(layout.fields), PAGE, count, table)], HEADER)
    before = header.tobytes() + _descriptors(layout) + rows.tobytes()
    return before, regions.tobytes(), table


def first_page(count: int, layout: Layout) -> int:
    """Where the data of `count` records begin."""
    size = HEADER.itemsize + len(layout.fields) * DESCRIPTOR.itemsize + count * layout.row.itemsize
    return -(-size // PAGE) * PAGE


def write_beton(
    path: Path, records: Iterable[Record], count: int, layout: Layout
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
            maps = packed(record.maps).tobytes()
            bank = to_rows(record.bank).tobytes() if record.bank else b""
            size = len(frame) + len(maps) + len(bank)
            if size > PAGE:
                raise UserError(f"record {record.key} has {size} bytes, more than FFCV's page")
            if at // PAGE != (at + size - 1) // PAGE:
                at = -(-at // PAGE) * PAGE
            file.seek(at)
            file.write(frame + maps + bank)
            places = (int(record.key), at, at, at + len(frame), len(frame), len(maps), len(bank))
            index[number] = (*places, size, record.height, record.width, record.label)
            at += size
        before, after, table = tables(index, layout)
        file.seek(table)
        file.write(after)
        file.seek(0)
        file.write(before)
    return index


def check_tables(path: Path, index: NDArray[np.void], layout: Layout) -> str:
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
        raise UserError(f"{folder} is an FFCV set already; convert WebDataset shards")
    if frames == "jpeg" and settings.quality == 0:
        raise UserError(f"{folder} holds raw frames; convert it with --frames raw")
    raw = frames == "raw"
    facts = {"from": source.manifest.fingerprint, "frames": frames, "container": "ffcv"}
    fingerprint = _manifest.fingerprint(facts)
    finished = _finished(out, fingerprint)
    if finished:
        if (out / LOCK).exists():  # killed between the manifest and the tidying up
            (out / LOCK).unlink(missing_ok=True)
        return finished
    manifest = replace(
        source.manifest,
        container="ffcv",
        settings=replace(settings, quality=0) if raw else settings,
        fingerprint=fingerprint,
    )
    with alone(out):
        with replacing(out / BETON) as temporary:
            numbers = progress("converting", len(source), range(len(source)))
            index = write_beton(
                temporary, map(source.__getitem__, numbers), len(source), layout_of(manifest)
            )
            with waiting(f"hashing {BETON}"):
                size, digest = temporary.stat().st_size, sha256_of(temporary)
        rejected, rows = (folder / REJECTED).read_bytes(), source.manifest.rejected.count
        manifest = replace(
            manifest,
            shards=[File(BETON, len(source), size, digest)],
            index=_manifest.write_file(out / INDEX, npy_bytes(index), len(index)),
            rejected=_manifest.write_file(out / REJECTED, rejected, rows),
        )
        _compare(source, ShardSet(out, manifest), raw)
        _manifest.write(out, manifest)
    return manifest


def _finished(out: Path, fingerprint: str) -> Manifest | None:
    """The finished, whole conversion in `out`, None if one is to be written, else UserError."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder for the FFCV set")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if MANIFEST in names:
        manifest = _manifest.load(out)
        if manifest.fingerprint != fingerprint:
            raise UserError(f"{out} holds another set; name a new folder")
        flaws = flaws_of_files(out, [*manifest.shards, manifest.index, manifest.rejected])
        return None if flaws else manifest
    ours = {BETON, INDEX, REJECTED, MANIFEST, LOCK, *EXTRAS}
    others = {name for name in names if LEFT.sub("", name) not in ours}
    if others:
        raise UserError(f"{out} holds something else ({min(others)}); name a new or empty folder")
    return None


def _compare(source: ShardSet, copy: ShardSet, raw: bool) -> None:
    for number in progress("verifying", len(source), range(len(source))):
        record, twin = source[number], copy[number]
        same = (
            np.array_equal(decode_frame(record.frame), decode_frame(twin.frame))
            if raw
            else record.frame == twin.frame
        )
        facts = ("key", "label", "height", "width")
        same = same and all(getattr(record, f) == getattr(twin, f) for f in facts)
        if record.bank and twin.bank:
            same = same and record.bank.equals(twin.bank)
        if not same or not np.array_equal(record.maps, twin.maps):
            raise UserError(f"record {record.key} reads back otherwise; the disk may be at fault")
