"""Every parser of sources as a function of hostile bytes, for a coverage-guided fuzzer.

A parser returns nothing, or raises ValueError or Rejected, as it promises. The seeds of each are
small files of the layouts that people have.
"""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preprocess import Rejected, decode_image, open_source
from shards import Manifest, ShardSet

CIFAR = ("train", "test", "meta")  # the files of cifar-100-python
LISTS = (
    "train.json",
    "places365_train_standard.txt",
    "categories_places365.txt",
    "LOC_val_solution.csv",
)


def packed(parts: list[bytes]) -> bytes:
    """Parts behind their lengths, as `unpacked` reads them."""
    return b"".join(len(part).to_bytes(3, "little") + part for part in parts)


def unpacked(data: bytes, count: int) -> list[bytes]:
    """Up to `count` parts of any bytes."""
    parts: list[bytes] = []
    while data and len(parts) < count:
        size = int.from_bytes(data[:3], "little")
        parts.append(data[3 : 3 + size])
        data = data[3 + size :]
    return parts


def _read_all(where: str) -> None:
    """List a source and read every entry."""
    source = open_source(where, partial=True)
    source.description()
    for entry in source.entries:
        with suppress(Rejected):
            source.read(entry)


def _file(name: str, layout: str, folder: Path, manifest: Manifest, data: bytes) -> None:
    """A source that is one file called `name`, in a layout called `layout`."""
    path = folder / name
    path.write_bytes(data)
    _read_all(f"{layout}{path}")


def image(folder: Path, manifest: Manifest, data: bytes) -> None:
    """A source image."""
    decode_image(data)


def cifar(folder: Path, manifest: Manifest, data: bytes) -> None:
    """The pickles of CIFAR-100."""
    place = folder / "cifar-100-python"
    place.mkdir(exist_ok=True)
    for name, part in zip(CIFAR, [*unpacked(data, 3), b"", b"", b""], strict=False):
        (place / name).write_bytes(part)
    _read_all(f"cifar100:{place}")


def lists(folder: Path, manifest: Manifest, data: bytes) -> None:
    """The lists of files and labels that come with iNaturalist, Places365 and Kaggle's ImageNet."""
    for name, part in zip(LISTS, [*unpacked(data, 4), *[b""] * 4], strict=False):
        (folder / name).write_bytes(part)
    for below, name in (("data_256/a", "1.jpg"), ("val", "ILSVRC2012_val_1.JPEG")):
        (folder / below).mkdir(parents=True, exist_ok=True)
        (folder / below / name).touch()
    for where in (f"inaturalist:{folder}/train.json", f"places365:{folder}"):
        with suppress(ValueError):
            _read_all(where)
    with suppress(ValueError):
        open_source(f"imagenet:{folder}", "val", partial=True)


TARGETS: dict[str, Callable[[Path, Manifest, bytes], None]] = {
    "image": image,
    "archive": partial(_file, "source.tar", ""),
    "tar of tars": partial(_file, "train.tar", "imagenet:"),
    "foreign shard": partial(_file, "foreign.tar", "webdataset:"),
    "parquet": partial(_file, "rows.parquet", "parquet:"),
    "cifar": cifar,
    "lists": lists,
}


def seeds(name: str, built: Path, scratch: Path) -> list[bytes]:
    """Files of a layout, of the frames of the set `built`."""
    records = ShardSet(built)
    shard = (built / records.shards[0].name).read_bytes()
    frames = [records[number].frame for number in range(2)]
    if name == "image":
        return frames
    if name == "archive":
        return [shard, (built.parent / "source.tar").read_bytes()]
    if name == "foreign shard":
        foreign = {
            "a/0.jpg": frames[0],
            "a/0.cls": b"1",
            "b/1.jpg": frames[1],
            "b/1.json": b'{"label": 0}',
            "b/1.txt": b"a cat",
        }
        return [shard, tar_of(foreign)]
    if name == "tar of tars":
        inner = {f"n0144000{n}.tar": tar_of({f"{n}.JPEG": frames[n]}) for n in range(2)}
        return [tar_of(inner)]
    if name == "parquet":
        return [parquet_of(frames), parquet_of([frames[0][:9]])]
    if name == "cifar":
        rows = np.zeros((2, 3072), np.uint8)
        batch = {b"data": rows, b"fine_labels": [0, 99], b"filenames": [b"a.png", b"b.png"]}
        meta = {"fine_label_names": [f"class {n}" for n in range(100)]}
        return [
            packed([pickle.dumps(p, version) for p in (batch, batch, meta)]) for version in (2, 4)
        ]
    species = {
        "images": [{"id": 1, "file_name": "data_256/a/1.jpg"}],
        "annotations": [{"image_id": 1, "category_id": 3}],
        "categories": [{"id": 3, "supercategory": "x", "name": "a"}],
    }
    answers = b"ImageId,PredictionString\nILSVRC2012_val_1,n01440764 1 2 3 4\n"
    return [packed([json.dumps(species).encode(), b"/a/1.jpg 0\n", b"/a 0\n", answers])]


def tar_of(members: dict[str, bytes]) -> bytes:
    """A tar of files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def parquet_of(frames: list[bytes], paths: list[str] | None = None) -> bytes:
    """A Parquet file as the hub keeps images: structs of bytes and path, and labels."""
    import pyarrow
    from pyarrow import parquet

    names = paths or ["x.jpg"] * len(frames)
    rows: list[Any] = [
        {"bytes": data or None, "path": path} for data, path in zip(frames, names, strict=True)
    ]
    table = pyarrow.table({"image": rows, "label": list(range(len(frames)))})
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    return stream.getvalue()
