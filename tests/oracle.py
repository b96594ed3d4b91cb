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


def overlaps(cells: int, side: int) -> np.ndarray:
    """Length of pixel j of `side` inside cell i of `cells`, in pixels, by going over both."""
    out = np.zeros((cells, side))
    for i in range(cells):
        for j in range(side):
            low, high = max(i * side / cells, j), min((i + 1) * side / cells, j + 1)
            out[i, j] = max(0.0, high - low)
    return out


def density_map(rgb: np.ndarray, name: str, scales: tuple[int, ...], grid: int) -> np.ndarray:
    """Mean over `scales` of the marked share of each grid cell, float64 [grid, grid]."""
    maps = []
    for side in scales:
        share = overlaps(grid, side) / (side / grid)
        maps.append(share @ rings(resized(rgb, side), name) @ share.T)
    return np.mean(maps, axis=0)


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
