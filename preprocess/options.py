"""Arguments and options that several commands of building and checking sets have alike."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from preprocess.detectors import DEFAULTS as OPENCV
from preprocess.detectors import parsed_detectors
from shards.spec import Detector, Settings

# The names of datasets.py and executors.py, which need libraries (tested).
_PUBLISHED = ("imagenet", "cifar10", "cifar100", "inaturalist", "places365")
DATASETS = ("demo", *_PUBLISHED, "folder", "webdataset", "parquet", "shards")
Backend = Literal["loky", "dask", "ray"]
DEFAULTS = Settings()

Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Jobs = Annotated[int, Option(help="Processes; 0: one per core.")]
Folder = Annotated[Path, Argument(help="Folder of a finished set of shards.")]
Built = Annotated[
    str,
    Argument(
        help="Folder or .tar of class folders, by path or URL, or a dataset as NAME or "
        f"NAME:PATH: {', '.join(DATASETS)}."
    ),
]
Out = Annotated[
    str, Argument(help="Destination folder, or URL as s3://bucket/set: new, or an unfinished set.")
]
Detectors = Annotated[
    str,
    Option(
        help=f"Detectors, separated by commas: OpenCV's {', '.join(OPENCV)}; your own as "
        "MODULE:FUNCTION or NAME=MODULE:FUNCTION. frequency is a map of low frequencies by "
        "FFT, without keypoints, for FAMT's masks."
    ),
]
DetectorOptions = Annotated[
    list[str] | None,
    Option(help="Option of a detector, as fast.threshold=20. Repeatable."),
]
EdgeRules = Annotated[
    list[Path] | None,
    Option(help="File that kamim shards edge-rule wrote for a detector. Repeatable."),
]
Crop = Annotated[int, Option(help="Side of the training crops that densities are for, px.")]
Area = Annotated[float, Option(help="Least share of the source that such a crop shows.")]
MapCrops = Annotated[
    int, Option(help="Random crops per image that its map averages, beside the whole image.")
]
Grid = Annotated[int, Option(help="Cells per side of a density map.")]
Mark = Annotated[Literal["ring", "disc", "point"], Option(help="What a keypoint covers.")]
ShardSize = Annotated[int, Option(help="Inputs per shard; 0: 1000, fewer for small sources.")]
Engine = Annotated[Backend, Option(help="What runs the processes.")]
Scheduler = Annotated[
    str, Option(help="HOST:PORT of a Dask or Ray cluster that sees SOURCE and OUT.")
]
OnError = Annotated[
    Literal["quarantine", "fail"], Option(help="A bad input is listed, or stops the build.")
]
MaxRejected = Annotated[
    float, Option(help="Share of rejected inputs above which the exit status is 1.")
]
Reuse = Annotated[
    Path | None, Option(help="Finished set of this source whose frames and equal maps are copied.")
]
Part = Annotated[
    str,
    Option(
        metavar="I/N",
        help="Build only the i-th of n parts of the set; then, of all: kamim shards join OUT.",
    ),
]
Repair = Annotated[
    bool, Option("--repair", help="Hash a finished set and rebuild its damaged files.")
]
Partial = Annotated[bool, Option("--partial", help="Accept a named dataset that is incomplete.")]
From = Annotated[str | None, Option(help="The source of the set; the demo's needs none.")]
Split = Annotated[str, Option(help="Split of a named dataset; the training split by default.")]
Temperature = Annotated[float, Option(help="T of the weights.")]
Cell = Annotated[int, Option(help="Side of a weight cell of a crop, px.")]


def detectors_of(
    names: str, options: list[str] | None, edge_rules: list[Path] | None
) -> tuple[Detector, ...]:
    """Detectors as the command names them, with their options and measured edge rules."""
    detectors = parsed_detectors(names, options or [])
    for path in edge_rules or []:
        from preprocess.edges import with_edge

        detectors = with_edge(detectors, path)
    return detectors
