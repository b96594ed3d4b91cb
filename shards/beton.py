"""FFCV's .beton container, written and read without FFCV: records in, one file out, and back.

Layout (FFCV 1.0.2, ffcv/types.py and ffcv/fields): header, field descriptors, one metadata row a
record, pages of data that no region crosses, then a table of all regions. Writing it here copies
JPEG bytes as they are, needs no compiler, and cannot hang as FFCV's writer does on a bad record.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.record import Record, decode_frame
from shards.webdataset import INDEX_DTYPE

BETON = "records.beton"
PAGE = 1 << 23  # bytes, FFCV's default
JPG, RAW = 0, 1
HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")]
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
# Aligned as FFCV aligns it: 13 bytes of image, 3 of padding, then 8 each.
ROW = np.dtype(
    {
        "names": ["frame", "maps", "label", "index"],
        "formats": [IMAGE, "<u8", "<i8", "<i8"],
        "offsets": [0, 16, 24, 32],
        "itemsize": 40,
    }
)
REGION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
TYPES = {"frame": 2, "maps": 4, "label": 1, "index": 1}  # FFCV's RGBImage, NDArray, Int


def _descriptors(maps: tuple[int, ...]) -> bytes:
    rows = np.zeros(len(TYPES), DESCRIPTOR)
    for row, (name, kind) in zip(rows, TYPES.items(), strict=True):
        row["type"] = kind
        row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
    dtype = json.dumps(np.dtype(np.uint8).descr).encode("ascii")
    shape = np.zeros(33, "<u8")  # 32 dimensions, then the length of the dtype's text
    shape[: len(maps)], shape[32] = maps, len(dtype)
    arguments = shape.tobytes() + dtype
    rows[1]["arguments"][: len(arguments)] = np.frombuffer(arguments, np.uint8)
    return rows.tobytes()


def tables(
    index: NDArray[np.void], side: int, maps: tuple[int, ...], raw: bool
) -> tuple[bytes, bytes, int]:
    """(all bytes before the first page, all bytes after the last, where the latter begin).

    They follow from the set's index alone, so a file can be checked against them to the last bit.
    """
    count = len(index)
    rows = np.zeros(count, ROW)
    rows["frame"]["mode"] = RAW if raw else JPG
    rows["frame"]["width"] = rows["frame"]["height"] = side
    rows["frame"]["pointer"], rows["maps"] = index["frame"], index["maps"]
    rows["label"], rows["index"] = index["label"], np.arange(count)
    regions = np.zeros((count, 2), REGION)
    regions["sample"] = np.arange(count)[:, None]
    regions["pointer"] = np.stack([index["frame"], index["maps"]], axis=1)
    regions["size"] = np.stack([index["frame_bytes"], index["maps_bytes"]], axis=1)
    end = int((index["maps"] + index["maps_bytes"]).max())
    table = -(-end // PAGE) * PAGE
    header = np.array([(2, len(TYPES), PAGE, count, table)], HEADER)
    before = header.tobytes() + _descriptors(maps) + rows.tobytes()
    return before, regions.tobytes(), table


def first_page(count: int) -> int:
    """Where the data of `count` records begin."""
    size = HEADER.itemsize + len(TYPES) * DESCRIPTOR.itemsize + count * ROW.itemsize
    return -(-size // PAGE) * PAGE


def write_beton(
    path: Path, records: Iterable[Record], count: int, side: int, raw: bool
) -> NDArray[np.void]:
    """Write `count` records to `path` and sync it; returns their index, INDEX_DTYPE [count].

    Frames are copied as JPEG bytes, or decoded where `raw`. Places in the index are the file's.
    Raises ValueError if a record's frame is larger than a page.
    """
    index = np.zeros(count, INDEX_DTYPE)
    at, shape = first_page(count), (0,)
    with path.open("wb") as file:
        for number, record in enumerate(records):
            frame = decode_frame(record.frame).tobytes() if raw else record.frame
            shape = record.maps.shape
            size = len(frame) + record.maps.nbytes
            if size > PAGE:
                raise ValueError(f"record {record.key} has {size} bytes, more than FFCV's page")
            if at // PAGE != (at + size - 1) // PAGE:
                at = -(-at // PAGE) * PAGE
            file.seek(at)
            file.write(frame)
            file.write(record.maps.tobytes())
            places = (int(record.key), at, at, at + len(frame), len(frame), record.maps.nbytes)
            index[number] = (*places, size, record.height, record.width, record.label)
            at += size
        before, after, table = tables(index, side, shape, raw)
        file.seek(table)
        file.write(after)
        file.seek(0)
        file.write(before)
        file.flush()
        os.fsync(file.fileno())
    return index


def check_tables(
    path: Path, index: NDArray[np.void], side: int, maps: tuple[int, ...], raw: bool
) -> str:
    """What is wrong with the tables of the .beton at `path`, or nothing."""
    before, after, table = tables(index, side, maps, raw)
    with path.open("rb") as file:
        head = file.read(len(before))
        file.seek(table)
        tail = file.read()
    if head == before and tail == after:
        return ""
    part = "header or metadata" if head != before else "table of regions"
    return f"{path}: its {part} are not those of its index"
