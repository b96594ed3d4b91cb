"""Crops in NumPy: their boxes, what a detector finds near their edges, densities read off maps.

A detector finds less near the edge of what it is shown, so density falls towards the edge of every
crop, wherever in the image the crop lies. A map is free of that: the edge rule is taken off when a
map is made from views, and put on again when a crop is read (docs/decisions.md).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.rng import uniform
from shards.spec import AREA, Detector, Edge, Plugin, Settings

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
EdgeKey = tuple[tuple[float, ...], tuple[float, ...]]

TRIES = 10  # torchvision's RandomResizedCrop
# The published crop, beside AREA: ratio in source pixels, probability of either flip.
RATIO, FLIPS = (3 / 4, 4 / 3), (0.5, 0.5)

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


def crop_boxes(
    purpose: int,
    seed: int,
    epochs: Ints,
    samples: Ints,
    heights: Ints,
    widths: Ints,
    area: tuple[float, float] = AREA,
    ratio: tuple[float, float] = RATIO,
    flips: tuple[float, float] = FLIPS,
) -> tuple[Ints, NDArray[np.bool_]]:
    """Crop boxes and flips of `samples` whose sources measure `heights` x `widths` px.

    Returns int64 [n, 4] (top, left, height, width in source pixels) and bool [n, 2] (horizontal,
    vertical, with the probabilities `flips`). The rule is torchvision's
    RandomResizedCrop.get_params: up to ten draws of `area` and log-uniform `ratio` in whole source
    pixels, else its centred fallback. `purpose` keeps training, bank and maps apart.
    """
    draws = np.arange(2 * TRIES + 4)[:, None]
    u = uniform(purpose, seed, epochs[None], samples[None], draws)
    areas = (area[0] + (area[1] - area[0]) * u[:TRIES]) * heights * widths
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * u[TRIES : 2 * TRIES])
    tall = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
    wide = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
    fits = (wide > 0) & (wide <= widths) & (tall > 0) & (tall <= heights)
    first = fits.argmax(axis=0)[None]
    tall, wide = (np.take_along_axis(x, first, axis=0)[0] for x in (tall, wide))
    centred_tall = np.clip(np.rint(widths / ratio[0]), 1, heights).astype(np.int64)
    centred_wide = np.clip(np.rint(heights * ratio[1]), 1, widths).astype(np.int64)
    found = fits.any(axis=0)
    tall, wide = np.where(found, tall, centred_tall), np.where(found, wide, centred_wide)
    top = np.floor(u[-4] * (heights - tall + 1)).astype(np.int64)
    left = np.floor(u[-3] * (widths - wide + 1)).astype(np.int64)
    top = np.where(found, top, (heights - tall) // 2)
    left = np.where(found, left, (widths - wide) // 2)
    turned = np.stack([u[-2] < flips[0], u[-1] < flips[1]], axis=1)
    return np.stack([top, left, tall, wide], axis=1), turned


def unit_boxes(boxes: Ints, heights: Ints, widths: Ints) -> NDArray[np.float32]:
    """`boxes` of source pixels, int64 [n, 4], in the unit square: float32 [n, 4]."""
    return (boxes / np.stack([heights, widths, heights, widths], axis=1)).astype(np.float32)


def visible(detector: Detector, side: int, mark: str = "ring") -> Floats:
    """Share kept at each of `side` px from one edge to the other, float64 [side].

    Both directions multiply: a pixel's share is that of its row times that of its column.
    """
    pixels = np.arange(side)
    distance = np.minimum(pixels, side - 1 - pixels).astype(np.float64)
    if detector.edge:
        return np.interp(distance, detector.edge.at, detector.edge.share)
    if detector.plugin or detector.name not in RINGS:  # not measured, or knows no edge
        return np.ones(side)
    if detector.name == "orb":  # the margin is an option of its own
        distance += ORB_MARGIN - float(detector.options["edgeThreshold"])
    if mark == "point":
        return (distance >= MARGINS[detector.name]).astype(np.float64)
    at, share = RINGS[detector.name]
    return np.interp(distance, at, share)


def visible_sums(detector: Detector, side: int, at: Floats, mark: str = "ring") -> Floats:
    """Sums of `visible` between neighbouring `at` (px), which may cut pixels."""
    margin = float(detector.options["edgeThreshold"]) if detector.name == "orb" else 0.0
    edge = detector.edge and (tuple(detector.edge.at), tuple(detector.edge.share))
    sums = np.interp(at, *_running(detector.name, margin, side, mark, edge, not detector.plugin))
    return np.asarray(sums[1:] - sums[:-1])


@lru_cache(maxsize=1024)
def _running(
    name: str, margin: float, side: int, mark: str, edge: EdgeKey | None, ours: bool
) -> tuple[Floats, Floats]:
    """Pixel edges and the sums of `visible` up to them; the same few sides come again and again."""
    rule = edge and Edge([*edge[0]], [*edge[1]], mark, 0)
    plugin = None if ours else Plugin("", "", "")
    sight = visible(Detector(name, {"edgeThreshold": margin}, plugin, rule), side, mark)
    return np.arange(side + 1.0), np.concatenate([[0.0], np.cumsum(sight)])


def visible_cells(detector: Detector, side: int, cells: int, mark: str = "ring") -> Floats:
    """Mean of `visible` over each of `cells` equal parts of `side` px, float64 [cells]."""
    edges = np.arange(cells + 1) * side / cells
    return visible_sums(detector, side, edges, mark) * cells / side


def read_map(
    density: NDArray[np.uint8],
    box: tuple[float, float, float, float],
    cells: int,
    visible: NDArray[np.float64] | float = 1.0,
) -> NDArray[np.float64]:
    """Mean density of each of `cells` x `cells` parts of a box, float64 [cells, cells], 0 to 1.

    `density` is uint8 [G, G] over the unit square; `box` is (top, left, height, width) in it;
    `visible` is float64 [cells], as visible_cells gives it.
    """
    grid = density.shape[0]
    integral = np.zeros((grid + 1, grid + 1))
    integral[1:, 1:] = (density / 255).cumsum(axis=0).cumsum(axis=1)
    top, left, height, width = box
    rows = np.interp((top + height * np.arange(cells + 1) / cells) * grid, *_ruler(grid))
    columns = np.interp((left + width * np.arange(cells + 1) / cells) * grid, *_ruler(grid))
    sums = cell_sums(integral, rows, columns)
    area = (height * grid / cells) * (width * grid / cells)
    return np.asarray(sums / area * np.multiply.outer(visible, visible))


def read_crop(
    density: NDArray[np.uint8],
    detector: Detector,
    settings: Settings,
    box: Sequence[float],
    flips: Sequence[bool],
    cells: int,
) -> NDArray[np.float64]:
    """What training reads off a detector's map for a crop, float64 [cells, cells], as flipped.

    `density` is that map; `box` is (top, left, height, width) in the unit square, `flips` are
    (horizontal, vertical).
    """
    visible = visible_cells(detector, settings.crop, cells, settings.mark)
    top, left, height, width = box
    read = read_map(density, (top, left, height, width), cells, visible)
    return read[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]


def _ruler(grid: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.arange(grid + 1), np.arange(grid + 1)


def cell_sums(integral: NDArray[Any], y: Floats, x: Floats) -> Floats:
    """Sums between neighbouring `y` and `x`, float64 [len(y) - 1, len(x) - 1], of that whose
    integral image is `integral`.

    An integral image is linear between whole pixels, so reading it at edges that cut pixels is
    exact. No matrix product: the bytes must not depend on a BLAS.
    """
    corners = between(between(integral, y).T, x).T
    return np.asarray(np.diff(np.diff(corners, axis=0), axis=1))


def between(values: NDArray[Any], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of `values` at the fractional places `at`, linearly interpolated."""
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    below = values[low]
    return np.asarray(below + (values[low + 1] - below) * (at - low)[:, None])


def weights(density: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """exp(clip(density / T, -20, 20)) over its minimum, as published: at least 1."""
    raw = np.exp(np.clip(density / temperature, -20, 20))
    return np.asarray(raw / raw.min())
