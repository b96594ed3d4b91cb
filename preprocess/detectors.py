"""FAST, ORB and SIFT as OpenCV has them: a grey image in, keypoint centres out. And options.

In: uint8 grey [S, S]. Out: float32 (x, y) pixel-centre coordinates; no OpenCV object gets out.
Defaults are OpenCV's, which are the published ones (KAMIM utils/dataset_loaders.py).
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess import frequency
from shards import Detector
from shards.manifest import FREQUENCY

Option = int | float | bool

# Option names are OpenCV's own, so its documentation is ours. `make` turns them into a detector.
DEFAULTS: dict[str, dict[str, Option]] = {
    "fast": {"threshold": 10, "nonmaxSuppression": True, "type": 2},  # 2 is TYPE_9_16
    "orb": {
        "nfeatures": 500,
        "scaleFactor": 1.2,
        "nlevels": 8,
        "edgeThreshold": 31,
        "firstLevel": 0,
        "WTA_K": 2,
        "scoreType": 0,  # Harris
        "patchSize": 31,
        "fastThreshold": 20,
    },
    "sift": {
        "nfeatures": 0,
        "nOctaveLayers": 3,
        "contrastThreshold": 0.04,
        "edgeThreshold": 10.0,
        "sigma": 1.6,
    },
}


def detector_settings(name: str, options: Mapping[str, str] | None = None) -> Detector:
    """Detector `name` with OpenCV's defaults, changed by `options` (name to text).

    Raises ValueError, listing what there is, for an unknown name or option or a bad value.
    """
    known = DEFAULTS | {FREQUENCY: frequency.DEFAULTS}
    if name not in known:
        raise ValueError(f"unknown detector {name!r}; there are {', '.join(known)}")
    chosen = dict(known[name])
    for option, text in (options or {}).items():
        if option not in chosen:
            raise ValueError(f"{name} has no option {option!r}; it has {', '.join(chosen)}")
        chosen[option] = _parse(f"{name}.{option}", text, chosen[option])
    settings = Detector(name, chosen)
    if not settings.has_keypoints:
        frequency.check_options(settings)
        return settings
    try:
        detect(settings, np.zeros((192, 192), np.uint8))
    except cv2.error as error:
        raise ValueError(f"OpenCV refuses {name} with {chosen}: {error.err}") from None
    return settings


def _parse(name: str, text: str, default: Option) -> Option:
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = type(default)(text)
    except (ValueError, KeyError):
        raise ValueError(f"{name}={text!r} is no {type(default).__name__}") from None
    if not np.isfinite(value) or value < 0:
        raise ValueError(f"{name}={text} must be a finite number of at least 0")
    return value


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
