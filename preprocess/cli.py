"""`kamim shards`: build, and the commands on finished sets. Words are checked before any library is
imported; results go to stdout, notes to stderr.
"""

import json
import math
import shlex
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer import Option

import preprocess
import shards
from preprocess import BuildError
from preprocess.detectors import check_detector
from preprocess.options import (
    DEFAULTS,
    Area,
    Built,
    Cell,
    Crop,
    DetectorOptions,
    Detectors,
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
from shards.progress import waiting
from shards.spec import REJECTED, Settings

DOORS = "kamim shards build", "kamim maps build"  # of frames with densities, of these alone

app = typer.Typer(help="Build, check and look at shards.", no_args_is_help=True)
Number = TypeVar("Number", int, float)


@app.command()
def build(
    source: Built,
    out: Out,
    split: Split = "",
    detector: Detectors = "fast",
    detector_option: DetectorOptions = None,
    edge_rule: EdgeRules = None,
    frame: Annotated[
        int, Option(help="Side of the stored square, px; best at least crop / sqrt(area).")
    ] = DEFAULTS.frame,
    quality: Annotated[
        int, Option(help="JPEG quality of frames, 1 to 100; 0: raw pixels.")
    ] = DEFAULTS.quality,
    crop: Crop = DEFAULTS.crop,
    area: Area = DEFAULTS.area[0],
    map_crops: MapCrops = DEFAULTS.map_crops,
    bank: Annotated[
        int, Option(help="Crops stored per image, with their exact densities.")
    ] = DEFAULTS.bank,
    weights: Annotated[
        str,
        Option(help="T,w_ps: store loss weights too, of the bank's crops, or of the whole frame."),
    ] = "",
    grid: Grid = DEFAULTS.grid,
    mark: Mark = "ring",
    detect_on: Annotated[
        Literal["source", "frame"], Option(help="Detect on the source, or on the stored frame.")
    ] = "source",
    levels: Annotated[
        int, Option(help="Levels of density: 256, or 16 to repair an upgraded set.")
    ] = DEFAULTS.levels,
    shard_size: ShardSize = DEFAULTS.shard_size,
    jobs: Jobs = 0,
    backend: Engine = "loky",
    scheduler: Scheduler = "",
    on_error: OnError = "quarantine",
    max_rejected: MaxRejected = 0.01,
    reuse: Reuse = None,
    repair: Repair = False,
    partial: Partial = False,
    json_output: Json = False,
) -> None:
    """Write frames and keypoint densities of every image of SOURCE into shards under OUT.

    Stopped or killed, the same command goes on where it was. On a finished set it checks that each
    file is there with its size; --repair hashes them, too. The bytes written depend on inputs and
    settings only, never on --jobs or --backend. EXIF orientation is ignored, as the field's
    loaders do.
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
        detectors=detectors_of(detector, detector_option, edge_rule),
        shard_size=shard_size,
        weights=_weights(weights),
        levels=levels,
    )
    how = jobs, on_error, max_rejected, reuse, backend, scheduler
    run_build(source, split, partial, out, settings, how, repair, json_output)


def settings_of(**options: Any) -> Settings:
    """Settings from options. Raises UserError, calling a field as its option is called."""
    try:
        return Settings(**options)
    except UserError as error:
        name, _, rule = str(error).partition(" ")
        if name not in {field.name for field in fields(Settings)}:
            raise
        raise UserError(f"--{name.replace('_', '-')} {rule}") from None


def run_build(
    source: str,
    split: str,
    partial: bool,
    out: Path,
    settings: Settings,
    how: tuple[int, str, float, Path | None, str, str],
    repair: bool,
    json_output: bool,
) -> None:
    """Build or repair as asked, and say what came of it; `how` are build_shards' arguments."""
    jobs, _, max_rejected, reuse, backend, scheduler = how
    within("--jobs", jobs, 0)
    within("--max-rejected", max_rejected, 0, 1)
    if repair and reuse:
        raise UserError("--repair builds from the source itself; leave --reuse out")
    from preprocess import compare, executors
    from preprocess.building import shard_size_for
    from preprocess.repair import repair_shards

    for each in settings.detectors:
        check_detector(each)
    executors.check(backend, scheduler)  # listing a large source takes a while
    _warn(settings, jobs, scheduler, source)
    with waiting(f"listing {source}"):
        listed = preprocess.open_source(source, split, partial)
    _say_what_is_listed(listed)
    try:
        if repair:
            mended = repair_shards(listed, out, settings, jobs, backend, scheduler)
            more = f" and {len(mended) - 5} more" if len(mended) > 5 else ""
            names = ", ".join(mended[:5])
            say(f"{out}: " + (f"repaired {names}{more}" if mended else "nothing to repair"))
        manifest = preprocess.build_shards(listed, out, settings, *how)
    except (UserError, BuildError) as error:
        if " SOURCE " not in str(error):
            raise
        # What it says to type can be typed.
        words = f" {shlex.quote(source)}{f' --split {split}' if split else ''} "
        size = shard_size_for(len(listed.entries), settings.frame > 0)
        words += f"{compare.flags_of(settings, size)} "
        text = str(error).replace(" SOURCE ", words)
        raise type(error)(text if settings.frame else text.replace(*DOORS)) from None
    ledger = manifest.ledger
    if json_output:
        facts = {"out": str(out), "fingerprint": manifest.fingerprint}
        print_json({**facts, **asdict(ledger)})
        return
    rejected = "".join(f", {n} {reason}" for reason, n in ledger.rejected.items())
    print(
        f"{out}: {ledger.inputs} inputs = {ledger.written} written + "
        f"{ledger.inputs - ledger.written} rejected{rejected}; {len(manifest.shards)} shards, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB"
    )
    if ledger.rejected:
        say(f"the rejected inputs and their reasons are in {out / REJECTED}")


def _weights(text: str) -> tuple[float, int] | None:
    """(T, w_ps) of `0.25,8`, or None of nothing. Raises UserError, saying what is meant."""
    if not text:
        return None
    try:
        temperature, w_ps = text.split(",")
        return float(temperature), int(w_ps)
    except ValueError:
        raise UserError(f"--weights {text} is not T,w_ps; give it as 0.25,8") from None


def _warn(settings: Settings, jobs: int, scheduler: str, source: str) -> None:
    """Say what will work less well than it seems."""
    import joblib

    from shards.crops import RINGS

    for each in settings.detectors:
        if each.has_keypoints and each.name not in RINGS and not each.edge:
            call = f"{each.name}={each.plugin.function}" if each.plugin else each.name
            say(
                f"{each.name} has no edge rule: its map is read as if it found as much near a "
                f"crop's edge; measure one by kamim shards edge-rule {call} {shlex.quote(source)}"
            )

    least = math.ceil(settings.crop / math.sqrt(settings.area[0]))
    if 0 < settings.frame < least:
        say(
            f"--frame {settings.frame} is small for --crop {settings.crop} and --area "
            f"{settings.area[0]}: crops will be enlarged; give --frame {least} or more"
        )
    if jobs > joblib.cpu_count() and not scheduler:
        cores = joblib.cpu_count()
        say(f"--jobs {jobs} on {cores} cores is not faster than --jobs {cores}, and needs memory")


def _say_what_is_listed(listed: "preprocess.Source") -> None:
    if listed.ignored:
        say(f"{listed.ignored} files are not named as images and were ignored")
    if listed.sets:
        say(f"{len(listed.sets)} folders of finished shards were left out, as {listed.sets[0]}")
    unlabelled = sum(entry.label < 0 for entry in listed.entries)
    if unlabelled:
        say(f"{unlabelled} of {len(listed.entries)} images have no label")


@app.command()
def verify(
    folder: Folder,
    level: Annotated[
        Literal["structure", "checksum", "decode", "redetect"],
        Option(help="How deep; each level includes those before it."),
    ] = "checksum",
    source: From = None,
    split: Split = "",
    samples: Annotated[int, Option(help="Records that redetect compares.")] = 64,
    json_output: Json = False,
) -> None:
    """Check a finished set of shards; exit status 1 if anything is wrong.

    structure: manifest, ledger, sizes, index against tar headers. checksum: sha256 of every file.
    decode: every record. redetect: compute a sample's maps again and compare them bit for bit.
    """
    within("--samples", samples, 1)
    if not folder.exists():
        raise UserError(
            f"there is no {folder} to verify; build it first: kamim shards build SOURCE {folder}"
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
    if json_output:
        print_json({"folder": str(folder), "level": level, "problems": problems})
    else:
        sound = f"{folder}: {{}} records are sound at level {level}"
        lines = problems[:20] or [sound.format(shards.load(folder).count)]
        print("\n".join(lines))
    if problems:
        number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        mend = "" if deep else _mend(folder, problems)
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


@app.command()
def inspect(
    folder: Folder,
    page: Annotated[
        Path | None, Option(help="File to write; FOLDER/inspect.html by default.")
    ] = None,
    samples: Annotated[int, Option(help="Frames to show.")] = 24,
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
    if json_output:
        print_json({"folder": str(folder), "page": str(path), "records": len(records)})
    else:
        print(path)


@app.command()
def fidelity(
    folder: Folder,
    source: From = None,
    split: Split = "",
    samples: Annotated[int, Option(help="Records to compare, one new crop each.")] = 1000,
    temperature: Temperature = 0.25,
    w_ps: Cell = 8,
    seed: Annotated[int, Option(help="Seed of the crops.")] = 0,
    jobs: Jobs = 0,
    json_output: Json = False,
) -> None:
    """Measure densities read off maps and bank against detection on the crop itself.

    wrong is the share of an image's loss weight on the wrong cell, bias that of the mean weight; of
    the map as training corrects its weights, and uncorrected. Beside them stand rulers:
    weights that ignore the image, detection on a crop 2 px aside or flipped, and torchvision's
    resize. The headline goes into the manifest, examples into FOLDER/fidelity.png.
    """
    records = shards.ShardSet(folder)
    listed = _source_of(records, source, split)
    within("--samples", samples, 1)
    within("--temperature", temperature, 0.001, 1000)
    found = preprocess.measure_fidelity(records, listed, samples, temperature, w_ps, seed, jobs)
    sizes = preprocess.storage(records)
    headline = {
        name: {what: errors[what] for what in ("map", "bank") if what in errors}
        for name, errors in found.items()
    }
    facts = {"temperature": temperature, "w_ps": w_ps, "seed": seed, "detectors": headline}
    shards.spec.write(folder, replace(records.manifest, fidelity=facts))
    picture = folder / "fidelity.png"
    with waiting("drawing examples"):
        preprocess.write_picture(picture, preprocess.draw_fidelity(records, listed))
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


def within(option: str, value: Number, least: float, most: float = math.inf) -> Number:
    """`value`, or UserError if it is not a number from `least` to `most`."""
    if not least <= value <= most:
        give = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise UserError(f"{option} {value} is out of range; give {give}")
    return value


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2, sort_keys=True))


def say(line: str) -> None:
    print(line, file=sys.stderr)
