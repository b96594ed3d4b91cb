"""A map as a detector: where Canny finds edges. kamim shards build SOURCE OUT --detector
examples.edges:edges, in the folder that holds examples/.
"""

import cv2
import numpy as np


def edges(rgb: np.ndarray, low: float = 100.0, high: float = 200.0) -> np.ndarray:
    """Share of edge pixels of each 4 x 4 px or so, float32 [H / 4, W / 4]."""
    found = cv2.Canny(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), low, high)
    height, width = (max(3, side // 4) for side in found.shape)
    share = cv2.resize(found.astype(np.float32) / 255, (width, height), None, 0, 0, cv2.INTER_AREA)
    return np.clip(share, 0, 1)
