"""FAST, ORB and SIFT as OpenCV has them: by name and options, and the keypoints they find.

Option names and defaults are OpenCV's, which are the published ones (KAMIM
utils/dataset_loaders.py). OpenCV is imported when it is used: names and options are read without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.spec import FREQUENCY, Detector

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Options = dict[str, int | float | bool]

DEFAULTS: dict[str, Options] = {
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
# cutoff: cycles a side at half power; 7 are as many as 14 patches a side can tell.
# scale: grey levels of 255, root mean square of a cell, that are 1; 2 % of ImageNet's are above.
KNOWN = {**DEFAULTS, FREQUENCY: {"cutoff": 7.0, "scale": 120.0}}


def detector_settings(name: str, options: Mapping[str, str] | None = None) -> Detector:
    """Detector `name` with OpenCV's defaults, changed by `options` (name to text).

    Raises UserError, listing what there is, for an unknown name or option or a bad value.
    """
    settings = parsed_detector(name, options or {})
    check_detector(settings)
    return settings


def parsed_detectors(names: str, assignments: list[str]) -> tuple[Detector, ...]:
    """Detectors from `fast,orb` and `fast.threshold=20`, as the command has them."""
    options: dict[str, dict[str, str]] = {name.strip(): {} for name in names.split(",")}
    if len(options) != len(names.split(",")):
        raise UserError(f"--detector {names} names a detector twice")
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        name, dot, option = target.partition(".")
        if not equals or not dot or name not in options:
            raise UserError(
                f"--detector-option {assignment!r} is not DETECTOR.OPTION=VALUE for one of {names}"
            )
        options[name][option] = text
    return tuple(parsed_detector(name, chosen) for name, chosen in options.items())


def parsed_detector(name: str, options: Mapping[str, str]) -> Detector:
    """As detector_settings, but what OpenCV itself refuses is not found yet."""
    if name not in KNOWN:
        raise UserError(f"unknown detector {name!r}; there are {', '.join(KNOWN)}")
    chosen = dict(KNOWN[name])
    for option, text in options.items():
        if option not in chosen:
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(chosen)}")
        chosen[option] = _parse(f"{name}.{option}", text, chosen[option])
    return Detector(name, chosen)


def _parse(name: str, text: str, default: float) -> float:
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = type(default)(text)
    except (ValueError, KeyError):
        raise UserError(f"{name}={text!r} is no {type(default).__name__}") from None
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{name}={text} must be a finite number of at least 0")
    return value


def check_detector(settings: Detector) -> None:
    """UserError unless `settings` make a detector: OpenCV's are tried on a grey square."""
    import cv2
    import numpy as np

    from preprocess import frequency

    if not settings.has_keypoints:
        frequency.check_options(settings)
        return
    try:
        detect(settings, np.zeros((192, 192), np.uint8))
    except cv2.error as error:
        name, chosen = settings.name, settings.options
        raise UserError(f"OpenCV refuses {name} with {chosen}: {error.err}") from None


def detect(detector: Detector, grey: NDArray[np.uint8], crop: int = 0) -> NDArray[np.float32]:
    """Keypoint centres of `grey` (uint8 [H, W]) as float32 [N, 2], (x, y) from pixel centres.

    A detector that keeps its best so many points (ORB 500) keeps as many an area as it would on a
    `crop` x `crop` px crop; 0: as many as its option says, whatever the size.
    """
    import cv2
    import numpy as np

    options = tuple(_budgeted(detector, grey.shape, crop).items())
    keypoints = _make(detector.name, options).detect(grey)
    if not keypoints:
        return np.zeros((0, 2), np.float32)
    return np.asarray(cv2.KeyPoint_convert(keypoints), np.float32)


@lru_cache(maxsize=16)
def _make(name: str, options: tuple[tuple[str, float], ...]) -> Any:
    """One detector per process: making one per image is the published way and costs 0.1 ms."""
    import cv2

    create = {
        "fast": cv2.FastFeatureDetector_create,
        "orb": cv2.ORB_create,
        "sift": cv2.SIFT_create,
    }[name]
    return create(**dict(options))


def _budgeted(detector: Detector, shape: tuple[int, ...], crop: int) -> Options:
    """The options with the point budget of a crop, in proportion to the area inside margins."""
    options, budget = detector.options, detector.options.get("nfeatures", 0)
    if not budget or not crop or shape == (crop, crop):
        return options
    margin = 2 * int(options["edgeThreshold"]) if detector.name == "orb" else 0
    inside = max(1, shape[0] - margin) * max(1, shape[1] - margin) / max(1, crop - margin) ** 2
    return {**options, "nfeatures": max(1, round(budget * inside))}
