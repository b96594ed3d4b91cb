"""CIFAR-10 and CIFAR-100 as published: the python and the binary archive, packed or extracted.

An image is a row of a batch, which is read once and kept; its pixels come back as a PPM picture.
"""

import gzip
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from preprocess.decode import Rejected
from preprocess.files import join, kind_of, opened, read_all, version_of
from preprocess.layouts.pickles import load_dictionary
from preprocess.source import Entry, Source, names_in
from shards.errors import UserError

PIXELS = 3 * 32 * 32
LARGEST = 1 << 29  # bytes of a batch; the largest published one has 154 MB
PIECE = 1 << 20


class Archive(NamedTuple):
    """What the files of one archive are called, and what they call things."""

    stem: str  # of the archive's name
    folder: str  # that it unpacks to
    batches: dict[str, list[str]]
    names: str  # the file of class names
    classes: int
    labels: str = "labels"
    key: str = "label_names"
    skip: int = 0  # binary: bytes before the label


FIVE = [f"data_batch_{number}" for number in range(1, 6)]
PYTHON10 = {"train": FIVE, "test": ["test_batch"]}
BINARY10 = {"train": [f"{name}.bin" for name in FIVE], "test": ["test_batch.bin"]}
PYTHON100 = {"train": ["train"], "test": ["test"]}
BINARY100 = {"train": ["train.bin"], "test": ["test.bin"]}
CIFAR10 = (
    Archive("cifar-10-python", "cifar-10-batches-py", PYTHON10, "batches.meta", 10),
    Archive("cifar-10-binary", "cifar-10-batches-bin", BINARY10, "batches.meta.txt", 10),
)
FINE = "fine_label_names"
CIFAR100 = (
    Archive("cifar-100-python", "cifar-100-python", PYTHON100, "meta", 100, "fine_labels", FINE),
    Archive("cifar-100-binary", "cifar-100-binary", BINARY100, f"{FINE}.txt", 100, skip=1),
)

_NAMES10 = "airplane automobile bird cat deer dog frog horse ship truck"
_NAMES100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """
NAMES10, NAMES100 = tuple(_NAMES10.split()), tuple(_NAMES100.split())


def places_of(archives: tuple[Archive, ...], split: str) -> tuple[str, ...]:
    """Where a split lies below the folder of the dataset."""
    packed = [f"{archive.stem}.tar.gz" for archive in archives]
    return *(archive.folder for archive in archives), *packed, f"{split}.tar", split, ""


def list_cifar(archives: tuple[Archive, ...], where: str, split: str) -> Source | None:
    """A split, with fine labels, from any of its layouts; None if `where` is none of them.

    Raises UserError at a missing batch, a pickle of something else or a label out of range.
    """
    packed = where.endswith((".tar.gz", ".tgz"))
    if kind_of(where) == "file" and not packed:
        return None
    members = _names_in_archive(where) if packed else {name: name for name in names_in(where)}
    for archive in archives:
        batches = archive.batches[split]
        if not packed and archive.folder != os.path.basename(where.rstrip("/")):
            # A folder of another name needs all of them: class folders may be called train, test.
            if not {*batches, archive.names} <= members.keys():
                continue
        elif batches[0] not in members and archive.names not in members:
            continue
        entries: list[Entry] = []
        for batch in batches:
            if batch not in members:
                raise UserError(f"{where} lacks {batch}; take the complete archive")
            entries += _entries(where, members[batch], archive)
        return Source("cifar", where, entries, _classes(where, members, archive))
    return None


class Unpacked(gzip.GzipFile):
    """Reads at most PIECE bytes at once: tarfile takes a header of any size into memory."""

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes. Raises tarfile.ReadError if they are too many."""
        if size is None or not 0 <= size <= PIECE:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


@contextmanager
def _archive(where: str) -> Iterator[tarfile.TarFile]:
    try:
        with (
            opened(where) as file,
            Unpacked(fileobj=file) as unpacked,
            tarfile.open(fileobj=unpacked, mode="r:") as archive,
        ):
            yield archive
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{where} is not a whole .tar.gz ({error}); fetch it again") from None


def _names_in_archive(where: str) -> dict[str, str]:
    with _archive(where) as archive:
        names = {os.path.basename(info.name): info.name for info in archive if info.isreg()}
        while archive.fileobj and archive.fileobj.read(PIECE):
            pass  # to the end, where gzip's checksum of all is
        return names


def _entries(where: str, part: str, archive: Archive) -> list[Entry]:
    table = _batch(where, part)
    labels = table.get(archive.labels, [])
    if "rows" in table:
        labels = table["rows"][:, archive.skip].tolist()
    rows = _pixels(where, part)
    names = table.get("filenames") or [f"{row:05d}" for row in range(len(rows))]
    lists = isinstance(labels, list) and isinstance(names, list)
    if not lists or not len(labels) == len(names) == len(rows):
        raise UserError(f"{part} in {where} has not one label and name for each of {len(rows)}")
    count = archive.classes
    strange = next((n for n in labels if type(n) is not int or n not in range(count)), None)
    if strange is not None:
        raise UserError(f"{part} in {where} has the label {strange!r}; there are 0 to {count - 1}")
    stem, sums = (
        os.path.basename(part).partition(".")[0],
        map(zlib.crc32, np.ascontiguousarray(rows)),
    )
    return [
        Entry(f"{stem}/{name}", label, PIXELS, row, stamp, part=part)
        for row, (name, label, stamp) in enumerate(zip(names, labels, sums, strict=True))
    ]


def _classes(where: str, members: dict[str, str], archive: Archive) -> list[str]:
    part, count = members.get(archive.names), archive.classes
    if part is None:
        return [str(label) for label in range(count)]
    data = _bytes_of(where, part)
    if part.endswith(".txt"):
        names = data.decode("utf-8", "replace").split()
    else:
        names = load_dictionary(data, f"{part} in {where}").get(archive.key, [])
    if len(names) != count:
        raise UserError(f"{part} in {where} names {len(names)} classes; there are {count}")
    return [str(name) for name in names]


def image(root: str, entry: Entry) -> bytes:
    """The image as a PPM picture, 32 x 32 px."""
    row = entry.offset
    try:
        rows = _pixels(root, entry.part)
    except FileNotFoundError:
        raise Rejected("vanished", "its batch was listed and is gone") from None
    except ValueError as error:
        raise Rejected("changed", str(error)) from None
    if row >= len(rows):
        raise Rejected("changed", f"listed as row {row}, its batch has {len(rows)}")
    pixels = rows[row].reshape(3, 32, 32).transpose(1, 2, 0)
    return b"P6\n32 32\n255\n" + pixels.tobytes()


def _batch(root: str, part: str) -> dict[str, Any]:
    packed = root.endswith((".tar.gz", ".tgz"))
    return _kept_batch(root, part, version_of(root if packed else join(root, part)))


@lru_cache(maxsize=2)  # the largest published one has 154 MB
def _kept_batch(root: str, part: str, version: tuple[int, ...]) -> dict[str, Any]:
    data = _bytes_of(root, part)
    if not part.endswith(".bin"):
        table = load_dictionary(data, f"{part} in {root}")
        if "data" not in table:
            raise UserError(f"{part} in {root} holds no data; take the published archive")
        return table
    before = 2 if os.path.basename(part) in {"train.bin", "test.bin"} else 1
    if len(data) % (before + PIXELS):
        raise UserError(f"{part} in {root} is cut short: {len(data)} bytes; fetch it again")
    return {"rows": np.frombuffer(data, np.uint8).reshape(-1, before + PIXELS)}


def _pixels(root: str, part: str) -> NDArray[np.uint8]:
    """uint8 [N, 3072]: red, green and blue planes of each image."""
    table = _batch(root, part)
    rows = table["data"] if "data" in table else table["rows"][:, -PIXELS:]
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != PIXELS:
        raise UserError(f"{part} in {root} does not hold rows of {PIXELS} bytes")
    return rows


def _bytes_of(root: str, part: str) -> bytes:
    if not root.endswith((".tar.gz", ".tgz")):
        return read_all(join(root, part))
    with _archive(root) as archive:
        for info in archive:
            stream = archive.extractfile(info) if info.name == part and info.isreg() else None
            if stream and info.size <= LARGEST:
                return b"".join(iter(partial(stream.read, PIECE), b""))
    raise UserError(f"{root} lacks {part}; take the complete archive")
