"""WebDataset tars of any origin: a folder of them, one of them, or a .txt that lists them.

Each sample's picture is an entry, with the label that its `cls` or `json` gives. Members of other
kinds, pickles among them, are never read.
"""

import json
import os
import tarfile
from functools import partial
from typing import BinaryIO

from preprocess.files import join, kind_of, of_each, opened, read_all
from preprocess.layouts.tar import entry_of, members
from preprocess.source import MAX_CLASSES, Entry, Source, look_up, names_in, of_split, parts_below
from shards.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp")
LABELS = ("label", "cls", "class")  # names of the number in a sample's json
CLASSES = ("classnames.txt", "classes.txt")
LONGEST = 1 << 26  # bytes of a json that is looked into


def list_webdataset(where: str, split: str) -> Source | None:
    """Samples in the order of the tars and of their members; several pictures are several entries.

    Raises UserError at a tar that is not whole, a label that is no number or outside the classes
    of a classnames.txt beside the tars.
    """
    root, parts = where, [""]
    if where.endswith(".txt") and kind_of(where) == "file":
        root = where.rpartition("/")[0]
        text = read_all(where).decode("utf-8", "surrogateescape")
        parts = [line.strip() for line in text.splitlines()]
        parts = [line for line in parts if line and not line.startswith("#")]
        flawed = next((part for part in look_up(root, ((p, -1) for p in parts)) if part.flaw), None)
        if flawed:
            raise UserError(f"{where} lists {flawed.name!r}, which cannot be read: {flawed.flaw}")
    elif kind_of(where) == "folder":
        parts = of_split([part.name for part in parts_below(where, ".tar")], split)
    entries: list[Entry] = []
    ignored = 0
    for found, others in of_each(root, partial(_list_part, root), parts):
        entries += found
        ignored += others
    classes = _classes(root if parts != [""] else root.rpartition("/")[0])
    top = max((entry.label for entry in entries), default=-1)
    if classes and top >= len(classes):
        raise UserError(f"{where}: label {top} is none of the {len(classes)} classes beside it")
    return Source("tar", root, entries, classes or [str(n) for n in range(top + 1)], ignored)


def _list_part(root: str, part: str) -> tuple[list[Entry], int]:
    """Entries of one tar, and how many of its members are neither picture nor label."""
    where = join(root, part)
    labels: dict[str, int] = {}
    pictures: list[tuple[str, Entry]] = []
    ignored = 0
    with opened(where) as file:
        for info in members(file, where):
            folder, slash, name = info.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            key, suffix = folder + slash + stem, suffix.lower()
            if suffix.rpartition(".")[2] in PICTURES:
                name = f"{part}/{info.name}" if part else info.name
                pictures.append((key, entry_of(info, name, part=part)))
            elif suffix in {"cls", "json"} and info.isreg():
                label = _label(file, info, suffix, where)
                if suffix == "cls" or label >= 0:
                    labels.setdefault(key, label)
            else:
                ignored += not info.isdir()
    return [entry._replace(label=labels.get(key, -1)) for key, entry in pictures], ignored


def _label(file: BinaryIO, info: tarfile.TarInfo, suffix: str, where: str) -> int:
    """The label a member gives, -1 if it gives none."""
    if info.size > LONGEST:
        raise UserError(
            f"{where}: {info.name!r} has {info.size} bytes, more than {LONGEST}; drop it"
        )
    file.seek(info.offset_data)
    data = file.read(info.size)
    try:
        label = json.loads(data)
        if suffix == "json" and isinstance(label, dict):
            label = next((label[name] for name in LABELS if type(label.get(name)) is int), -1)
        elif suffix == "json":
            label = -1
    except (ValueError, RecursionError):
        label = None
    if type(label) is not int or not -1 <= label < MAX_CLASSES:
        raise UserError(f"{where}: {info.name!r} gives no label: {data[:40]!r}; repair or drop it")
    return int(label)


def _classes(folder: str) -> list[str]:
    """Names of the classes, a line each, if they lie beside the tars."""
    file = next((name for name in CLASSES if name in names_in(folder)), None) if folder else None
    if file is None:
        return []
    return read_all(os.path.join(folder, file)).decode("utf-8", "replace").splitlines()
