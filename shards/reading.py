"""What a sample costs the loader: one system call that puts its bytes in place, and one decode.

What is the same for all samples of a batch is found for all of them at once, by the caller. Each
Python step here holds the interpreter lock, which all threads share (docs/decisions.md).
"""

import json
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from json.scanner import make_scanner
from tarfile import BLOCKSIZE

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.crops import Ints
from shards.dataset import Held
from shards.record import Array, npy_header
from shards.spec import Settings
from shards.turbojpeg import compiled as compiled_decoder
from shards.vectored import compiled, vector

Allocate = Callable[[tuple[int, ...]], NDArray[np.uint8]]
CROPS = ("bank.boxes", "bank.flips")  # arrays of FFCV
READ_JSON = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]  # stops before the padding
NO_CROP = (
    *(ValueError, LookupError, TypeError, OverflowError, StopIteration, RecursionError),
    struct.error,
)
CROP = struct.Struct("6i")


class Layout:
    """What is read of a record, in the order of the file: its frame, then parts of its arrays.

    wanted: by detector, its density, or with `bank` its counts of all stored crops, and where that
    begins behind the first byte of the arrays. The bank's boxes are read from the metadata between
    frame and arrays of a tar; of FFCV they are arrays, and are `wanted` too. Parts are bytes to
    compare, the number of bytes to leave out, or the name of what to keep. coded: frames stay JPEG
    files.
    """

    def __init__(
        self,
        settings: Settings,
        wanted: Mapping[str, tuple[Array, int]],
        bank: bool,
        coded: bool = False,
        tar: bool = True,
    ) -> None:
        self.side, self.raw, self.coded = settings.frame, settings.quality == 0, coded
        self.frame_bytes = settings.frame**2 * 3
        self.arrays = {name: array for name, (array, _) in wanted.items()}
        self.bank, self.tar = bank, tar
        self.slots = settings.bank if bank else 0
        # Whether nothing of a record is parsed, or goes to memory that differs from batch to batch.
        self.fixed = not coded and not (bank and tar)
        # What stands before arrays, and what is said if it does not.
        self.heads: list[tuple[bytes, str]] = []
        if self.raw:
            frame = npy_header((settings.frame, settings.frame, 3)) if tar else b""
            self.heads.append((frame, "has a raw frame of another shape"))
        self.parts: list[bytes | int | str] = []
        end = 0
        for name, (array, at) in sorted(wanted.items(), key=lambda item: item[1][1]):
            head = array.header if tar else b""
            self.heads.append((head, f"has an array {array.name} that is not as the manifest says"))
            self.parts += [at - len(head) - end, head, name]
            end = at + array.bytes


class Buffers:
    """The arrays of one batch of `size` samples, used again and again, in memory of `allocate`.

    frames: uint8 [size, F, F, 3], none where they stay files; maps: by detector, uint8
    [size, G, G]; heads: what stood before arrays in the file. Of a bank: slots, uint8 [size], those
    that are shown; crops: float64 [size, 6], their box in source pixels and flips; stored: by
    detector, uint8 [size, K, c, c], the counts of all; counts: uint8 [size, c, c], of those shown.
    `batch`: the buffers of another set, of the same batch; what is not of one layout is theirs.
    """

    def __init__(
        self, layout: Layout, size: int, allocate: Allocate, batch: "Buffers | None" = None
    ) -> None:
        self.layout, bank = layout, layout.bank
        self.files = np.empty(0, np.uint8)
        if batch is None:
            self.frames = allocate((0 if layout.coded else size, layout.side, layout.side, 3))
            shown = {
                name: allocate((size, *array.shape[-2:]))
                for name, array in layout.arrays.items()
                if name not in CROPS
            }
            self.maps, self.counts = ({}, shown) if bank else (shown, {})
            self.slots = allocate((size if bank else 0,))
            self.crops = allocate((size if bank else 0, 6 * 8)).view(np.float64)
        else:
            self.frames, self.maps, self.counts = batch.frames, batch.maps, batch.counts
            self.slots, self.crops = batch.slots, batch.crops
        self.stored = {
            name: allocate((size, array.bytes)).view(array.dtype).reshape(size, *array.shape)
            for name, array in layout.arrays.items()
            if bank
        }
        self.heads = allocate((size, sum(len(head) for head, _ in layout.heads)))
        self.rows = list(self.frames)
        self.unread = memoryview(
            bytearray(max((p for p in layout.parts if isinstance(p, int)), default=0))
        )
        # Where the kernel puts a record's bytes, by place. The gap before the arrays differs.
        self.targets = [self._targets(place) for place in range(size)]
        at_once = self.targets if layout.fixed else []
        self.vectors = np.array([[vector(part) for part in parts] for parts in at_once])
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
                array = (self.stored or self.maps)[part]
                found.append(array[place].reshape(-1).view(np.uint8).data)
        return found

    def take_files(self, places: Ints) -> list[NDArray[np.uint8]]:
        """Room for the JPEG files of `places`, into which they will be read."""
        total = int(places[:, 4].sum())
        if len(self.files) < total:
            self.files = np.empty(total + total // 4, np.uint8)
        found, at = [], 0
        for place, _, _, size, gap in places.tolist():
            self.targets[place][0] = self.files[at : at + gap].data
            found.append(self.files[at : at + size])
            at += gap
        return found

    def choose(self, places: Ints) -> None:
        """Of the stored crops of `places`, take those that are shown: counts, and in FFCV boxes."""
        slots = self.slots[places]
        for name, counts in self.counts.items():
            counts[places] = self.stored[name][places, slots]
        if not self.layout.tar:
            shown = [self.stored[name][places, slots] for name in CROPS]
            self.crops[places] = np.concatenate(shown, axis=1)

    def flaws(self, places: Sequence[int] | Ints) -> dict[int, str]:
        """What is wrong with the heads of `places`, by place."""
        found: dict[int, str] = {}
        numbers = np.asarray(places)
        begin = 0
        for head, problem in self.layout.heads:
            read = self.heads[places, begin : begin + len(head)]
            wrong = (read != np.frombuffer(head, np.uint8)).any(axis=1)
            found = dict.fromkeys(numbers[wrong].tolist(), problem) | found
            begin += len(head)
        return found


def buffers_of(layouts: Sequence[Layout], size: int, allocate: Allocate) -> list[Buffers]:
    """Buffers of one batch for each set; the batch's own arrays are the first one's."""
    first = Buffers(layouts[0], size, allocate)
    return [first, *(Buffers(each, size, allocate, first) for each in layouts[1:])]


def finder(slot: int) -> Callable[[memoryview], re.Match[bytes] | None]:
    """What finds crop `slot`, four numbers of its box and two of its flips, in metadata as we
    write it. Measured: half of the time that reading the JSON takes.
    """
    box = rb"(\d{1,9},\d{1,9},\d{1,9},\d{1,9})"
    boxes = rb'\{"boxes":\[(?:\[[\d,]+\],){%d}\[%b\]' % (slot, box)
    flips = rb'[^"]*,"flips":\[(?:\[[01],[01]\],){%d}\[([01],[01])\]' % slot
    return re.compile(boxes + flips).match


def crop_of(text: memoryview, slot: int) -> bytes:
    """The six numbers of a crop, from metadata of any writer. Raises one of NO_CROP if there are
    none.
    """
    meta, _ = READ_JSON(str(text, "ascii"), 0)
    crop = CROP.pack(*meta["boxes"][slot], *meta["flips"][slot])
    return b"%d,%d,%d,%d,%d,%d" % CROP.unpack(crop)


def _cut(row: NDArray[np.uint8], lengths: list[int]) -> Iterator[memoryview]:
    begin = 0
    for length in lengths:
        yield row[begin : begin + length].data
        begin += length


class Reader:
    """Reads records into buffers, in any thread. `open` gives a shard by its number. `at_once`: a
    chunk's by one compiled call, if what that needs is installed.
    """

    def __init__(self, layout: Layout, open: Callable[[int], Held], at_once: bool = False) -> None:
        self.layout, self.open, self.own = layout, open, threading.local()
        self.finders = [finder(slot) for slot in range(layout.slots)]
        fits = at_once and layout.fixed
        self.read_raw = compiled() if fits and layout.raw else None
        self.read_jpeg = compiled_decoder() if fits and not layout.raw else None
        self.at_once = bool(self.read_raw or self.read_jpeg)

    def read(self, buffers: Buffers, places: Ints) -> dict[int, str]:
        """Read and decode; returns what is wrong, by place. Heads are left to the caller.

        places: int64 [n, 5], of each its place in the batch, shard, first byte of the frame in it,
        the frame's bytes, and the bytes from there to the arrays behind it.
        """
        problems: dict[int, str] = {}
        coded, raw, open = self.layout.coded, self.layout.raw, self.open
        behind, targets = buffers.behind, buffers.targets
        at, before = 2 * raw, len(self.layout.heads[0][0]) + self.layout.frame_bytes if raw else 0
        scratch = self._scratch(0 if coded else int(places[:, 4].max()) - before)
        if self.at_once:  # what is left is read again below, which tells what is wrong
            places = self._read_at_once(buffers, places, scratch, before)
        decode, rows, preadv = simplejpeg.decode_jpeg, buffers.rows, os.preadv
        bank, tar, finders = self.layout.bank, self.layout.tar, self.finders
        slots, shown = buffers.slots, dict[int, bytes]()
        for place, shard, start, size, gap in places.tolist():
            file = open(shard)  # held here: the cache may let go of it under our read
            into = targets[place]
            if not coded:
                into[at] = scratch[: max(0, gap - before)]
            wanted = gap + behind
            count = preadv(file.descriptor, into, start)
            if count != wanted or gap < size:
                problems[place] = f"is cut short: {count} of {wanted} bytes"
                continue
            if bank and tar:
                text, slot = into[at][size + -size % BLOCKSIZE + BLOCKSIZE - before :], slots[place]
                try:
                    match = finders[slot](text)
                    shown[place] = match[1] + b"," + match[2] if match else crop_of(text, slot)
                except NO_CROP:
                    problems[place] = "has a bank that is not as the manifest says"
                    continue
            if coded:
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
        if shown:
            numbers = [*map(int, b",".join(shown.values()).split(b","))]
            buffers.crops[list(shown)] = np.reshape(numbers, (-1, 6))
        return problems

    def _read_at_once(
        self, buffers: Buffers, places: Ints, scratch: memoryview, before: int
    ) -> Ints:
        """Read frames and arrays by one call. Returns those of `places` that were not read as they
        should be. scratch: room for JPEG files, and for what lies before the arrays.
        """
        at, shards, starts, sizes, gaps = places.T
        held = [self.open(shard) for shard in shards.tolist()]  # as in `read`
        files, counts = np.array([each.descriptor for each in held]), np.empty_like(starts)
        vectors, wanted = buffers.vectors[at], gaps + buffers.behind
        vectors[:, 2 * self.layout.raw, 0] = vector(scratch)[0]
        vectors[:, 2 * self.layout.raw, 1] = np.maximum(gaps - before, 0)
        wrong = gaps < sizes
        if self.read_raw:
            self.read_raw(files, starts, vectors, counts)
            wrong |= sizes != before
        elif self.read_jpeg:
            frames, side = buffers.frames, self.layout.side
            pixels = frames.ctypes.data + at * frames.strides[0]
            self.read_jpeg(side, files, starts, vectors, counts, sizes, wanted, pixels)
        wrong |= counts != wanted
        return places[wrong]

    def _scratch(self, size: int) -> memoryview:
        """This thread's memory for what is not kept: a JPEG file, metadata."""
        scratch: memoryview = getattr(self.own, "scratch", memoryview(bytearray()))
        if len(scratch) < size:
            self.own.scratch = scratch = memoryview(bytearray(size + size // 4))
        return scratch
