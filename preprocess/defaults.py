"""What `kamim shards build` can be asked for by name, and the settings it takes unasked.

In: detectors and a shard size. Out: Settings, for builds from Python and for the command's help.
Imports no library, so that the command line answers at once.
"""

from dataclasses import replace
from typing import Any, Literal

from shards.spec import AREA, Detector, Settings

Backend = Literal["loky", "dask", "ray"]
# Every name of datasets.py, which needs NumPy (tested).
_PUBLISHED = ("imagenet", "cifar10", "cifar100", "inaturalist", "places365")
DATASETS = ("demo", *_PUBLISHED, "folder", "webdataset", "parquet", "shards")

# docs/decisions.md has the measurements behind each.
DEFAULTS = Settings(
    frame=256,
    quality=90,
    crop=192,
    area=AREA,
    map_crops=3,
    bank=0,
    grid=54,
    mark="ring",
    detect_on="source",
    detectors=(),
    shard_size=0,
    weights=None,
    levels=256,
)


def default_settings(detectors: tuple[Detector, ...], shard_size: int, **changes: Any) -> Settings:
    """The defaults for `detectors`, with `changes`."""
    return replace(DEFAULTS, detectors=detectors, shard_size=shard_size, **changes)
