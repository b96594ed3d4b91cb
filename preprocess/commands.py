"""The commands of `kamim shards`: thin wrappers that check words and print results.

In: what a user typed. Out: results on stdout, notes on stderr; ValueError names a bad argument.
"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

import preprocess
import shards
from preprocess.build import shard_size_for
from shards.convert import convert_to_ffcv
from shards.manifest import REJECTED

app = typer.Typer(help="Build, check and look at shards.", no_args_is_help=True)

Mark = Literal["ring", "disc", "point"]
DetectOn = Literal["source", "frame"]
OnError = Literal["quarantine", "fail"]
Level = Literal["structure", "checksum", "decode", "redetect"]

Folder = Annotated[Path, typer.Argument(help="Folder of a finished set of shards.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def build(
    source: Annotated[str, typer.Argument(help="Folder or .tar of class folders, or: demo.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; new, or to be finished.")],
    detector: Annotated[str, typer.Option(help="fast, orb, sift; several by commas.")] = "fast",
    detector_option: Annotated[
        list[str] | None,
        typer.Option(help="OpenCV's option of a detector, as fast.threshold=20. Repeatable."),
    ] = None,
    frame: Annotated[
        int, typer.Option(help="Side of the stored square, px. At least crop / sqrt(area).")
    ] = 256,
    quality: Annotated[int, typer.Option(help="JPEG quality of frames, 1 to 100; 0: raw.")] = 90,
    scales: Annotated[
        str, typer.Option(help="Sides in px to detect at; densities are averaged.")
    ] = "192,208,224",
    grid: Annotated[int, typer.Option(help="Cells a side of a density map.")] = 52,
    mark: Annotated[Mark, typer.Option(help="What a keypoint covers.")] = "ring",
    detect_on: Annotated[
        DetectOn, typer.Option(help="Detect on the source, or on the frame as stored.")
    ] = "source",
    shard_size: Annotated[
        int, typer.Option(help="Inputs a shard; 0: 1000, fewer for small sources.")
    ] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; 0: one a core.")] = 0,
    on_error: Annotated[
        OnError, typer.Option(help="A bad input: list it and go on, or stop.")
    ] = "quarantine",
    max_rejected: Annotated[
        float, typer.Option(help="Share of bad inputs beyond which the exit status is 1.")
    ] = 0.01,
    json_output: Json = False,
) -> None:
    """Write frames and keypoint densities of every image of SOURCE into shards under OUT.

    Stopped or killed, the same command goes on where it was. The bytes written depend on inputs
    and settings only, never on --jobs. EXIF orientation is ignored, as the field's loaders do.
    """
    settings = shards.Settings(
        frame=at_least("--frame", frame, 16),
        quality=between("--quality", quality, 0, 100),
        scales=_scales(scales),
        grid=between("--grid", grid, 1, 255),
        mark=mark,
        detect_on=detect_on,
        detectors=_detectors(detector, detector_option or []),
        shard_size=at_least("--shard-size", shard_size, 0),
    )
    at_least("--jobs", jobs, 0)
    between("--max-rejected", max_rejected, 0, 1)
    listed = preprocess.open_source(source)
    if not shard_size:
        settings = replace(settings, shard_size=shard_size_for(len(listed.entries)))
    if listed.ignored:
        say(f"{listed.ignored} files are not named as images and were ignored")
    manifest = preprocess.build_shards(listed, out, settings, jobs, on_error, max_rejected)
    ledger = manifest.ledger
    if json_output:
        print_json({"out": str(out), "fingerprint": manifest.fingerprint, **asdict(ledger)})
        return
    rejected = "".join(f", {n} {reason}" for reason, n in ledger.rejected.items())
    print(
        f"{out}: {ledger.inputs} inputs = {ledger.written} written + "
        f"{ledger.inputs - ledger.written} rejected{rejected}; {len(manifest.shards)} shards, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB"
    )
    if ledger.rejected:
        say(f"the rejected inputs and their reasons are in {out / REJECTED}")


@app.command()
def verify(
    folder: Folder,
    level: Annotated[
        Level, typer.Option(help="How deep; each level includes those before it.")
    ] = "checksum",
    source: Annotated[
        str | None, typer.Option(help="The source they were built from, for redetect.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Records that redetect compares.")] = 64,
    json_output: Json = False,
) -> None:
    """Check a finished set of shards; exit status 1 if anything is wrong.

    structure: manifest, ledger, sizes, index against tar headers. checksum: sha256 of every file.
    decode: every record. redetect: compute a sample's maps again and compare them bit for bit.
    """
    redetect = level == "redetect"
    problems = shards.verify_shards(folder, shards.LEVELS[-1] if redetect else level)
    if redetect and not problems:
        records = shards.ShardSet(folder)
        if records.manifest.container != "webdataset":
            raise ValueError(f"{folder} holds no source names; redetect the set it was made from")
        where = source or ("demo" if records.manifest.source["kind"] == "demo" else None)
        listed = preprocess.open_source(where) if where else None
        problems = preprocess.redetect_maps(records, listed, at_least("--samples", samples, 1))
    if json_output:
        print_json({"folder": str(folder), "level": level, "problems": problems})
    elif not problems:
        count = shards.load(folder).count
        print(f"{folder}: {count} records are sound at level {level}")
    for problem in [] if json_output else problems[:20]:
        print(problem)
    if problems:
        raise preprocess.BuildError(f"{len(problems)} problems at level {level} in {folder}")


@app.command()
def inspect(
    folder: Folder,
    page: Annotated[
        Path | None, typer.Option(help="Where to write the page; FOLDER/inspect.html by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Frames to show.")] = 24,
    temperature: Annotated[float, typer.Option(help="T of the weights.")] = 0.25,
    w_ps: Annotated[int, typer.Option(help="Side of a weight cell of a 192-px crop, px.")] = 8,
) -> None:
    """Write one HTML page: frames with their heat maps, weight histograms and the ledger."""
    records = shards.ShardSet(folder)
    text = shards.inspect_page(records, temperature, w_ps, at_least("--samples", samples, 1))
    path = page or folder / "inspect.html"
    path.write_text(text, encoding="utf-8")
    print(path)


@app.command()
def convert(
    folder: Folder,
    to: Annotated[Literal["ffcv"], typer.Option(help="The container to write.")] = "ffcv",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the set; FOLDER-ffcv or FOLDER-ffcv-raw.")
    ] = None,
    frames: Annotated[
        Literal["jpeg", "raw"], typer.Option(help="Copy the JPEG bytes, or store pixels.")
    ] = "jpeg",
) -> None:
    """Write a finished WebDataset set as an FFCV set, and verify it record by record.

    Needs no FFCV; training on the result does.
    """
    suffix = f"-{to}" + ("-raw" if frames == "raw" else "")
    target = out or folder.with_name(folder.name + suffix)
    manifest = convert_to_ffcv(folder, target, frames)
    print(f"{target}: {manifest.count} records, {manifest.shards[0].bytes / 1e6:.1f} MB")


def _detectors(names: str, assignments: list[str]) -> tuple[shards.Detector, ...]:
    """Detectors from `fast,orb` and `fast.threshold=20`. Raises ValueError, saying what is."""
    options: dict[str, dict[str, str]] = {name.strip(): {} for name in names.split(",")}
    if len(options) != len(names.split(",")):
        raise ValueError(f"--detector {names} names a detector twice")
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        name, dot, option = target.partition(".")
        if not equals or not dot or name not in options:
            raise ValueError(
                f"--detector-option {assignment!r} is not DETECTOR.OPTION=VALUE for one of {names}"
            )
        options[name][option] = text
    return tuple(preprocess.detector_settings(name, chosen) for name, chosen in options.items())


def _scales(text: str) -> tuple[int, ...]:
    try:
        scales = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--scales {text!r} is not a list of whole numbers like 192,208") from None
    for scale in scales:
        between("--scales", scale, 16, 4096)
    return scales


def at_least(option: str, value: int, least: int) -> int:
    """`value`, or ValueError if it is below `least`."""
    if value < least:
        raise ValueError(f"{option} {value} is too small; give at least {least}")
    return value


def between(option: str, value: float, least: float, most: float) -> int:
    """`value`, or ValueError if it is not a number from `least` to `most`."""
    if not least <= value <= most:
        raise ValueError(f"{option} {value} is out of range; give {least} to {most}")
    return int(value)


def print_json(result: object) -> None:
    """`result` on stdout for machines."""
    print(json.dumps(result, indent=2, sort_keys=True))


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr)
