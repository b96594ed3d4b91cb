"""Somebody's own .beton of FFCV's: its images, JPEG or raw, by their index, read without FFCV.

Only the header, the tables and the images' bytes are read; other fields, pickles or not, are not.
"""

import os

import numpy as np
from numpy.typing import NDArray

from preprocess.decode import Rejected
from preprocess.files import join, kind_of, read_part
from preprocess.source import MAX_CLASSES, Entry, Source, names_in
from shards.beton import ARRAYS, DESCRIPTOR, HEADER, IMAGE, IMAGES, NUMBERS, RAW, REGION
from shards.errors import UserError
from shards.remote.storage import is_url

LABEL = "label"  # of the field of numbers that is taken for one
SIDES = 32  # bits of a stamp that hold a raw image's width and height
FIELDS = 1000  # in a file; more is damage
JSON, BYTES, FLOATS, TENSORS = 5, 3, 0, 6  # FFCV's other types of fields
PLACE = np.dtype([("pointer", "<u8"), ("size", "<u8")])
ROWS = {FLOATS: np.dtype("<f8"), NUMBERS: np.dtype("<i8"), IMAGES: IMAGE}
ROWS |= {BYTES: PLACE, JSON: PLACE, ARRAYS: np.dtype("<u8"), TENSORS: np.dtype("<u8")}


def list_ffcv(where: str, split: str) -> Source | None:
    """The images of the .beton at `where` in its own order, each called by its index.

    Raises UserError if it is no .beton, or holds no images or several in a sample.
    """
    if is_url(where) or kind_of(where) != "file":
        inside = names_in(where) if not is_url(where) else []
        ours = [join(where, name) for name in inside if name.endswith(".beton")]
        how = f"name {ours[0]}" if ours else "name one"
        raise UserError(f"{where} is no .beton file on this machine; {how}")
    names, rows, regions = _tables(where)
    images = [n for n, (_, kind) in enumerate(names) if kind == IMAGES]
    if len(images) != 1:
        raise UserError(f"{where} has {len(images)} fields of images; densities are for one")
    found = rows[f"f{images[0]}"]
    raw = found["mode"] == RAW
    order = np.argsort(regions["pointer"], kind="stable")
    at = np.searchsorted(regions["pointer"], found["pointer"], sorter=order)
    held = regions[order[np.minimum(at, len(order) - 1)]]
    flawed = held["pointer"] != found["pointer"]
    width, height = found["width"].astype(np.int64), found["height"].astype(np.int64)
    sizes = np.where(raw, width * height * 3, held["size"].astype(np.int64))
    labels = np.full(len(rows), -1)
    for number, (name, kind) in enumerate(names):
        if name == LABEL and kind == NUMBERS:
            labels = rows[f"f{number}"]
    if labels.max(initial=-1) >= MAX_CLASSES or labels.min(initial=0) < -1:
        raise UserError(f"{where} has labels of {labels.min()} to {labels.max()}: none are classes")
    # A raw image's sides are nowhere else: they end its stamp, and tell it from a JPEG's 0.
    sides = np.where(raw, width << 16 | height, 0)
    stamp = os.stat(where).st_mtime_ns << SIDES
    facts = labels, sizes, found["pointer"].astype(np.int64), sides, flawed
    entries = [
        Entry(str(number), label, size, pointer, stamp | both, "unreadable" if flaw else "")
        for number, (label, size, pointer, both, flaw) in enumerate(
            zip(*(each.tolist() for each in facts), strict=True)
        )
    ]
    classes = [str(number) for number in range(int(labels.max(initial=-1)) + 1)]
    return Source("ffcv", where, entries, classes)


def _tables(
    where: str,
) -> tuple[list[tuple[str, int]], NDArray[np.void], NDArray[np.void]]:
    """Names and types of the fields, a row per sample with columns f0, f1, ..., and all regions."""
    try:
        with open(where, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            (head,) = np.frombuffer(file.read(HEADER.itemsize), HEADER)
            if head["version"] != 2 or not 0 < head["fields"] <= FIELDS:
                raise ValueError(f"version {head['version']}, {head['fields']} fields")
            count = int(head["fields"])
            told = np.frombuffer(file.read(count * DESCRIPTOR.itemsize), DESCRIPTOR, count)
            kinds = told["type"].tolist()
            row = np.dtype([(f"f{n}", ROWS[kind]) for n, kind in enumerate(kinds)], align=True)
            if not told["name"][:, 0].all():
                raise ValueError("a field without a name")
            samples, table = int(head["samples"]), int(head["table"])
            if samples * row.itemsize > size or table > size or not samples:
                raise ValueError(f"{samples} samples in {size} bytes")
            rows = np.frombuffer(file.read(samples * row.itemsize), row, samples)
            file.seek(table)
            regions = np.frombuffer(file.read(), REGION)
            if not len(regions):
                raise ValueError("no table of regions")
    except (ValueError, KeyError) as error:
        raise UserError(f"{where} is no .beton of FFCV, or is damaged ({error})") from None
    names = [bytes(name).rstrip(b"\0").decode("ascii", "replace") for name in told["name"]]
    return list(zip(names, kinds, strict=True)), rows, regions


def image(root: str, entry: Entry) -> bytes:
    """The image: its JPEG file, or its pixels as a PPM picture."""
    data = read_part(root, entry.offset, entry.size)
    if len(data) != entry.size:
        raise Rejected("changed", f"listed with {entry.size} bytes, read {len(data)}")
    sides = entry.stamp & ((1 << SIDES) - 1)
    return f"P6\n{sides >> 16} {sides & 0xFFFF}\n255\n".encode("ascii") + data if sides else data
