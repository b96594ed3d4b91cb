"""Density maps: the pixels of a source in, one uint8 map per detector out.

A map estimates, on a fixed grid of the unit square, the density that detection on a random crop
would give there: the mean of the marked share over detection at several scales.
"""

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess.detectors import detect
from preprocess.marks import mark
from shards import Detector


def density_maps(
    rgb: NDArray[np.uint8],
    detectors: Sequence[Detector],
    scales: Sequence[int],
    grid: int,
    kind: str,
) -> NDArray[np.uint8]:
    """Maps of `rgb` (uint8 [H, W, 3]) as uint8 [detectors, grid, grid], density = value / 255.

    At each scale the image is squeezed to that square by INTER_LINEAR without antialias, as the
    published loader does with its crops; small images are enlarged.
    """
    total = np.zeros((len(detectors), grid, grid))
    for scale in scales:
        grey = published_grey(cv2.resize(rgb, (scale, scale), interpolation=cv2.INTER_LINEAR))
        for row, detector in enumerate(detectors):
            bitmap = mark(detect(detector, grey), scale, scale, kind)
            total[row] += grid_counts(bitmap, grid) / (scale * scale)
    return np.rint(total * (255 / len(scales))).astype(np.uint8)


def published_grey(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey as the published code's detectors see it: RGB pixels weighed as if they were BGR."""
    return cv2.cvtColor(rgb, cv2.COLOR_BGR2GRAY)


def grid_counts(bitmap: NDArray[np.uint8], grid: int) -> NDArray[np.int64]:
    """Marked area of each grid cell, int64 [grid, grid], in 1 / grid**2 pixels: exact integers.

    `bitmap` is uint8 0 or 1 [S, S]; a full cell counts S**2. Cell edges that cut pixels share
    them: the integral image is linear between whole pixels, so reading it there is exact.
    """
    before, after, share = _edges(bitmap.shape[0], grid)
    integral = cv2.integral(bitmap)
    rows = integral[before] * (grid - share)[:, None] + integral[after] * share[:, None]
    corners = rows[:, before] * (grid - share) + rows[:, after] * share
    strips = corners[1:] - corners[:-1]
    return strips[:, 1:] - strips[:, :-1]


@lru_cache(maxsize=64)
def _edges(side: int, grid: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The pixel edges before and after each cell edge, and how far it lies between, in 1/grid."""
    before, share = np.divmod(np.arange(grid + 1) * side, grid)
    return before, np.minimum(before + 1, side), share
