"""Image datasets as Parquet, the way the Hugging Face hub keeps them.

Each row is an image; label and class names are as the schema's metadata says. A row group is read
once and kept.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from preprocess.decode import Rejected
from preprocess.files import join, of_each, opened, version_of
from preprocess.source import MAX_CLASSES, Entry, Source, of_split, parts_below
from shards.errors import UserError, install
from shards.remote.retry import retried
from shards.remote.storage import is_url


class Columns(NamedTuple):
    """Which columns hold pictures and labels, and what the labels are called."""

    image: str
    label: str
    classes: tuple[str, ...]


def list_parquet(where: str, split: str) -> Source | None:
    """Rows in the order of the files. Only labels and names are read.

    Raises UserError if the files do not agree on columns and classes, or a label is outside them.
    """
    found = {part.name: part for part in parts_below(where, ".parquet")}
    entries: list[Entry] = []
    agreed = None
    parts = of_split(list(found), split)
    listed = of_each(where, lambda part: _list_part(join(where, part), found[part]), parts)
    for part, (columns, rows) in zip(parts, listed, strict=True):
        if agreed not in {None, columns}:
            raise UserError(f"{part} in {where} has other columns or classes than those before")
        agreed = columns
        entries += rows
    top = max((entry.label for entry in entries), default=-1)
    classes = list(agreed.classes) if agreed else []
    return Source("parquet", where, entries, classes or [str(n) for n in range(top + 1)])


def image(root: str, entry: Entry) -> bytes:
    """The bytes of the picture in the entry's row."""
    where, row = join(root, entry.part), entry.offset
    try:
        value = retried(where, lambda: _value(where, row)) if is_url(root) else _value(where, row)
    except FileNotFoundError:
        raise Rejected("vanished", "its file was listed and is gone") from None
    except (OSError, ValueError) as error:
        if is_url(root):
            raise
        raise Rejected("unreadable", _words(error)) from None
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise Rejected("not-an-image", "the row holds no bytes; a path in it is not followed")
    return data


def _value(where: str, row: int) -> Any:
    """What the column of images holds in row `row`."""
    version = version_of(where)
    with _parsing(where):
        _, _, starts, _ = _file(where, version)
        if row >= starts[-1]:
            raise Rejected("changed", f"listed as row {row}, its file has {starts[-1]}")
        group = int(np.searchsorted(starts, row, side="right")) - 1
        return _group(where, version, group)[row - int(starts[group])].as_py()


@contextmanager
def _parsing(where: str) -> Iterator[None]:
    """Nearly anything that damaged bytes raise within, as a UserError that names the file."""
    try:
        yield
    except Exception as error:
        # OSErrors of damage have no number, a disk's have one; a store is asked again.
        elsewhere = isinstance(error, OSError) and (error.errno is not None or is_url(where))
        if elsewhere or isinstance(error, (Rejected, UserError)):
            raise
        raise UserError(
            f"{where} is no whole Parquet file ({_words(error)}); fetch it again"
        ) from None


def _words(error: Exception) -> str:
    """An error in one short line."""
    return " ".join(str(error).split())[:200]


@lru_cache(maxsize=8)
def _file(where: str, version: tuple[int, ...]) -> tuple[Any, Columns, np.ndarray, int]:
    """The open file, its columns, the first row of each row group with the end, and a checksum of
    its footer, which knows the bytes, and mostly the least and greatest value, of each column.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"Parquet needs pyarrow; {install('pyarrow')}") from None
    stream = opened(where, ahead=False)
    file, size = ParquetFile(stream, pre_buffer=is_url(where)), stream.seek(0, os.SEEK_END)
    facts = file.metadata
    groups = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
    # Lists of so many rows, ours and Arrow's, would be made before any of them is read.
    if min(groups, default=0) < 0 or sum(groups) != facts.num_rows or facts.num_rows > size:
        raise UserError(f"{where} says {sum(groups)} rows in {size} bytes; fetch it again")
    stream.seek(-8, os.SEEK_END)
    footer = int.from_bytes(stream.read(4), "little")
    stream.seek(-8 - footer, os.SEEK_END)
    stamp = int.from_bytes(hashlib.sha256(stream.read(footer)).digest()[:6])
    return file, _columns(file.schema_arrow, where), np.cumsum([0, *groups]), stamp


@lru_cache(maxsize=2)  # the hub's groups hold 100 to 1,000 pictures
def _group(where: str, version: tuple[int, ...], group: int) -> Any:
    file, columns, _, _ = _file(where, version)
    # Arrow's threads, still there when Python ends, have it abort now and then.
    table = file.read_row_group(group, columns=[columns.image], use_threads=False)
    return table.column(columns.image)


def _columns(schema: Any, where: str) -> Columns:
    """By the hub's metadata where it is, else by the usual names."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        features = {}
    kinds = {name: facts for name, facts in features.items() if isinstance(facts, dict)}
    images = [name for name, facts in kinds.items() if facts.get("_type") == "Image"]
    labels = [name for name, facts in kinds.items() if facts.get("_type") == "ClassLabel"]
    images += [name for name in ("image", "img") if name in schema.names]
    labels += [name for name in ("label", "fine_label", "labels") if name in schema.names]
    images = [name for name in images if name in schema.names]
    if not images:
        raise UserError(f"{where} has no column of images; it has {', '.join(schema.names)}")
    label = next((name for name in labels if name in schema.names), "")
    names = kinds.get(label, {}).get("names") or []
    return Columns(images[0], label, tuple(map(str, names)))


def _list_part(where: str, part: Entry) -> tuple[Columns, list[Entry]]:
    with _parsing(where):
        file, columns, starts, stamp = _file(where, version_of(where))
        picture = file.schema_arrow.field(columns.image).type
        pathed = "path" in {picture.field(n).name for n in range(picture.num_fields)}
        wanted = [columns.label] if columns.label else []
        wanted += [f"{columns.image}.path"] if pathed else []
        table = file.read(columns=wanted, use_threads=False)
        labels: list[Any] = [None] * int(starts[-1])
        paths = labels
        if columns.label:
            labels = table.column(columns.label).to_pylist()
        if pathed:
            paths = [row and row["path"] for row in table.column(columns.image).to_pylist()]
        most = len(columns.classes) or MAX_CLASSES
        entries = []
        for row, (label, path) in enumerate(zip(labels, paths, strict=True)):
            label = -1 if label is None else label
            if not isinstance(label, int):
                words = f"row {row}: the label {str(label)[:40]!r} is no whole number"
                raise UserError(
                    f"{where}, {words}; number the classes, or use the hub's ClassLabel"
                )
            if not -1 <= label < most:
                raise UserError(f"{where}, row {row}: label {label!r} is none of {most} classes")
            name = str(join(part.name, path or str(row)) if part.name else path or row)
            entries.append(Entry(name, label, 0, row, stamp, part=part.name))
        return columns, entries
