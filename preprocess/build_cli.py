"""Shared by the commands that build: settings, the build, and its report."""

import json
import math
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import preprocess
from preprocess import BuildError
from preprocess.detectors import check_detector
from shards.errors import UserError
from shards.files import MANIFEST
from shards.progress import counted, waiting
from shards.remote.place import Place
from shards.spec import REJECTED, Ledger, Manifest, Settings

DOORS = "kamim shards build", "kamim maps build"  # of frames with densities, of these alone
Number = TypeVar("Number", int, float)


def settings_of(**options: Any) -> Settings:
    """Settings from options. A UserError calls a field as its option is called."""
    try:
        return Settings(**options)
    except UserError as error:
        name, _, rule = str(error).partition(" ")
        if name not in {field.name for field in fields(Settings)}:
            raise
        raise UserError(f"--{name.replace('_', '-')} {rule}") from None


def allow_seconds(seconds: float) -> None:
    """Set how long a plug-in may look at an image."""
    within("--detector-seconds", seconds, 0)
    from preprocess.isolation import allow

    allow(seconds)


def run_build(
    source: str,
    split: str,
    partial: bool,
    out: str,
    settings: Settings,
    how: tuple[int, str, float, Path | None, str, str],
    part: str,
    repair: bool,
    json_output: bool,
) -> None:
    """Build or repair as asked, and say what came of it. `how` are the other arguments of
    build_shards.
    """
    jobs, _, max_rejected, reuse, backend, scheduler = how
    within("--jobs", jobs, 0)
    within("--max-rejected", max_rejected, 0, 1)
    if repair and reuse:
        raise UserError("--repair builds from the source itself; leave --reuse out")
    if repair and part:
        raise UserError("--repair works on the whole set, which is finished; leave --part out")
    from preprocess import compare, executors, parts
    from preprocess.building import shard_size_for
    from preprocess.repair import repair_shards

    place, ith = Place.of(out), parts.parse_part(part) if part else None
    for each in settings.detectors:
        check_detector(each)
    if settings.levels < Settings().levels and not (reuse or place.read(MANIFEST)):
        raise UserError(
            f"--levels {settings.levels} is for upgraded sets, to repair or to --reuse; leave it "
            "out for a new set"
        )
    executors.check(backend, scheduler)  # listing a large source takes a while
    _warn(settings, jobs, scheduler, source, split)
    with waiting(f"listing {source}"):
        listed = preprocess.open_source(source, split, partial)
    _say_what_is_listed(listed)
    try:
        if repair:
            mended = repair_shards(listed, place.where, settings, jobs, backend, scheduler)
            more = f" and {len(mended) - 5} more" if len(mended) > 5 else ""
            names = ", ".join(mended[:5])
            say(f"{place}: " + (f"repaired {names}{more}" if mended else "nothing to repair"))
        if ith:
            ledger = parts.build_part(listed, place.where, settings, ith, *how)
        else:
            manifest = preprocess.build_shards(listed, place.where, settings, *how)
    except (UserError, BuildError) as error:
        if " SOURCE " not in str(error):
            raise
        # What it says to type can be typed.
        words = f" {_typed(source, split)} "
        size = shard_size_for(len(listed.entries), settings.frame > 0)
        words += f"{compare.flags_of(settings, size)} "
        text = str(error).replace(" SOURCE ", words)
        raise type(error)(text if settings.frame else text.replace(*DOORS)) from None
    if not ith:
        print_set(place, manifest, json_output)
    elif json_output:
        print_json({"out": str(place), "part": part, **(asdict(ledger) if ledger else {})})
    elif ledger:
        join = f"kamim shards join {shlex.quote(str(place))}"
        print(f"{place}, part {part}: {_counts(ledger)}; then, of all: {join}")
    else:
        print(f"{place}, part {part}: the whole set is finished")


def print_set(place: Place, manifest: Manifest, json_output: bool) -> None:
    """Say what a build, or the joining of its parts, came to."""
    ledger = manifest.ledger
    if json_output:
        facts = {"out": str(place), "fingerprint": manifest.fingerprint}
        print_json({**facts, **asdict(ledger)})
        return
    print(
        f"{place}: {_counts(ledger)}; {counted(len(manifest.shards), 'shard')}, "
        f"{sum(shard.bytes for shard in manifest.shards) / 1e6:.1f} MB"
    )
    if ledger.rejected:
        say(f"the rejected inputs and their reasons are in {place}/{REJECTED}")


def _counts(ledger: Ledger) -> str:
    rejected = "".join(f", {n} {reason}" for reason, n in ledger.rejected.items())
    refused = ledger.inputs - ledger.written
    inputs = counted(ledger.inputs, "input")
    return f"{inputs} = {ledger.written:,} written + {refused:,} rejected{rejected}"


def weights_of(text: str) -> tuple[float, int] | None:
    """(T, w_ps) of `0.25,8`, or None of nothing. Raises UserError, saying what is meant."""
    if not text:
        return None
    try:
        temperature, w_ps = text.split(",")
        return float(temperature), int(w_ps)
    except ValueError:
        raise UserError(f"--weights {text} is not T,w_ps; give it as 0.25,8") from None


def _typed(source: str, split: str) -> str:
    """Source and split as a person types them."""
    return shlex.quote(source) + (f" --split {shlex.quote(split)}" if split else "")


def _warn(settings: Settings, jobs: int, scheduler: str, source: str, split: str) -> None:
    """Warn of what will work less well than one may expect."""
    import joblib

    from preprocess.edges import measuring
    from shards.crops import RINGS

    for each in settings.detectors:
        if each.has_keypoints and each.name not in RINGS and not each.edge:
            say(
                f"{each.name} has no edge rule: its map is read as if it found as much near a "
                "crop's edge; measure one by "
                f"{measuring(each, settings.mark, _typed(source, split))}"
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
        say(f"{counted(listed.ignored, 'file')} not named as images: ignored")
    if listed.sets:
        say(f"{counted(len(listed.sets), 'folder')} of finished shards left out: {listed.sets[0]}")
    unlabelled = sum(entry.label < 0 for entry in listed.entries)
    if unlabelled:
        say(f"{unlabelled} of {len(listed.entries)} images have no label")


def within(option: str, value: Number, least: float, most: float = math.inf) -> Number:
    """`value`, or UserError if it is not a number from `least` to `most`."""
    if not least <= value <= most:
        give = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise UserError(f"{option} {value} is out of range; give {give}")
    return value


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2, sort_keys=True))


def print_result(as_json: bool, result: dict[str, Any], line: object) -> None:
    """The result as JSON, or in a `line` for a person."""
    print_json(result) if as_json else print(line)


def say(line: str) -> None:
    print(line, file=sys.stderr)
