"""Looks at every source image once and writes frames and keypoint densities into shards.

In: a dataset by name, path or URL. Out: a finished set of shards. Works without torch.
"""

from preprocess.build import build_shards
from preprocess.decode import Rejected, decode_image
from preprocess.densities import bank_of, density_maps
from preprocess.detectors import detector_settings
from preprocess.fidelity import measure_fidelity, storage
from preprocess.pictures import draw_fidelity, write_picture
from preprocess.redetect import redetect_maps
from preprocess.shard import BuildError
from preprocess.sources import Source, open_source

__all__ = [
    "BuildError",
    "Rejected",
    "Source",
    "bank_of",
    "build_shards",
    "decode_image",
    "density_maps",
    "detector_settings",
    "draw_fidelity",
    "measure_fidelity",
    "open_source",
    "redetect_maps",
    "storage",
    "write_picture",
]
