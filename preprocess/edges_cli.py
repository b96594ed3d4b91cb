"""`kamim shards edge-rule`: measures what a detector finds near a crop's edge."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import preprocess
from preprocess.build_cli import print_json, say, within
from preprocess.cli import app
from preprocess.detectors import check_detector, parsed_detectors
from preprocess.options import DetectorOptions, Jobs, Json, Mark, Split
from shards import Settings
from shards.errors import UserError
from shards.progress import waiting


@app.command("edge-rule", short_help="Measure how much less a detector finds near a crop's edge.")
def measure_rule(
    detector: Annotated[
        str, Argument(metavar="DETECTOR", help="One detector, as in kamim shards build.")
    ],
    source: Annotated[
        str, Argument(metavar="SOURCE", help="Images, as in kamim shards build; 800 are enough.")
    ],
    split: Split = "",
    detector_option: DetectorOptions = None,
    mark: Mark = "ring",
    samples: Annotated[int, Option(metavar="N", help="Images to measure on.")] = 800,
    out: Annotated[
        Path | None, Option(metavar="FILE", help="File to write; DETECTOR.edge.json by default.")
    ] = None,
    jobs: Jobs = 0,
    json_output: Json = False,
) -> None:
    """Measure how much less a detector finds near the edge of a crop, for build --edge-rule.

    The rule compares detection on a 192-px window with detection on the 320-px image around it: the
    ratio of densities, by distance from the window's edge.
    """
    chosen = parsed_detectors(detector, detector_option or [])
    if len(chosen) > 1 or not chosen[0].has_keypoints:
        raise UserError(f"edge-rule measures one detector of points or maps, not {detector}")
    within("--samples", samples, 1)
    check_detector(chosen[0])
    from preprocess.edges import measure_edge, write_edge
    from preprocess.shard import library_versions

    with waiting(f"listing {source}"):
        listed = preprocess.open_source(source, split, partial=True)
    path = out or Path(f"{chosen[0].name}.edge.json")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for {path.name}; make it first")
    rule = measure_edge(listed, chosen[0], mark, samples, jobs)
    measured = replace(chosen[0], edge=rule)
    write_edge(path, measured, library_versions(Settings(detectors=(measured,), mark=mark)))
    if json_output:
        print_json({"file": str(path), **asdict(rule)})
        return
    for at, share in zip(rule.at, rule.share, strict=True):
        print(f"{at:4g} px {share:7.1%}")
    say(f"of {rule.photos} images; use it: kamim shards build ... --edge-rule {path}")
