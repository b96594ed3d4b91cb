"""`kamim maps`: densities without frames, for a dataset that stays as it is."""

import typer

from preprocess.build_cli import allow_seconds, run_build, settings_of
from preprocess.options import (
    DEFAULTS,
    Area,
    Built,
    Crop,
    DetectorOptions,
    Detectors,
    DetectorSeconds,
    EdgeRules,
    Engine,
    Grid,
    Jobs,
    Json,
    MapCrops,
    Mark,
    MaxRejected,
    OnError,
    Out,
    Part,
    Partial,
    Repair,
    Reuse,
    Scheduler,
    ShardSize,
    Split,
    detectors_of,
)

app = typer.Typer(help="Build densities without frames.", no_args_is_help=True)


@app.callback()
def _maps() -> None:
    """Build densities without frames."""


@app.command(short_help="Write keypoint densities of images, without frames.")
def build(
    source: Built,
    out: Out,
    split: Split = "",
    detector: Detectors = "fast",
    detector_option: DetectorOptions = None,
    edge_rule: EdgeRules = None,
    detector_seconds: DetectorSeconds = 60,
    crop: Crop = DEFAULTS.crop,
    area: Area = DEFAULTS.area[0],
    map_crops: MapCrops = DEFAULTS.map_crops,
    grid: Grid = DEFAULTS.grid,
    mark: Mark = "ring",
    shard_size: ShardSize = DEFAULTS.shard_size,
    jobs: Jobs = 0,
    backend: Engine = "loky",
    scheduler: Scheduler = "",
    on_error: OnError = "quarantine",
    max_rejected: MaxRejected = 0.01,
    reuse: Reuse = None,
    part: Part = "",
    repair: Repair = False,
    partial: Partial = False,
    json_output: Json = False,
) -> None:
    """Write keypoint densities of every image of SOURCE into OUT, without frames.

    The maps are those of `kamim shards build`. `kamim shards verify`, `inspect`, `fidelity` and
    `copy` work on the result. In Python, `shards.open(OUT).density(NAME, DETECTOR)`
    gives the map of an image by its name.
    """
    settings = settings_of(
        frame=0,
        quality=0,
        crop=crop,
        area=(area, DEFAULTS.area[1]),
        map_crops=map_crops,
        grid=grid,
        mark=mark,
        detectors=detectors_of(detector, detector_option, edge_rule, mark),
        shard_size=shard_size,
    )
    allow_seconds(detector_seconds)
    how = jobs, on_error, max_rejected, reuse, backend, scheduler
    run_build(source, split, partial, out, settings, how, part, repair, json_output)
