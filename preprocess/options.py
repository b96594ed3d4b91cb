"""Detectors by name and their options, as a user types them. Imports no detector.

In: a name and options as text. Out: a Detector with every option it has, or a UserError.
Defaults are OpenCV's, which are the published ones (KAMIM utils/dataset_loaders.py).
"""

import math
from collections.abc import Mapping

from shards.errors import UserError
from shards.spec import FREQUENCY, Detector

Option = int | float | bool

# Option names are OpenCV's own, so its documentation is ours; frequency is in frequency.py.
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
# cutoff: cycles a side at half power; 7 are as many as 14 patches a side can tell.
# scale: grey levels of 255, root mean square of a cell, that are 1; 2 % of ImageNet's are above.
OF_FREQUENCY: dict[str, Option] = {"cutoff": 7.0, "scale": 120.0}


def parsed_detector(name: str, options: Mapping[str, str]) -> Detector:
    """Detector `name` with its defaults, changed by `options` (name to text).

    Raises UserError, listing what there is, for an unknown name or option or a bad value; what
    OpenCV itself refuses, detector_settings finds.
    """
    known = DEFAULTS | {FREQUENCY: OF_FREQUENCY}
    if name not in known:
        raise UserError(f"unknown detector {name!r}; there are {', '.join(known)}")
    chosen = dict(known[name])
    for option, text in options.items():
        if option not in chosen:
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(chosen)}")
        chosen[option] = _parse(f"{name}.{option}", text, chosen[option])
    return Detector(name, chosen)


def _parse(name: str, text: str, default: Option) -> Option:
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = type(default)(text)
    except (ValueError, KeyError):
        raise UserError(f"{name}={text!r} is no {type(default).__name__}") from None
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{name}={text} must be a finite number of at least 0")
    return value
