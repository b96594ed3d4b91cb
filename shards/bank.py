"""The bank of a record: stored crops with the exact densities that the published way finds there.

In: a Bank. Out: uint8 rows, one a slot, as both containers hold them, and back. The layout is
FORMAT.md.
"""

from dataclasses import dataclass
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from shards.limits import BANK_CELL as BANK_CELL

CROP = np.dtype([("box", "<u4", 4), ("flips", "u1", 2)])  # what stands before a slot's counts


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


def row_bytes(detectors: int, cells: int) -> int:
    """Bytes of a slot's row."""
    return CROP.itemsize + detectors * cells * cells


def to_rows(bank: Bank) -> NDArray[np.uint8]:
    """`bank` as it is stored: uint8 [K, row_bytes], a CROP and the counts a slot."""
    crops = np.zeros(len(bank.boxes), CROP)
    crops["box"], crops["flips"] = bank.boxes, bank.flips
    plain = crops.view(np.uint8).reshape(len(crops), CROP.itemsize)
    return np.concatenate([plain, bank.counts.reshape(len(crops), -1)], axis=1)


def from_rows(rows: NDArray[np.uint8], detectors: int) -> Bank:
    """The bank of uint8 [n, row_bytes] rows, of one record or of a batch's chosen slots.

    Raises ValueError if they are not of that shape for any number of cells.
    """
    if rows.ndim != 2 or not len(rows) or rows.shape[1] < CROP.itemsize:
        raise ValueError(f"the bank's rows are {rows.shape}")
    cells = isqrt((rows.shape[1] - CROP.itemsize) // detectors)
    if not cells or rows.shape[1] != row_bytes(detectors, cells):
        raise ValueError(
            f"the bank's rows are {rows.shape}, of no square for {detectors} detectors"
        )
    crops = np.ascontiguousarray(rows[:, : CROP.itemsize]).view(CROP)[:, 0]
    counts = rows[:, CROP.itemsize :].reshape(len(rows), detectors, cells, cells)
    return Bank(crops["box"], crops["flips"], counts)
