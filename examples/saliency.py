"""A map as a detector: spectral-residual saliency (Hou and Zhang, CVPR 2007). kamim shards build
SOURCE OUT --detector examples.saliency:saliency, in the folder that holds examples/.
"""

import cv2
import numpy as np


def saliency(rgb: np.ndarray, side: int = 64, blur: float = 2.5) -> np.ndarray:
    """What of the log spectrum is not its local mean, back in the image: float32 [side, side]."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (side, side), interpolation=cv2.INTER_AREA)
    spectrum = np.fft.fft2(small.astype(np.float64))
    log = np.log(np.abs(spectrum) + 1e-9)
    residual = log - cv2.blur(log, (3, 3))
    found = np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2
    found = cv2.GaussianBlur(found, (0, 0), blur)
    return (found / found.max()).astype(np.float32)
