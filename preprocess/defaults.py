"""The settings that `kamim shards build` takes when nothing else is asked for.

In: detectors and a shard size. Out: Settings, for builds from Python and for the command's help.
"""

from dataclasses import replace
from typing import Any

from shards import Detector, Settings
from shards.plan import AREA

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
)


def default_settings(detectors: tuple[Detector, ...], shard_size: int, **changes: Any) -> Settings:
    """The defaults for `detectors`, with `changes`."""
    return replace(DEFAULTS, detectors=detectors, shard_size=shard_size, **changes)
