"""FAST, ORB and SIFT as OpenCV has them: a grey image in, keypoint centres out. And options.

In: uint8 grey [S, S]. Out: float32 (x, y) pixel-centre coordinates; no OpenCV object gets out.
What options there are, and their defaults, is in options.py.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess import frequency
from preprocess.options import DEFAULTS, Option, parsed_detector
from shards.errors import UserError
from shards.spec import Detector

__all__ = ["DEFAULTS", "check_detector", "detect", "detector_settings"]


def detector_settings(name: str, options: Mapping[str, str] | None = None) -> Detector:
    """Detector `name` with OpenCV's defaults, changed by `options` (name to text).

    Raises UserError, listing what there is, for an unknown name or option or a bad value.
    """
    settings = parsed_detector(name, options or {})
    check_detector(settings)
    return settings


def check_detector(settings: Detector) -> None:
    """UserError unless `settings` make a detector: OpenCV's are tried on a grey square."""
    if not settings.has_keypoints:
        frequency.check_options(settings)
        return
    try:
        detect(settings, np.zeros((192, 192), np.uint8))
    except cv2.error as error:
        name, chosen = settings.name, settings.options
        raise UserError(f"OpenCV refuses {name} with {chosen}: {error.err}") from None


@lru_cache(maxsize=16)
def _make(name: str, options: tuple[tuple[str, Option], ...]) -> Any:
    """One detector a process: making one an image is the published way and costs 0.1 ms."""
    create = {
        "fast": cv2.FastFeatureDetector_create,
        "orb": cv2.ORB_create,
        "sift": cv2.SIFT_create,
    }[name]
    return create(**dict(options))


def detect(detector: Detector, grey: NDArray[np.uint8], crop: int = 0) -> NDArray[np.float32]:
    """Keypoint centres of `grey` (uint8 [H, W]) as float32 [N, 2], (x, y) from pixel centres.

    A detector that keeps its best so many points (ORB 500) keeps as many an area as it would on a
    `crop` x `crop` px crop; 0: as many as its option says, whatever the size.
    """
    keypoints = _make(detector.name, tuple(_budgeted(detector, grey.shape, crop).items())).detect(
        grey
    )
    if not keypoints:
        return np.zeros((0, 2), np.float32)
    return np.asarray(cv2.KeyPoint_convert(keypoints), np.float32)


def _budgeted(detector: Detector, shape: tuple[int, ...], crop: int) -> dict[str, Option]:
    """The options with the point budget of a crop, in proportion to the area inside margins."""
    options, budget = detector.options, detector.options.get("nfeatures", 0)
    if not budget or not crop or shape == (crop, crop):
        return options
    margin = 2 * int(options["edgeThreshold"]) if detector.name == "orb" else 0
    inside = max(1, shape[0] - margin) * max(1, shape[1] - margin) / max(1, crop - margin) ** 2
    return {**options, "nfeatures": max(1, round(budget * inside))}
