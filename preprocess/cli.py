"""`kamim shards build`, a thin wrapper that checks words and prints the result.

In: what a user typed. Out: results on stdout, notes on stderr; UserError names a bad argument.
"""

import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

import preprocess
from preprocess.defaults import DATASETS, DEFAULTS, Backend
from preprocess.options import parsed_detector
from preprocess.words import Json, at_least, between, print_json, say
from shards.errors import UserError
from shards.progress import waiting
from shards.spec import BANK_CELL, LARGEST, REJECTED, Detector, Manifest, Settings

app = typer.Typer(help="Build, check and look at shards.", no_args_is_help=True)

Mark = Literal["ring", "disc", "point"]
DetectOn = Literal["source", "frame"]
OnError = Literal["quarantine", "fail"]


@app.command()
def build(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or .tar of class folders, by path or URL, or a dataset as NAME or "
            f"NAME:PATH: {', '.join(DATASETS)}."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the shards; new, or to be finished.")],
    split: Annotated[
        str, typer.Option(help="Of a dataset: train, val, test, ...; its training set by default.")
    ] = "",
    detector: Annotated[
        str,
        typer.Option(
            help="fast, orb, sift, frequency; several by commas. frequency is a map of low "
            "frequencies by FFT, of our own design, to draw FAMT's masks by; it has no keypoints."
        ),
    ] = "fast",
    detector_option: Annotated[
        list[str] | None,
        typer.Option(help="OpenCV's option of a detector, as fast.threshold=20. Repeatable."),
    ] = None,
    frame: Annotated[
        int,
        typer.Option(help="Side of the stored square, px. Best at least crop / sqrt(area)."),
    ] = DEFAULTS.frame,
    quality: Annotated[
        int, typer.Option(help="JPEG quality of frames, 1 to 100; 0: raw.")
    ] = DEFAULTS.quality,
    crop: Annotated[
        int, typer.Option(help="Side of the training crops that densities are for, px.")
    ] = DEFAULTS.crop,
    area: Annotated[
        float, typer.Option(help="Least share of the source that such a crop shows.")
    ] = DEFAULTS.area[0],
    map_crops: Annotated[
        int, typer.Option(help="Random crops that a map averages over, besides the whole image.")
    ] = DEFAULTS.map_crops,
    bank: Annotated[
        int, typer.Option(help="Crops stored per image, with their exact densities.")
    ] = DEFAULTS.bank,
    weights: Annotated[
        str,
        typer.Option(
            help="T,w_ps: store the loss weights too, of the bank's crops, or of the whole frame."
        ),
    ] = "",
    grid: Annotated[int, typer.Option(help="Cells along a side of a density map.")] = DEFAULTS.grid,
    mark: Annotated[Mark, typer.Option(help="What a keypoint covers.")] = "ring",
    detect_on: Annotated[
        DetectOn, typer.Option(help="Detect on the source, or on the frame as stored.")
    ] = "source",
    levels: Annotated[
        int, typer.Option(help="Densities told apart: 256, or 16 to repair what was upgraded.")
    ] = DEFAULTS.levels,
    shard_size: Annotated[
        int, typer.Option(help="Inputs per shard; 0: 1000, fewer for small sources.")
    ] = DEFAULTS.shard_size,
    jobs: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
    backend: Annotated[Backend, typer.Option(help="What runs the processes.")] = "loky",
    scheduler: Annotated[
        str,
        typer.Option(
            help="HOST:PORT of a Dask or Ray cluster that sees SOURCE and OUT; none: here."
        ),
    ] = "",
    on_error: Annotated[
        OnError, typer.Option(help="A bad input: list it and go on, or stop.")
    ] = "quarantine",
    max_rejected: Annotated[
        float, typer.Option(help="Share of bad inputs beyond which the exit status is 1.")
    ] = 0.01,
    reuse: Annotated[
        Path | None,
        typer.Option(help="A finished set of this source, to copy frames and equal maps from."),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Hash a finished set, build again what is damaged.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take a named dataset that is not all there.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Write frames and keypoint densities of every image of SOURCE into shards under OUT.

    Stopped or killed, the same command goes on where it was. On a finished set it checks that each
    file is there with its size; --repair hashes them, too. The bytes written depend on inputs and
    settings only, never on --jobs or --backend. EXIF orientation is ignored, as the field's
    loaders do.
    """
    settings = Settings(
        frame=between("--frame", frame, 16, LARGEST),
        quality=between("--quality", quality, 0, 100),
        crop=_crop(crop),
        area=(between("--area", area, 0.01, 1), DEFAULTS.area[1]),
        map_crops=between("--map-crops", map_crops, 0, 64),
        bank=between("--bank", bank, 0, 255),
        grid=between("--grid", grid, 2, 254),
        mark=mark,
        detect_on=detect_on,
        detectors=_detectors(detector, detector_option or []),
        shard_size=at_least("--shard-size", shard_size, 0),
        weights=_weights(weights),
        levels=levels,
    )
    at_least("--jobs", jobs, 0)
    between("--max-rejected", max_rejected, 0, 1)
    if repair and reuse:
        raise UserError("--repair builds from the source itself; leave --reuse out")
    from preprocess import compare, detectors
    from preprocess import executors as backends
    from preprocess import repair as repairs
    from preprocess.building import shard_size_for

    for each in settings.detectors:
        detectors.check_detector(each)
    backends.check(backend, scheduler)  # listing a large source takes a while
    _warn(settings, jobs, scheduler)
    with waiting(f"listing {source}"):
        listed = preprocess.open_source(source, split, partial)
    chosen = shard_size_for(len(listed.entries))
    settings = settings if shard_size else replace(settings, shard_size=chosen)
    _say_what_is_listed(listed)
    try:
        if repair:
            mended = repairs.repair_shards(listed, out, settings, jobs, backend, scheduler)
            more = f" and {len(mended) - 5} more" if len(mended) > 5 else ""
            names = ", ".join(mended[:5])
            say(f"{out}: " + (f"repaired {names}{more}" if mended else "nothing to repair"))
        manifest = preprocess.build_shards(
            listed, out, settings, jobs, on_error, max_rejected, reuse, backend, scheduler
        )
    except (ValueError, preprocess.BuildError) as error:
        if " SOURCE " not in str(error):
            raise
        # What it says to type can be typed.
        words = f" {shlex.quote(source)}{f' --split {split}' if split else ''} "
        words += f"{compare.flags_of(settings, chosen)} "
        raise type(error)(str(error).replace(" SOURCE ", words)) from None
    if json_output:
        facts = {"out": str(out), "fingerprint": manifest.fingerprint}
        print_json({**facts, **asdict(manifest.ledger)})
    else:
        _print(out, manifest)


def _warn(settings: Settings, jobs: int, scheduler: str) -> None:
    """Say what will work less well than it seems."""
    import joblib

    least = math.ceil(settings.crop / math.sqrt(settings.area[0]))
    if settings.frame < least:
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


def _print(out: Path, manifest: Manifest) -> None:
    ledger = manifest.ledger
    rejected = "".join(f", {n} {reason}" for reason, n in ledger.rejected.items())
    print(
        f"{out}: {ledger.inputs} inputs = {ledger.written} written + "
        f"{ledger.inputs - ledger.written} rejected{rejected}; {len(manifest.shards)} shards, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB"
    )
    if ledger.rejected:
        say(f"the rejected inputs and their reasons are in {out / REJECTED}")


def _detectors(names: str, assignments: list[str]) -> tuple[Detector, ...]:
    """Detectors from `fast,orb` and `fast.threshold=20`. Raises UserError, saying what is."""
    options: dict[str, dict[str, str]] = {name.strip(): {} for name in names.split(",")}
    if len(options) != len(names.split(",")):
        raise UserError(f"--detector {names} names a detector twice")
    for assignment in assignments:
        target, equals, text = assignment.partition("=")
        name, dot, option = target.partition(".")
        if not equals or not dot or name not in options:
            raise UserError(
                f"--detector-option {assignment!r} is not DETECTOR.OPTION=VALUE for one of {names}"
            )
        options[name][option] = text
    return tuple(parsed_detector(name, chosen) for name, chosen in options.items())


def _weights(text: str) -> tuple[float, int] | None:
    """(T, w_ps) of `0.25,8`, or None of nothing. Raises UserError, saying what is meant."""
    if not text:
        return None
    try:
        temperature, w_ps = text.split(",")
        return float(temperature), int(w_ps)
    except ValueError:
        raise UserError(f"--weights {text} is not T,w_ps; give it as 0.25,8") from None


def _crop(side: int) -> int:
    if side % BANK_CELL:
        nearest = max(BANK_CELL, round(side / BANK_CELL) * BANK_CELL)
        raise UserError(f"--crop {side} is no multiple of {BANK_CELL}; give {nearest}")
    return between("--crop", side, 32, 1024)
