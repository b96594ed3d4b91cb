"""How much of a detector's marks a crop keeps near its edges, in NumPy.

In: a detector, a crop's size. Out: the share, 0 to 1, by distance from the edge. Detectors leave a
margin, so density falls towards every crop's edge, wherever in the image the crop lies. A map is
free of this; it is put on when a crop is read, and taken off when a map is made from crops.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from shards.spec import Detector

Floats = NDArray[np.float64]

# Rings: (distance from the edge in px, share of the density further in). Measured as density of
# detection on a 192-px window over that of detection on a larger image at the same scale, 800
# photos (docs/decisions.md). Between the distances it is linear.
RINGS: dict[str, tuple[list[float], list[float]]] = {
    "fast": ([0, 1, 2, 3, 4, 5, 6], [0.50, 0.71, 0.79, 0.87, 0.92, 0.97, 1]),
    "orb": ([26, 27, 34, 48], [0, 0.15, 0.87, 1]),
    "sift": (
        [0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 30],
        [0.22, 0.35, 0.47, 0.59, 0.69, 0.79, 0.86, 0.93, 0.95, 0.975, 1],
    ),
}
MARGINS = {"fast": 3, "orb": 31, "sift": 3}  # px from the edge to the first keypoint
ORB_MARGIN = 31  # OpenCV's default edgeThreshold, for which the table was measured


def visible(detector: Detector, side: int, mark: str = "ring") -> Floats:
    """Share kept at each of `side` px from one edge to the other, float64 [side].

    Both directions multiply: a pixel's share is that of its row times that of its column.
    """
    if not detector.has_keypoints:
        return np.ones(side)
    pixels = np.arange(side)
    distance = np.minimum(pixels, side - 1 - pixels).astype(np.float64)
    if detector.name == "orb":  # the margin is an option of its own
        distance += ORB_MARGIN - float(detector.options["edgeThreshold"])
    if mark == "point":
        return (distance >= MARGINS[detector.name]).astype(np.float64)
    at, share = RINGS[detector.name]
    return np.interp(distance, at, share)


def visible_sums(detector: Detector, side: int, at: Floats, mark: str = "ring") -> Floats:
    """Sums of `visible` between neighbouring `at` (px), which may cut pixels."""
    margin = float(detector.options["edgeThreshold"]) if detector.name == "orb" else 0.0
    sums = np.interp(at, *_running(detector.name, margin, side, mark))
    return np.asarray(sums[1:] - sums[:-1])


@lru_cache(maxsize=1024)
def _running(name: str, margin: float, side: int, mark: str) -> tuple[Floats, Floats]:
    """Pixel edges and the sums of `visible` up to them; the same few sides come again and again."""
    sight = visible(Detector(name, {"edgeThreshold": margin}), side, mark)
    return np.arange(side + 1.0), np.concatenate([[0.0], np.cumsum(sight)])


def visible_cells(detector: Detector, side: int, cells: int, mark: str = "ring") -> Floats:
    """Mean of `visible` over each of `cells` equal parts of `side` px, float64 [cells]."""
    edges = np.arange(cells + 1) * side / cells
    return visible_sums(detector, side, edges, mark) * cells / side
