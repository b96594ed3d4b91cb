"""Weights of a crop that are read from a map, corrected for the variation between crops.

A map gives the expected density d of a cell. exp is convex, so exp(d / T) is less than the expected
weight. Each cell therefore gets the density whose weight is the expected one. On crops, the marked
pixels of a cell are beta-binomial, with the mean and deviation that were measured for the map's
value. The least density of a crop, whose weight divides all others, lies below the least expected
density; the more cells, the lower.

Measured on 400 of the 800 photos, tested on the other 400: `python -m kamim.bench.spread`.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.spec import BANK_CELL, Detector

Floats = NDArray[np.float64]

STEPS = 256  # of a density from 0 to 1 in a table
MOST_PIXELS = 1024  # pixels of a cell that are told apart
# Densities read off a map, cells of 8 px; mean and deviation of what detection finds there.
AT = (0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 1)


class Spread(NamedTuple):
    """mean, deviation: at each of AT, in words. top: the density of a cell that is full."""

    mean: str
    deviation: str
    top: float = 1.0


SPREADS = {
    "fast": Spread(
        "0.003 0.018 0.038 0.084 0.185 0.283 0.388 0.490 0.597 0.699 0.835 0.916 0.960 0.998",
        "0.030 0.071 0.083 0.119 0.160 0.180 0.189 0.193 0.187 0.172 0.133 0.088 0.053 0.005",
    ),
    "orb": Spread(
        "0.001 0.019 0.041 0.084 0.181 0.268 0.371 0.473 0.573 0.694 0.806 0.913 0.966 0.996",
        "0.017 0.071 0.087 0.131 0.174 0.201 0.215 0.219 0.216 0.198 0.170 0.104 0.061 0.016",
    ),
    "sift": Spread(
        "0.004 0.029 0.052 0.107 0.206 0.306 0.401 0.504 0.597 0.681 0.771 0.860 0.930 0.930",
        "0.038 0.094 0.107 0.149 0.191 0.215 0.224 0.223 0.212 0.190 0.162 0.132 0.088 0.088",
        top=0.94,
    ),
}
NARROWER = -0.8  # the deviation goes with this power of the side of a cell


class Correction(NamedTuple):
    """float64 [STEPS + 1] each, at densities from 0 to 1: the density whose weight is the expected
    one, and, at the least density of a crop, that whose weight the others are divided by.
    """

    likely: Floats
    least: Floats

    def weights(self, density: Floats, temperature: float) -> Floats:
        """Weights of one crop's `density` [c, c] by its least, as WeightedCrops has them."""
        at = np.linspace(0, 1, STEPS + 1)
        likely = np.interp(density, at, self.likely)
        least = np.interp(density.min(), at, self.least)
        raw = np.exp(
            np.clip(np.stack([likely, np.full_like(likely, least)]) / temperature, -20, 20)
        )
        return np.asarray(raw[0] / raw[1])


def correction(
    detector: Detector, mark: str, temperature: float, w_ps: int, cells: int
) -> Correction | None:
    """For weight cells of `w_ps` px, `cells` along a crop. None if nothing was measured: for a
    user's own detector, and for other marks than rings.
    """
    spread = SPREADS.get(detector.name)
    if spread is None or detector.plugin or mark != "ring":
        return None
    at = np.linspace(0, 1, STEPS + 1)
    mean, deviation = (
        np.interp(at, AT, [float(word) for word in words.split()])
        for words in (spread.mean, spread.deviation)
    )
    deviation *= (w_ps / BANK_CELL) ** NARROWER
    pixels = min(w_ps**2, MOST_PIXELS)
    likely = expected(mean / spread.top, deviation / spread.top, pixels, temperature / spread.top)
    below = max(0.0, 0.22 * math.log(cells**2) - 0.58)  # deviations; measured for 36 to 576 cells
    likely *= spread.top
    # At most the likely, or where exp is clipped a weight could be below 1.
    return Correction(likely, np.clip(mean - below * deviation, 0, likely))


def expected(mean: Floats, deviation: Floats, pixels: int, temperature: float) -> Floats:
    """T log E[exp(clip(d / T, -20, 20))] of densities d = k / `pixels` with beta-binomial k of that
    `mean` and `deviation`, float64 [n] each.
    """
    mean = np.clip(mean, 1e-5, 1 - 1e-5)
    alike = (deviation**2 / (mean * (1 - mean)) - 1 / pixels) / ((1 - 1 / pixels) or 1)
    both = 1 / np.clip(alike, 1e-3, 0.98)[:, None] - 1
    a, b = mean[:, None] * both, (1 - mean[:, None]) * both
    k = np.arange(pixels)
    ratios = np.log((pixels - k) * (k + a) / ((k + 1) * (pixels - k - 1 + b)))
    log = np.concatenate([np.zeros((len(mean), 1)), ratios.cumsum(axis=1)], axis=1)
    chance = np.exp(log - log.max(axis=1, keepdims=True))
    chance /= chance.sum(axis=1, keepdims=True)
    raw = np.exp(np.clip(np.arange(pixels + 1) / pixels / temperature, -20, 20))
    return np.asarray(temperature * np.log((chance * raw).sum(axis=1)))
