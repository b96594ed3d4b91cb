"""The bank of a record: stored crops with the exact densities that the published way finds there.

In: a Bank. Out: its bytes in a WebDataset record (counts deflated) or in an FFCV one (plain), and
back, whole or one slot at a time. The layout is FORMAT.md.
"""

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BANK_CELL = 8  # px of a crop's side that one count covers; counts are 0 to 64
HEADER = np.dtype([("slots", "<u2"), ("detectors", "<u2"), ("cells", "<u2"), ("zero", "<u2")])
CROP = np.dtype([("box", "<u4", 4), ("flips", "u1", 2), ("zero", "<u2")])  # 20 bytes


@dataclass(frozen=True, slots=True)
class Bank:
    """K crops of a source. boxes: uint32 [K, 4] (top, left, height, width, source pixels); flips:
    uint8 [K, 2] (horizontal, vertical), 0 or 1; counts: uint8 [K, D, c, c], marked pixels of each
    BANK_CELL of the crop as flipped, density = count / 64.
    """

    boxes: NDArray[np.uint32]
    flips: NDArray[np.uint8]
    counts: NDArray[np.uint8]

    def equals(self, other: "Bank") -> bool:
        """Whether every number is the same."""
        return (
            np.array_equal(self.boxes, other.boxes)
            and np.array_equal(self.flips, other.flips)
            and np.array_equal(self.counts, other.counts)
        )


@lru_cache(maxsize=16)
def _row(detectors: int) -> np.dtype[np.void]:
    return np.dtype([("crop", CROP), ("sizes", "<u2", (detectors,))])


def deflated(bank: Bank) -> bytes:
    """`bank` as it follows the maps in a tar: a header, a row a slot, K x D deflate streams."""
    slots, detectors, cells, _ = bank.counts.shape
    streams = [
        [zlib.compress(counts.tobytes(), 9, -15) for counts in of_slot] for of_slot in bank.counts
    ]
    rows = np.zeros(slots, _row(detectors))
    rows["crop"] = _crops(bank)
    rows["sizes"] = [[len(stream) for stream in of_slot] for of_slot in streams]
    header = np.array((slots, detectors, cells, 0), HEADER)
    return header.tobytes() + rows.tobytes() + b"".join(s for of_slot in streams for s in of_slot)


def inflated(data: bytes) -> Bank:
    """The bank whose bytes are `data`. Raises ValueError if they are not exactly one."""
    if len(data) < HEADER.itemsize:
        raise ValueError("the bank is cut short")
    slots, detectors, cells, _ = (int(v) for v in np.frombuffer(data, HEADER, 1)[0].item())
    at = HEADER.itemsize + slots * _row(min(detectors, 255)).itemsize
    if not slots or not 0 < detectors < 256 or not 0 < cells < 1024 or len(data) < at:
        raise ValueError("the bank is cut short or of an absurd shape")
    rows = np.frombuffer(data, _row(detectors), slots, HEADER.itemsize)
    if at + int(rows["sizes"].sum()) != len(data):
        raise ValueError(f"the bank has {len(data)} bytes, its table says otherwise")
    counts = np.empty((slots, detectors, cells, cells), np.uint8)
    for place in np.ndindex(slots, detectors):
        size = int(rows["sizes"][place])
        counts[place] = _inflate(data[at : at + size], cells)
        at += size
    crops = rows["crop"]
    return Bank(crops["box"].copy(), crops["flips"].copy(), counts)


def read_slot(
    data: bytes | memoryview, begin: int, slot: int, detectors: int, wanted: list[int], cells: int
) -> tuple[NDArray[np.void], list[NDArray[np.uint8]]]:
    """Slot `slot` of the deflated bank at `begin` of `data`: its CROP, and the counts [c, c] of
    the `wanted` detectors. For the loader: no more is inflated. Raises ValueError on damage.
    """
    header = np.frombuffer(data, HEADER, 1, begin)[0]
    if header["detectors"] != detectors or header["cells"] != cells or header["slots"] <= slot:
        raise ValueError("a bank of another shape")
    rows = np.frombuffer(data, _row(detectors), int(header["slots"]), begin + HEADER.itemsize)
    ends = np.cumsum(rows["sizes"].ravel(), dtype=np.int64) + begin + HEADER.itemsize + rows.nbytes
    found = []
    for row in wanted:
        end, size = int(ends[slot * detectors + row]), int(rows["sizes"][slot, row])
        found.append(_inflate(data[end - size : end], cells))
    return rows["crop"][slot], found


def _inflate(stream: bytes | memoryview, cells: int) -> NDArray[np.uint8]:
    try:
        plain = zlib.decompressobj(-15).decompress(stream, cells * cells + 1)
    except zlib.error as error:
        raise ValueError(f"the bank does not inflate: {error}") from None
    if len(plain) != cells * cells:
        raise ValueError("the bank's counts are not of its shape")
    return np.frombuffer(plain, np.uint8).reshape(cells, cells)


def plain_rows(bank: Bank) -> NDArray[np.uint8]:
    """`bank` as FFCV holds it: uint8 [K, 20 + D * c * c], a CROP and plain counts a slot."""
    crops = _crops(bank).view(np.uint8).reshape(len(bank.boxes), CROP.itemsize)
    return np.concatenate([crops, bank.counts.reshape(len(bank.boxes), -1)], axis=1)


def of_plain_rows(rows: NDArray[np.uint8], detectors: int, cells: int) -> Bank:
    """The bank of uint8 [n, 20 + D * c * c] rows, of one record or a batch's chosen slots."""
    crops = np.ascontiguousarray(rows[:, : CROP.itemsize]).view(CROP)[:, 0]
    counts = rows[:, CROP.itemsize :].reshape(len(rows), detectors, cells, cells)
    return Bank(crops["box"], crops["flips"], counts)


def plain_row_bytes(detectors: int, cells: int) -> int:
    """Bytes of one of plain_rows' rows."""
    return CROP.itemsize + detectors * cells * cells


def _crops(bank: Bank) -> NDArray[np.void]:
    crops = np.zeros(len(bank.boxes), CROP)
    crops["box"], crops["flips"] = bank.boxes, bank.flips
    return crops
