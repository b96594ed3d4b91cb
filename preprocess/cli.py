"""`kamim shards`: build, and the commands on finished sets.

What was typed is checked before any library is imported. Results go to stdout, notes to stderr.
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

import preprocess
import shards
from preprocess import BuildError
from preprocess.build_cli import (
    allow_seconds,
    print_json,
    print_result,
    run_build,
    say,
    settings_of,
    weights_of,
    within,
)
from preprocess.options import (
    DEFAULTS,
    SPANS,
    Area,
    Built,
    Cell,
    Crop,
    DetectorOptions,
    Detectors,
    DetectorSeconds,
    EdgeRules,
    Engine,
    Folder,
    From,
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
    Temperature,
    detectors_of,
)
from shards.errors import UserError
from shards.files import mending, write_atomically
from shards.progress import counted, waiting

app = typer.Typer(help="Build, check and look at shards.", no_args_is_help=True)


@app.command(short_help="Write frames and keypoint densities of images into shards.")
def build(
    source: Built,
    out: Out,
    split: Split = "",
    detector: Detectors = "fast",
    detector_option: DetectorOptions = None,
    edge_rule: EdgeRules = None,
    detector_seconds: DetectorSeconds = 60,
    frame: Annotated[
        int,
        Option(
            metavar="PX",
            help=f"Side of the stored square frame, px, {SPANS['frame']}; best at least "
            "crop / sqrt(area).",
        ),
    ] = DEFAULTS.frame,
    quality: Annotated[
        int, Option(metavar="N", help="JPEG quality of frames, 1 to 100. 0: raw pixels.")
    ] = DEFAULTS.quality,
    crop: Crop = DEFAULTS.crop,
    area: Area = DEFAULTS.area[0],
    map_crops: MapCrops = DEFAULTS.map_crops,
    bank: Annotated[
        int,
        Option(
            metavar="N",
            help=f"Crops stored per image, with exact densities, {SPANS['bank']}. 0: none.",
        ),
    ] = DEFAULTS.bank,
    weights: Annotated[
        str,
        Option(
            metavar="T,W_PS",
            help="Also store loss weights for T,w_ps: of the bank's crops, or of the whole frame. "
            "w_ps is a divisor of the crop, and with a bank a multiple of 8.",
        ),
    ] = "",
    grid: Grid = DEFAULTS.grid,
    mark: Mark = "ring",
    detect_on: Annotated[
        Literal["source", "frame"], Option(help="Detect on the source, or on the stored frame.")
    ] = "source",
    levels: Annotated[
        int,
        Option(
            metavar="N",
            help="Levels of density: 256, or 16 to repair or reuse an upgraded set.",
        ),
    ] = DEFAULTS.levels,
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
    """Write frames and keypoint densities of every image of SOURCE into shards in OUT.

    OUT is a folder or a URL, such as s3://bucket/set. If the build is stopped or killed, the same
    command goes on. On a finished set it checks that each file is there with its size; --repair
    also hashes the files. The bytes depend only on inputs and settings, not on --jobs, --backend or
    --part. EXIF orientation is ignored, as in the field's loaders.
    """
    settings = settings_of(
        frame=frame,
        quality=quality,
        crop=crop,
        area=(area, DEFAULTS.area[1]),
        map_crops=map_crops,
        bank=bank,
        grid=grid,
        mark=mark,
        detect_on=detect_on,
        detectors=detectors_of(detector, detector_option, edge_rule, mark),
        shard_size=shard_size,
        weights=weights_of(weights),
        levels=levels,
    )
    allow_seconds(detector_seconds)
    how = jobs, on_error, max_rejected, reuse, backend, scheduler
    run_build(source, split, partial, out, settings, how, part, repair, json_output)


@app.command()
def verify(
    folder: Folder,
    level: Annotated[
        Literal["structure", "checksum", "decode", "redetect"],
        Option(help="What to check; each level includes those before it."),
    ] = "checksum",
    source: From = None,
    split: Split = "",
    samples: Annotated[int, Option(metavar="N", help="Records that redetect computes again.")] = 64,
    json_output: Json = False,
) -> None:
    """Check a finished set of shards. The exit status is 1 if anything is wrong.

    structure: manifest, ledger, sizes, and the index against tar headers. checksum: sha256 of every
    file. decode: every record decodes. redetect: maps of some records, computed again, are equal.
    """
    within("--samples", samples, 1)
    if not folder.exists():
        if ":/" in str(folder):
            shards.load(folder)  # raises, and says what to do with a URL
        raise UserError(
            f"there is no {folder} to verify; build it first: kamim shards build SOURCE "
            f"{shlex.quote(str(folder))}"
        )
    redetect = level == "redetect"
    problems = shards.verify(folder, shards.LEVELS[-1] if redetect else level)
    deep = redetect and not problems  # then no file is damaged
    if deep:
        records = shards.ShardSet(folder)
        if records.manifest.container == "ffcv":
            raise UserError(f"{folder} holds no source names; redetect the set it was made from")
        demo = records.manifest.source["kind"] == "demo"
        listed = _source_of(records, source, split) if source or demo else None
        problems = preprocess.redetect_maps(records, listed, samples)
    more = len(problems) - 20
    repair = _repair(folder) if problems and not deep else " --repair"
    repair = f" --split {split}{repair}" if split else repair
    problems = [line.replace(" --repair", repair) for line in problems]
    lines = [*problems[:20], *([f"and {more} more"] if more > 0 else [])]
    if not problems:
        count = shards.load(folder).count
        are = "are" if count > 1 else "is"
        lines = [f"{folder}: {counted(count, 'record')} {are} sound at level {level}"]
    facts = {"folder": str(folder), "level": level, "problems": problems}
    print_result(json_output, facts, "\n".join(lines))
    if problems:
        number = counted(len(problems), "problem")
        mend = "" if deep else _mend(folder, problems).replace(" --repair", repair)
        raise BuildError(f"{folder} has {number} at level {level}{mend}")


def _mend(folder: Path, problems: list[str]) -> str:
    """What to do about the first file that a build writes, as the end of a sentence."""
    try:
        finished = shards.load(folder)
    except UserError:  # which is the problem, and says itself what to do
        return ""
    for file in finished.files:
        path = folder / file.name
        if any(line.startswith(str(path)) for line in problems):
            return f", first in {file.name}; {mending(path)}"
    return ""


def _repair(folder: Path) -> str:
    """What the command that repairs the set ends in: the options that are the set's."""
    from preprocess.building import shard_size_for
    from preprocess.compare import flags_of

    try:
        finished = shards.load(folder)
    except UserError:  # which is the problem, and says itself what to do
        return " --repair"
    size = shard_size_for(finished.ledger.inputs, finished.settings.frame > 0)
    return f" {flags_of(finished.settings, size)} --repair"


@app.command(short_help="Write one HTML page of frames, densities and weights.")
def inspect(
    folder: Folder,
    page: Annotated[
        Path | None, Option(metavar="FILE", help="File to write; FOLDER/inspect.html by default.")
    ] = None,
    samples: Annotated[int, Option(metavar="N", help="Frames to show.")] = 24,
    temperature: Temperature = 0.25,
    w_ps: Cell = 8,
    json_output: Json = False,
) -> None:
    """Write one HTML page: frames, densities, a crop with its weights, histograms, the ledger."""
    records = shards.ShardSet(folder)
    with waiting("drawing the page"):
        text = shards.inspect_page(records, temperature, w_ps, within("--samples", samples, 1))
    path = page or folder / "inspect.html"
    write_atomically(path, text.encode("utf-8"))
    facts = {"folder": str(folder), "page": str(path), "records": len(records)}
    print_result(json_output, facts, path)


@app.command(short_help="Compare maps and bank with detection on the crop itself.")
def fidelity(
    folder: Folder,
    source: From = None,
    split: Split = "",
    samples: Annotated[
        int, Option(metavar="N", help="Records to compare, one new crop each.")
    ] = 1000,
    temperature: Temperature = 0.25,
    w_ps: Cell = 8,
    seed: Annotated[int, Option(metavar="N", help="Seed of the crops.")] = 0,
    jobs: Jobs = 0,
    json_output: Json = False,
) -> None:
    """Compare densities read from maps and bank with detection on the crop itself.

    wrong: share of an image's loss weight on the wrong cell. bias: error of the mean weight. Rows:
    the map with corrected weights, as in training, and uncorrected; and as rulers uniform weights,
    detection on the crop moved by 2 px, on the flipped crop, and with torchvision's resize. The
    main figures go into the manifest, examples into FOLDER/fidelity.png.
    """
    records = shards.ShardSet(folder)
    listed = _source_of(records, source, split)
    within("--samples", samples, 1)
    within("--temperature", temperature, 0.001, 1000)
    within("--seed", seed, 0, 2**63 - 1)
    found = preprocess.measure_fidelity(records, listed, samples, temperature, w_ps, seed, jobs)
    sizes = preprocess.storage(records)
    headline = {
        name: {what: errors[what] for what in ("map", "bank") if what in errors}
        for name, errors in found.items()
    }
    facts = {"temperature": temperature, "w_ps": w_ps, "seed": seed, "detectors": headline}
    shards.spec.write(folder, replace(records.manifest, fidelity=facts))
    from shards.html import encoded

    picture = folder / "fidelity.png"
    with waiting("drawing examples"):
        write_atomically(picture, encoded(preprocess.draw_fidelity(records, listed), "png"))
    if json_output:
        print_json({"folder": str(folder), **facts, "detectors": found, "storage": sizes})
        return
    from preprocess.fidelity import table

    print(*table(found), sep="\n")
    kinds = ("frame", "maps", "bank", "weights")
    parts = ", ".join(f"{kind} {sizes[f'{kind}_bytes']:,}" for kind in kinds)
    print(
        f"bytes per image: {parts}; in all {sizes['bytes']:,}, maps and bank add "
        f"{sizes['added']:.1%}"
    )
    say(f"examples: {picture}")


def _source_of(records: "shards.ShardSet", where: str | None, split: str) -> "preprocess.Source":
    """The source named, or the demo's; UserError if there is none to go by."""
    kind = records.manifest.source["kind"]
    if where is None and kind != "demo":
        raise UserError(
            f"{records.folder} does not hold its source; give --source, what it was built from"
        )
    with waiting(f"listing {where or 'demo'}"):
        return preprocess.open_source(where or "demo", split, partial=True)  # as it was when built
