"""WebDataset shards: records into a tar with an index, and back by offset.

A tar depends on nothing but its records: no times, owners or hosts. One index row per record, so
that any record is read without scanning.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.files import replacing
from shards.record import (
    JPEG,
    KEY_DIGITS,
    META,
    RAW,
    Array,
    Record,
    arrays_of,
    from_members,
    members,
)
from shards.spec import File, Settings

INDEX_DTYPE = np.dtype(
    [
        ("key", "<u8"),  # number of the input the record was made from
        ("start", "<u8"),  # first byte of the record's first header in its tar
        ("frame", "<u8"),  # first byte of the encoded frame
        ("arrays", "<u8"),  # first byte of what follows frame and metadata: the arrays
        ("frame_bytes", "<u4"),
        ("bytes", "<u4"),  # of the whole record: headers, members, padding
        ("height", "<u4"),  # of the source, px
        ("width", "<u4"),
        ("label", "<i4"),
    ]
)


def places_of(settings: Settings) -> tuple[list[tuple[Array, int]], int]:
    """Each array of a record with the first byte of its data, from where the record's arrays begin;
    and how many bytes of the tar they take.
    """
    places, at = [], 0
    for array in arrays_of(settings):
        begin = at + tarfile.BLOCKSIZE + len(array.header)
        places.append((array, begin))
        at = padded(begin + array.bytes)
    return places, at


def padded(size: int) -> int:
    """`size` bytes as whole blocks of a tar."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def shard_name(number: int, settings: Settings | None = None) -> str:
    """The file name of shard `number`, which is no tar if `settings` have no frames."""
    bare = settings is not None and settings.frame == 0
    return f"shard-{number:06d}.{'npy' if bare else 'tar'}"


class _Hashed:
    """Passes bytes on to `file`, hashes and counts them on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.position = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.position += len(data)


class ShardWriter:
    """Writes one shard; it appears under its name, whole and on disk, when the block ends.

    If the block raises, nothing appears. After the block, `file` describes the shard and `index` is
    its INDEX_DTYPE array.
    """

    file: File
    index: NDArray[np.void]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[int, ...]] = []

    def __enter__(self) -> "ShardWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path))
            self.stream = _Hashed(stack.enter_context(temporary.open("wb")))
            self.opened = stack.pop_all()
        return self

    def add(self, record: Record) -> None:
        """Append `record`; memory use stays at one record."""
        start, at = self.stream.position, {}
        for suffix, data in members(record):
            self.stream.write(_header(f"{record.key}.{suffix}", len(data)))
            at[suffix] = (self.stream.position, len(data))
            self.stream.write(data)
            self.stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        (frame, frame_bytes), meta = at.get(JPEG) or at[RAW], at[META]
        places = (int(record.key), start, frame, padded(sum(meta)), frame_bytes)
        source = (record.height, record.width, record.label)
        self.rows.append((*places, self.stream.position - start, *source))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.opened.__exit__(kind, error, traceback)
            return
        with self.opened:
            end = self.stream.position + 2 * tarfile.BLOCKSIZE
            self.stream.write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
            digest = self.stream.sha256.hexdigest()
            self.index = np.array(self.rows, INDEX_DTYPE)
            self.file = File(self.path.name, len(self.rows), self.stream.position, digest)


def _header(name: str, size: int) -> bytes:
    """The USTAR header of a plain file without time or owner, as tarfile makes it in four times
    the time (tested); `name` is ASCII of at most 100 bytes.
    """
    block = bytearray(_EMPTY)
    block[: len(name)] = name.encode("ascii")
    block[124:135] = b"%011o" % size
    block[148:155] = b"%06o\0" % sum(block)  # while its own field is blank
    return bytes(block)


def _empty() -> bytes:
    """A header without name, size and checksum, whose field is blank."""
    info = tarfile.TarInfo("x")
    info.mode = 0o644
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[0], block[148:156] = 0, b" " * 8
    return bytes(block)


_EMPTY = _empty()


def parse_record(data: bytes) -> Record:
    """The record whose tar headers and members are `data`, as one slice of a shard.

    Raises UserError as members_in does, and if its members are not those of a record.
    """
    return from_members(*members_in(data))


def members_in(data: bytes) -> tuple[str, dict[str, bytes]]:
    """(key, members by suffix) of a slice of a shard.

    Raises UserError if the slice is not exactly one whole record: a member that is no regular
    file, a foreign or repeated name, a wrong header checksum, or bytes missing.
    """
    parts: dict[str, bytes] = {}
    keys = set()
    at = 0
    while at < len(data):
        try:
            info = tarfile.TarInfo.frombuf(
                data[at : at + tarfile.BLOCKSIZE], "ascii", "surrogateescape"
            )
        except tarfile.TarError as error:
            raise UserError(f"no tar header at byte {at} of the record: {error}") from None
        begin = at + tarfile.BLOCKSIZE
        key, _, suffix = info.name.partition(".")
        if not info.isreg() or not (key.isdecimal() and len(key) >= KEY_DIGITS) or suffix in parts:
            raise UserError(f"member {info.name!r} does not belong into a record")
        if info.size < 0 or begin + info.size > len(data):
            raise UserError(f"member {info.name!r} reaches past the end of its record")
        keys.add(key)
        parts[suffix] = data[begin : begin + info.size]
        at = padded(begin + info.size)
    if len(keys) != 1 or at != len(data):
        raise UserError(f"the slice holds parts of the records {sorted(keys)}, not one whole one")
    return keys.pop(), parts


def index_of(path: Path, settings: Settings) -> NDArray[np.void]:
    """The index of the whole shard at `path`, of a set with `settings`, as its writer had it."""
    rows, block, of_a_record = [], tarfile.BLOCKSIZE, 3 + len(arrays_of(settings))
    with path.open("rb") as file:
        for frame, meta, *_, label in zip(*[headers(path)] * of_a_record, strict=True):
            small = []
            for _, at, size in (label, meta):
                file.seek(at + block)
                small.append(file.read(size))
            facts, end = json.loads(small[1]), padded(label[1] + block + label[2])
            places = (int(frame[0].partition(".")[0]), frame[1], frame[1] + block)
            arrays = padded(meta[1] + block + meta[2])
            source = (facts["height"], facts["width"], int(small[0]))
            rows.append((*places, arrays, frame[2], end - frame[1], *source))
    return np.array(rows, INDEX_DTYPE)


def headers(path: Path) -> Iterator[tuple[str, int, int]]:
    """(member name, first byte of its header, size of its data) through a shard, by seeking.

    Raises UserError, naming the place, where the tar is damaged or cut short.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        at = 0
        while True:
            file.seek(at)
            header = file.read(tarfile.BLOCKSIZE)
            if header == bytes(tarfile.BLOCKSIZE):
                break
            try:
                info = tarfile.TarInfo.frombuf(header, "ascii", "surrogateescape")
            except tarfile.TarError as error:
                raise UserError(f"{path}: no tar header at byte {at}: {error}") from None
            yield info.name, at, info.size
            at = padded(at + tarfile.BLOCKSIZE + info.size)
            if info.size < 0 or at > size:
                raise UserError(f"{path}: member {info.name!r} reaches past the end of the file")
        rest = file.read()
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise UserError(f"{path}: byte {at} is not the end of a whole tar")
