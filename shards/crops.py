"""Densities into loss weights, in NumPy, for one image: what pages and tests look at.

In: a uint8 map. Out: the density and the weight of each w_ps cell of an output crop.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.spec import Settings
from shards.visibility import visible_cells


def read_map(
    density: NDArray[np.uint8],
    box: tuple[float, float, float, float],
    cells: int,
    visible: NDArray[np.float64] | float = 1.0,
) -> NDArray[np.float64]:
    """Mean density of each of `cells` x `cells` parts of a box, float64 [cells, cells], 0 to 1.

    `density` is uint8 [G, G] over the unit square; `box` is (top, left, height, width) in it;
    `visible` is float64 [cells] of shards.visibility.visible_cells.
    """
    grid = density.shape[0]
    integral = np.zeros((grid + 1, grid + 1))
    integral[1:, 1:] = (density / 255).cumsum(axis=0).cumsum(axis=1)
    top, left, height, width = box
    rows = np.interp((top + height * np.arange(cells + 1) / cells) * grid, *_ruler(grid))
    columns = np.interp((left + width * np.arange(cells + 1) / cells) * grid, *_ruler(grid))
    corners = between(between(integral, rows).T, columns).T
    area = (height * grid / cells) * (width * grid / cells)
    return np.asarray(
        np.diff(np.diff(corners, axis=0), axis=1) / area * np.multiply.outer(visible, visible)
    )


def read_crop(
    density: NDArray[np.uint8],
    row: int,
    settings: Settings,
    box: Sequence[float],
    flips: Sequence[bool],
    cells: int,
) -> NDArray[np.float64]:
    """What a training run reads off map `row` for a crop, float64 [cells, cells], as flipped.

    `density` is that map; `box` is (top, left, height, width) in the unit square, `flips` are
    (horizontal, vertical).
    """
    visible = visible_cells(settings.detectors[row], settings.crop, cells, settings.mark)
    top, left, height, width = box
    read = read_map(density, (top, left, height, width), cells, visible)
    return read[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]


def _ruler(grid: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return np.arange(grid + 1), np.arange(grid + 1)


def between(values: NDArray[Any], at: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows of `values` at the fractional places `at`, linearly interpolated."""
    low = np.minimum(at.astype(np.int64), len(values) - 2)
    below = values[low]
    return np.asarray(below + (values[low + 1] - below) * (at - low)[:, None])


def weights(density: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """exp(clip(density / T, -20, 20)) over its minimum, as published: at least 1."""
    raw = np.exp(np.clip(density / temperature, -20, 20))
    return np.asarray(raw / raw.min())
