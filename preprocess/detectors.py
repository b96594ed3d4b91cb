"""Detectors by name and options, and the keypoints they find: OpenCV's, and a user's own.

Option names and defaults are OpenCV's, which are the published ones (KAMIM
utils/dataset_loaders.py). OpenCV is imported only for detection, not to read names and options.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from shards.errors import UserError, nearest
from shards.spec import FREQUENCY, NAME, Detector

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Options = dict[str, int | float | bool]

GROUP = "kamim.maps"  # of entry points: packages' own detectors
# OpenCV's networks by what creates them, as NAME:FILE.onnx; the file is the user's.
MODELS = {"aliked": "ALIKED", "disk": "DISK"}
SHI_TOMASI: Options = {
    "maxCorners": 1000,
    "qualityLevel": 0.01,
    "minDistance": 1.0,
    "blockSize": 3,
    "useHarrisDetector": False,
    "k": 0.04,
}
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
    "agast": {"threshold": 10, "nonmaxSuppression": True, "type": 3},  # 3 is OAST_9_16
    "brisk": {"thresh": 30, "octaves": 3, "patternScale": 1.0},
    "akaze": {
        "descriptor_type": 5,  # MLDB
        "descriptor_size": 0,
        "descriptor_channels": 3,
        "threshold": 0.001,
        "nOctaves": 4,
        "nOctaveLayers": 4,
        "diffusivity": 1,  # PM_G2
    },
    "kaze": {
        "extended": False,
        "upright": False,
        "threshold": 0.001,
        "nOctaves": 4,
        "nOctaveLayers": 4,
        "diffusivity": 1,  # PM_G2
    },
    "gftt": SHI_TOMASI,
    "harris": {**SHI_TOMASI, "useHarrisDetector": True},
    "mser": {
        "delta": 5,
        "min_area": 60,
        "max_area": 14400,
        "max_variation": 0.25,
        "min_diversity": 0.2,
        "max_evolution": 200,
        "area_threshold": 1.01,
        "min_margin": 0.003,
        "edge_blur_size": 5,
    },
}
CREATE = {
    "fast": "FastFeatureDetector",
    "orb": "ORB",
    "sift": "SIFT",
    "agast": "AgastFeatureDetector",
    "brisk": "BRISK",
    "akaze": "AKAZE",
    "kaze": "KAZE",
    "gftt": "GFTTDetector",
    "harris": "GFTTDetector",
    "mser": "MSER",
}
BUDGETS = ("nfeatures", "maxCorners")  # options that keep the best so many points of an image
# Beyond these OpenCV finds nothing at all, takes another value without a word, or dies.
LIMITS: dict[tuple[str, str], tuple[float, float]] = {
    ("fast", "threshold"): (0, 254),
    ("fast", "type"): (0, 2),
    ("agast", "threshold"): (0, 254),
    ("agast", "type"): (0, 3),
    ("orb", "nfeatures"): (1, math.inf),
    ("orb", "scaleFactor"): (1.01, math.inf),
    ("orb", "nlevels"): (1, math.inf),
    ("mser", "delta"): (1, math.inf),
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
    """Detectors from `fast,orb` or `NAME=module:function` and `fast.threshold=20`, as the command
    has them.
    """
    calls = {named(each)[0]: each for each in names.split(",")}
    if len(calls) != len(names.split(",")):
        raise UserError(f"--detector {names} names a detector twice")
    options: dict[str, dict[str, str]] = {name: {} for name in calls}
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        name, dot, option = target.partition(".")
        if not equals or not dot or name not in options:
            raise UserError(
                f"--detector-option {assignment!r} is not DETECTOR.OPTION=VALUE for one of "
                f"{','.join(calls)}"
            )
        options[name][option] = text
    return tuple(parsed_detector(call, options[name]) for name, call in calls.items())


def option_flags(detector: Detector) -> list[str]:
    """`--detector-option NAME.OPTION=VALUE` for each option that is not its default."""
    usual = {} if detector.plugin else KNOWN.get(detector.name, {})
    chosen = [(each, value) for each, value in detector.options.items() if value != usual.get(each)]
    return [f"--detector-option {detector.name}.{each}={value}" for each, value in chosen]


def named(call: str) -> tuple[str, str]:
    """Name and function of a detector as it was asked for: `fast`, `module:function`,
    `NAME=module:function` or the name of an entry point; no function where OpenCV has it.
    """
    call = call.strip()
    name, equals, function = call.rpartition("=")
    if call in KNOWN:
        return call, ""
    if ":" not in call:
        points = importlib.metadata.entry_points(group=GROUP, name=call)
        if not call:
            raise UserError("--detector names no detector before or after a comma; give fast,orb")
        if not points:
            near = nearest(call.lower(), KNOWN)
            raise UserError(
                f"unknown detector {call!r}{f'{near} There' if near else '; there'} are "
                f"{', '.join(KNOWN)}, networks as "
                f"{', '.join(f'{name}:FILE.onnx' for name in MODELS)}, a function of your own as "
                f"MODULE:FUNCTION, and entry points in the group {GROUP}"
            )
        return call, next(iter(points)).value
    model = function.partition(":")[0]
    if not equals and model in MODELS:
        name = model
    elif not equals:  # the function's, as files may be named
        name = re.sub(r"[^a-z0-9_-]", "-", function.partition(":")[2].lower())[:40]
    if name in KNOWN or not NAME.fullmatch(name):
        rule = "is OpenCV's" if name in KNOWN else "is not of a-z, 0-9, _ and -, 40 at most"
        raise UserError(f"the name {name!r} {rule}; name it otherwise: NAME={function}")
    return name, function


def parsed_detector(call: str, options: Mapping[str, str]) -> Detector:
    """As detector_settings, but what OpenCV itself refuses is not found yet."""
    name, function = named(call)
    plugin = None
    if function:
        from preprocess.plugins import described

        plugin, chosen = described(function)
    else:
        chosen = dict(KNOWN[name])
    for option, text in options.items():
        if option not in chosen:
            there = ", ".join(chosen) or "none"
            raise UserError(f"{name} has no option {option!r}; it has {there}")
        chosen[option] = _parse(f"{name}.{option}", text, chosen[option], signed=bool(plugin))
    return Detector(name, chosen, plugin)


def _parse(name: str, text: str, default: float, signed: bool) -> float:
    """The value of an option, of the kind of its default; OpenCV's are never below 0."""
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = type(default)(text)
    except (ValueError, KeyError):
        raise UserError(f"{name}={text!r} is no {type(default).__name__}") from None
    if not math.isfinite(value) or (value < 0 and not signed):
        least = "" if signed else " of at least 0"
        raise UserError(f"{name}={text} must be a finite number{least}")
    return value


def check_detector(settings: Detector) -> None:
    """Raise UserError unless `settings` make a detector. OpenCV's are tried on a grey square; a
    person's own was imported when it was named.
    """
    if settings.plugin:
        return
    import cv2
    import numpy as np

    from preprocess import frequency

    if not settings.has_keypoints:
        frequency.check_options(settings)
        return
    name, chosen = settings.name, settings.options
    for option, value in chosen.items():
        least, most = LIMITS.get((name, option), (-math.inf, math.inf))
        if not least <= value <= most:
            give = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise UserError(f"{name}.{option}={value} is out of range; give {give}")
    try:
        detect(settings, np.zeros((192, 192), np.uint8))
    except UserError:
        raise
    except (cv2.error, ValueError, OverflowError) as error:  # of what C's numbers cannot hold
        words = getattr(error, "err", error)
        raise UserError(f"OpenCV refuses {name} with {chosen}: {words}") from None


def detect(detector: Detector, pixels: NDArray[np.uint8], crop: int = 0) -> NDArray[np.float32]:
    """Keypoint centres of `pixels` as float32 [N, 2], (x, y) from pixel centres.

    Pixels are grey, uint8 [H, W]; a plug-in takes RGB [H, W, 3], and may give a map, [h, w] of
    0 to 1. Raises Rejected if it fails, hangs, dies, or gives anything else.

    A detector that keeps its best so many points (ORB 500) keeps as many an area as it would on a
    `crop` x `crop` px crop; 0: as many as its option says, whatever the size.
    """
    import cv2
    import numpy as np

    if detector.plugin:
        from preprocess import isolation

        return isolation.found(detector, pixels)
    options = tuple(_budgeted(detector, pixels.shape, crop).items())
    keypoints = _make(detector.name, options).detect(pixels)
    if not keypoints:
        return np.zeros((0, 2), np.float32)
    return np.asarray(cv2.KeyPoint_convert(keypoints), np.float32)


@lru_cache(maxsize=16)
def _make(name: str, options: tuple[tuple[str, float], ...]) -> Any:
    """One detector per process: making one per image is the published way and costs 0.1 ms."""
    import cv2

    create = getattr(cv2, f"{CREATE[name]}_create", None)
    if create is None:  # OpenCV 5 has moved some to opencv_contrib
        raise UserError(
            f"OpenCV {cv2.__version__} has no {name} in its main wheel; version 4 has: type pip "
            "install 'opencv-python-headless<5'"
        )
    return create(**dict(options))


def _budgeted(detector: Detector, shape: tuple[int, ...], crop: int) -> Options:
    """The options with the point budget of a crop, in proportion to the area inside margins."""
    options = detector.options
    option = next((name for name in BUDGETS if name in options), "")
    budget = options.get(option, 0)
    if not budget or not crop or shape == (crop, crop):
        return options
    margin = 2 * int(options["edgeThreshold"]) if detector.name == "orb" else 0
    inside = max(1, shape[0] - margin) * max(1, shape[1] - margin) / max(1, crop - margin) ** 2
    return {**options, option: max(1, round(budget * inside))}
