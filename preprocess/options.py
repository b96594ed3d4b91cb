"""Arguments and options shared by the commands that build and check sets."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from preprocess.detectors import DEFAULTS as OPENCV
from preprocess.detectors import MODELS, parsed_detectors
from shards.spec import BANK_CELL, RANGES, Detector, Settings

# The names of datasets.py and executors.py, which need libraries (tested).
_PUBLISHED = ("imagenet", "cifar10", "cifar100", "inaturalist", "places365")
DATASETS = ("demo", *_PUBLISHED, "folder", "webdataset", "parquet", "shards", "ffcv")
Backend = Literal["loky", "dask", "ray"]
DEFAULTS = Settings()
SPANS = {name: f"{least} to {most}" for name, least, most in RANGES}

Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
Jobs = Annotated[int, Option(metavar="N", help="Processes. 0: one per core.")]
Folder = Annotated[Path, Argument(metavar="FOLDER", help="Folder of a finished set of shards.")]
Built = Annotated[
    str,
    Argument(
        metavar="SOURCE",
        help="Path or URL of a folder or .tar of class folders, or a dataset as NAME or "
        f"NAME:PATH: {', '.join(DATASETS)}.",
    ),
]
Out = Annotated[
    str,
    Argument(
        metavar="OUT", help="Folder or URL (s3://bucket/set) to write: new, or an unfinished set."
    ),
]
Detectors = Annotated[
    str,
    Option(
        metavar="NAMES",
        help=f"Detectors, separated by commas: OpenCV's {', '.join(OPENCV)}; OpenCV's networks as "
        f"{' or '.join(f'{name}:FILE.onnx' for name in MODELS)}; your own as MODULE:FUNCTION or "
        "NAME=MODULE:FUNCTION; frequency: no keypoints, but a map of low frequencies for FAMT's "
        "masks.",
    ),
]
DetectorOptions = Annotated[
    list[str] | None,
    Option(
        metavar="NAME.OPTION=VALUE", help="Option of a detector: fast.threshold=20. Repeatable."
    ),
]
DetectorSeconds = Annotated[
    float,
    Option(
        metavar="SECONDS",
        help="Most seconds that your own detector may take per image or crop. 0: no limit.",
    ),
]
EdgeRules = Annotated[
    list[Path] | None,
    Option(
        metavar="FILE",
        help="Edge rule of a detector: a file from kamim shards edge-rule. Repeatable.",
    ),
]
Crop = Annotated[
    int,
    Option(
        metavar="PX",
        help=f"Side of the crops in training, px, {SPANS['crop']}, a multiple of {BANK_CELL}.",
    ),
]
Area = Annotated[
    float,
    Option(metavar="SHARE", help="Least area of a crop, as a share of the source, 0.01 to 1."),
]
MapCrops = Annotated[
    int,
    Option(
        metavar="N",
        help="Random crops per image that a map averages, with the whole image, "
        f"{SPANS['map_crops']}.",
    ),
]
Grid = Annotated[
    int, Option(metavar="N", help=f"Cells per side of a density map, {SPANS['grid']}.")
]
Mark = Annotated[Literal["ring", "disc", "point"], Option(help="What a keypoint covers.")]
ShardSize = Annotated[
    int, Option(metavar="N", help="Inputs per shard. 0: 1000, fewer for small sources.")
]
Engine = Annotated[
    Backend, Option(help="What runs the processes: this machine (loky), Dask or Ray.")
]
Scheduler = Annotated[
    str,
    Option(metavar="HOST:PORT", help="Address of a Dask or Ray cluster that sees SOURCE and OUT."),
]
OnError = Annotated[
    Literal["quarantine", "fail"],
    Option(help="A bad input is listed as rejected, or stops the build."),
]
MaxRejected = Annotated[
    float,
    Option(
        metavar="SHARE", help="Share of rejected inputs, 0 to 1, above which the exit status is 1."
    ),
]
Reuse = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        help="Copy equal maps, and frames where there are any, from this finished set of the "
        "same source.",
    ),
]
Part = Annotated[
    str,
    Option(
        metavar="I/N",
        help="Build only part I of N. When all are built: kamim shards join OUT.",
    ),
]
Repair = Annotated[
    bool, Option("--repair", help="Hash the files of a finished set and rebuild damaged ones.")
]
Partial = Annotated[bool, Option("--partial", help="Accept a named dataset that is incomplete.")]
From = Annotated[
    str | None,
    Option(metavar="SOURCE", help="The source that the set was built from; the demo needs none."),
]
Split = Annotated[
    str, Option(metavar="NAME", help="Split of a named dataset; the training split by default.")
]
Temperature = Annotated[float, Option(metavar="T", help="T in the weights exp(density / T).")]
Cell = Annotated[int, Option(metavar="PX", help="Side of a weight cell, px.")]


def detectors_of(
    names: str, options: list[str] | None, edge_rules: list[Path] | None, mark: str
) -> tuple[Detector, ...]:
    """Detectors as the command names them, with their options and measured edge rules."""
    detectors = parsed_detectors(names, options or [])
    for path in edge_rules or []:
        from preprocess.edges import with_edge

        detectors = with_edge(detectors, path, mark)
    return detectors
