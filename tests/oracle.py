"""The slow published way, restated from OpenCV calls: what every fast path is held to.

Source of the recipe: KAMIM, For GPUs/utils/dataset_loaders.py and KAMIM.py (arXiv 2407.13873).
"""

import math

import cv2
import numpy as np

DETECTORS = {
    "fast": lambda: cv2.FastFeatureDetector_create(),
    "orb": lambda: cv2.ORB_create(),
    "sift": lambda: cv2.SIFT_create(),
}


def rings(rgb: np.ndarray, name: str) -> np.ndarray:
    """Bitmap of the rings round the keypoints of a uint8 RGB image, a new detector each time."""
    keypoints = DETECTORS[name]().detect(rgb)
    painted = cv2.drawKeypoints(np.zeros_like(rgb), keypoints, None, color=(255, 0, 0))[:, :, 0]
    return np.sign(painted)


def resized(rgb: np.ndarray, side: int) -> np.ndarray:
    """Squeezed to a square, bilinear, no antialias."""
    return cv2.resize(rgb, (side, side), interpolation=cv2.INTER_LINEAR)


# Shares of its rings that a detector finds by distance (px) from an edge; see docs/decisions.md.
SEEN = {
    "fast": ([0, 1, 2, 3, 4, 5, 6], [0.50, 0.71, 0.79, 0.87, 0.92, 0.97, 1]),
    "orb": ([26, 27, 34, 48], [0, 0.15, 0.87, 1]),
    "sift": (
        [0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 30],
        [0.22, 0.35, 0.47, 0.59, 0.69, 0.79, 0.86, 0.93, 0.95, 0.975, 1],
    ),
}


def seen(name: str, side: int) -> np.ndarray:
    """What `name` sees at each pixel between two edges, by going over them."""
    return np.array([np.interp(min(i, side - 1 - i), *SEEN[name]) for i in range(side)])


def back(view: np.ndarray, box: tuple[int, int, int, int], height: int, width: int, grid: int):
    """Sum of a view's pixels in each cell of a grid over the whole source, in cells."""

    def shares(cells: int, begin: float, length: float, whole: float, side: int) -> np.ndarray:
        out = np.zeros((cells, side))
        for i in range(cells):
            for j in range(side):
                low = max(i / cells, (begin + j * length / side) / whole)
                high = min((i + 1) / cells, (begin + (j + 1) * length / side) / whole)
                out[i, j] = max(0.0, high - low) * cells
        return out

    top, left, tall, wide = box
    rows = shares(grid, top, tall, height, view.shape[0])
    return rows @ view @ shares(grid, left, wide, width, view.shape[1]).T


def density_map(rgb: np.ndarray, name: str, views: list, grid: int, make) -> np.ndarray:
    """Marks of all views over what they see, for each grid cell; `views`: (box, rows, columns)."""
    height, width = rgb.shape[:2]
    marked, visible = np.zeros((grid, grid)), np.zeros((grid, grid))
    for box, rows, columns in views:
        top, left, tall, wide = box
        part = rgb[top : top + tall, left : left + wide]
        view = cv2.resize(part, (columns, rows), interpolation=cv2.INTER_LINEAR)
        painted = paint(view, make(rows, columns).detect(view))
        marked += back(painted, box, height, width, grid)
        share = np.outer(seen(name, rows), seen(name, columns))
        visible += back(share, box, height, width, grid)
    return np.where(visible > 0.2, np.minimum(1, marked / np.maximum(visible, 0.2)), 0)


def paint(rgb: np.ndarray, keypoints: list) -> np.ndarray:
    """Pixels that rings round `keypoints` cover."""
    return np.sign(
        cv2.drawKeypoints(np.zeros_like(rgb), keypoints, None, color=(255, 0, 0))[..., 0]
    )


def random_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop rule, area 0.67 to 1: top, left, height, width in pixels."""
    for _ in range(10):
        area = height * width * rng.uniform(0.67, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def crop_density(crop: np.ndarray, name: str, w_ps: int = 8) -> np.ndarray:
    """Density of each w_ps cell of a square uint8 RGB crop, float64."""
    cells = crop.shape[0] // w_ps
    return rings(crop, name).reshape(cells, w_ps, cells, w_ps).mean(axis=(1, 3))


def weights(density: np.ndarray, temperature: float = 0.25) -> np.ndarray:
    """KAMIM's weight of each cell."""
    raw = np.exp(np.clip(density / temperature, -20, 20))
    return raw / raw.min()
