"""Looks at every source image once and writes frames and keypoint densities into shards.

It works without torch. The module of a name is imported when the name is first used, so that a
command line answers before OpenCV is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preprocess.building import build, build_shards
    from preprocess.datasets import open_source
    from preprocess.decode import Rejected, decode_image
    from preprocess.densities import bank_of, density_maps
    from preprocess.detectors import detector_settings
    from preprocess.fidelity import draw_fidelity, measure_fidelity, storage
    from preprocess.parts import build_part, join_parts
    from preprocess.redetect import redetect_maps
    from preprocess.source import Source

_HOMES = {
    "building": "build build_shards",
    "datasets": "open_source",
    "decode": "Rejected decode_image",
    "densities": "bank_of density_maps",
    "detectors": "detector_settings",
    "fidelity": "draw_fidelity measure_fidelity storage",
    "parts": "build_part join_parts",
    "redetect": "redetect_maps",
    "source": "Source",
}

__all__ = [
    "BuildError",
    "Rejected",
    "Source",
    "bank_of",
    "build",
    "build_part",
    "build_shards",
    "decode_image",
    "density_maps",
    "detector_settings",
    "draw_fidelity",
    "join_parts",
    "measure_fidelity",
    "open_source",
    "redetect_maps",
    "storage",
]


class BuildError(Exception):
    """A build that stopped or ended short of what was asked; the message says what to do."""


if not TYPE_CHECKING:  # so that a type checker knows which names there are

    def __getattr__(name: str) -> Any:
        for home, names in _HOMES.items():
            if name in names.split():
                value = globals()[name] = getattr(import_module(f"preprocess.{home}"), name)
                return value
        raise AttributeError(f"module 'preprocess' has no attribute {name!r}")
