"""The frequency map: where an image's low frequencies lie, by FFT. It has no keypoints.

FAMT (arXiv 2211.15362 v3) guides its masks by an FFT low pass. Its formula is not published in a
form we could read, so this one is our own design, and this file is all of it: put another function
in its place to try another.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from shards import Detector
from shards.crops import cell_sums
from shards.errors import UserError

SIDE = 96  # px that the whole source is squeezed to: its low frequencies need no more
MOST = SIDE / 4  # cycles a side; beyond, squeezing to SIDE is a low pass of its own


def check_options(detector: Detector) -> None:
    """UserError unless the options make a low pass."""
    cutoff, scale = detector.options["cutoff"], detector.options["scale"]
    if not 0 < cutoff <= MOST:
        raise UserError(f"frequency.cutoff={cutoff} is out of range; give above 0 to {MOST:g}")
    if not scale > 0:
        raise UserError(f"frequency.scale={scale} is not positive; the default is 120")


def frequency_map(rgb: NDArray[np.uint8], detector: Detector, grid: int) -> NDArray[np.float64]:
    """Low-frequency amplitude of each of `grid` x `grid` cells of `rgb` (uint8 [H, W, 3]), 0 to 1.

    The whole source once: low frequencies hardly change with a crop's scale, and know no edge. Grey
    is mirrored at its edges, which the FFT takes for neighbours, and filtered by a Gaussian without
    its mean; a cell has the root of its mean energy, over `scale`.
    """
    shrinking = min(rgb.shape[:2]) >= SIDE
    method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    grey = cv2.cvtColor(cv2.resize(rgb, (SIDE, SIDE), interpolation=method), cv2.COLOR_RGB2GRAY)
    mirrored = np.pad(grey.astype(np.float64), ((0, SIDE), (0, SIDE)), "symmetric")
    cycles = np.fft.fftfreq(2 * SIDE, 1 / SIDE)[:, None], np.fft.rfftfreq(2 * SIDE, 1 / SIDE)
    squared = (cycles[0] ** 2 + cycles[1] ** 2) / detector.options["cutoff"] ** 2
    gain = np.exp2(-squared / 2)
    gain[0, 0] = 0  # deviation from the mean: a bright photo is not all high
    smooth = np.fft.irfft2(np.fft.rfft2(mirrored) * gain, s=mirrored.shape)[:SIDE, :SIDE]
    edges = np.linspace(0.0, SIDE, grid + 1)
    sums = cell_sums(cv2.integral(smooth**2), edges, edges)
    energy = np.maximum(sums, 0) * (grid / SIDE) ** 2  # rounding may go below 0
    return np.asarray(np.minimum(np.sqrt(energy) / detector.options["scale"], 1))
