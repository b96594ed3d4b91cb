"""What a sample costs the loader: one system call that puts its bytes in place, and one decode.

Whatever is the same for all samples of a batch is found for all of them at once, by who calls:
each Python step here holds the interpreter lock, which all threads share (docs/decisions.md).
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.dataset import Held
from shards.record import npy_header
from shards.spec import Settings

Allocate = Callable[[tuple[int, ...]], NDArray[np.uint8]]
# Place in the batch, shard, first byte of the frame in it, the frame's bytes, bytes from there to
# the arrays behind it.
Place = tuple[int, int, int, int, int]


class Layout:
    """What is read of a record, in the order of the file: its frame, then parts of its arrays.

    rows: by detector wanted, the row of its map. With `bank` the whole bank is read, and no map.
    Parts are bytes to compare, the number of bytes to leave out, or the name of what to keep.
    coded: frames stay JPEG files.
    """

    def __init__(
        self, settings: Settings, rows: Mapping[str, int], bank: bool, coded: bool = False
    ) -> None:
        self.side, self.raw, self.coded = settings.frame, settings.quality == 0, coded
        self.frame_bytes = settings.frame**2 * 3
        self.names = [*rows]
        self.map_shape = settings.maps_shape[1:]
        self.bank_shape = settings.bank_shape if bank else (0, 0)
        # What stands before arrays, and what is to be said where it does not.
        self.heads: list[tuple[bytes, str]] = []
        if self.raw:
            frame = npy_header((settings.frame, settings.frame, 3))
            self.heads.append((frame, "has a raw frame of another shape"))
        self.parts: list[bytes | int | str] = []
        if bank:
            maps = npy_header(settings.maps_shape), npy_header(settings.bank_shape)
            self.heads.append((maps[1], "has a bank that is not as the manifest says"))
            size = len(maps[0]) + int(np.prod(settings.maps_shape))
            self.parts = [size, maps[1], "bank"]
        elif rows:
            head = npy_header(settings.maps_shape)
            self.heads.append((head, "has maps that are not as the manifest says"))
            name_of = {row: name for name, row in rows.items()}
            size = int(np.prod(self.map_shape))
            self.parts = [head, *(name_of.get(row, size) for row in range(max(name_of) + 1))]


class Buffers:
    """The arrays of one batch of `size` samples, used again and again, in memory of `allocate`.

    frames: uint8 [size, F, F, 3], none where they stay files; maps: by detector, uint8
    [size, G, G / 2]; heads: what stood before arrays in the file; bank: uint8 [size, K, bytes], all
    stored crops; counts: by detector, uint8 [size, c, c], those of the slots that are shown.
    """

    def __init__(self, layout: Layout, size: int, cells: int, allocate: Allocate) -> None:
        self.layout, bank = layout, layout.bank_shape[0] > 0
        self.frames = allocate((0 if layout.coded else size, layout.side, layout.side, 3))
        self.files = np.empty(0, np.uint8)
        shape = (size, cells, cells) if bank else (size, *layout.map_shape)
        densities = {name: allocate(shape) for name in layout.names}
        self.maps, self.counts = ({}, densities) if bank else (densities, {})
        self.heads = allocate((size, sum(len(head) for head, _ in layout.heads)))
        self.bank = allocate((size, *layout.bank_shape))
        self.rows = list(self.frames)
        self.unread = memoryview(
            bytearray(max((p for p in layout.parts if isinstance(p, int)), default=0))
        )
        # Where the kernel puts a record's bytes, by place. The gap before the arrays differs.
        self.targets = [self._targets(place) for place in range(size)]
        self.behind = sum(map(len, self.targets[0][2 * layout.raw + 1 :])) if size else 0

    def _targets(self, place: int) -> list[memoryview]:
        head = iter(_cut(self.heads[place], [len(head) for head, _ in self.layout.heads]))
        found = [memoryview(b"")]
        if self.layout.raw:
            found = [next(head), self.rows[place].reshape(-1).data, *found]
        for part in self.layout.parts:
            if isinstance(part, bytes):
                found.append(next(head))
            elif isinstance(part, int):
                found.append(self.unread[:part])
            else:
                array = self.bank if part == "bank" and self.bank.size else self.maps[part]
                found.append(array[place].reshape(-1).data)
        return found

    def take_files(self, places: Sequence[Place]) -> list[NDArray[np.uint8]]:
        """Room for the JPEG files of `places`, where they will be read to."""
        total = sum(gap for *_, gap in places)
        if len(self.files) < total:
            self.files = np.empty(total + total // 4, np.uint8)
        found, at = [], 0
        for place, _, _, size, gap in places:
            self.targets[place][0] = self.files[at : at + gap].data
            found.append(self.files[at : at + size])
            at += gap
        return found

    def flaws(self, places: Sequence[int] | slice) -> dict[int, str]:
        """What is wrong with the heads of `places`, by place."""
        found: dict[int, str] = {}
        numbers = np.arange(len(self.heads))[places]
        begin = 0
        for head, problem in self.layout.heads:
            read = self.heads[places, begin : begin + len(head)]
            wrong = (read != np.frombuffer(head, np.uint8)).any(axis=1)
            found = dict.fromkeys(numbers[wrong].tolist(), problem) | found
            begin += len(head)
        return found


def _cut(row: NDArray[np.uint8], lengths: list[int]) -> Iterator[memoryview]:
    begin = 0
    for length in lengths:
        yield row[begin : begin + length].data
        begin += length


class Reader:
    """Reads records into buffers, in any thread. `open` gives a shard by its number."""

    def __init__(self, layout: Layout, open: Callable[[int], Held]) -> None:
        self.layout, self.open, self.own = layout, open, threading.local()

    def read(self, buffers: Buffers, places: Sequence[Place]) -> dict[int, str]:
        """Read and decode; returns what is wrong, by place. Heads are left to the caller."""
        problems: dict[int, str] = {}
        coded = self.layout.coded
        scratch = self._scratch(0 if coded else max(gap for *_, gap in places))
        raw, open, behind, targets = self.layout.raw, self.open, buffers.behind, buffers.targets
        at, before = 2 * raw, len(self.layout.heads[0][0]) + self.layout.frame_bytes if raw else 0
        decode, rows, preadv = simplejpeg.decode_jpeg, buffers.rows, os.preadv
        for place, shard, start, size, gap in places:
            file = open(shard)  # held here: the cache may let go of it under our read
            into = targets[place]
            if not coded:
                into[at] = scratch[: max(0, gap - before)]
            wanted = gap + behind
            count = preadv(file.descriptor, into, start)
            if count != wanted or gap < size:
                problems[place] = f"is cut short: {count} of {wanted} bytes"
            elif coded:
                if bytes(into[0][size - 2 : size]) != b"\xff\xd9":
                    problems[place] = "has a frame without an end"
            elif raw:
                if size != before:
                    problems[place] = "has a raw frame of another shape"
            else:
                out = rows[place]
                try:
                    # Measured: 1.2 times OpenCV, which cannot decode into a given buffer.
                    pixels = decode(scratch[:size], "RGB", buffer=out)
                except ValueError as error:
                    problems[place] = f"has a frame that does not decode ({error})"
                else:
                    if pixels.shape != out.shape:
                        problems[place] = f"has a frame of {pixels.shape}"
        return problems

    def _scratch(self, size: int) -> memoryview:
        """This thread's memory for a frame's file."""
        scratch: memoryview = getattr(self.own, "scratch", memoryview(b""))
        if len(scratch) < size:
            self.own.scratch = scratch = memoryview(bytearray(size + size // 4))
        return scratch
