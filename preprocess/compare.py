"""Whether a set that is there is the one that is asked for; if not, what differs, in a line.

In: the facts of both. Out: nothing, or a UserError that names what differs and what to type.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preprocess.defaults import DEFAULTS
from preprocess.errors import BuildError
from preprocess.options import DEFAULTS as OPTIONS
from preprocess.options import OF_FREQUENCY
from shards.errors import UserError
from shards.files import MANIFEST, check_size
from shards.spec import FREQUENCY, INDEX, Manifest, Settings, load
from shards.tar import shard_name
from shards.verification import damaged_files

Facts = dict[str, Any]
PLAIN = ("frame", "quality", "crop", "map_crops", "bank", "grid", "mark", "detect_on", "levels")


def facts_of_set(finished: Manifest) -> Facts:
    """What facts_of said when the finished set was built."""
    return {
        "format_version": finished.format_version,
        "settings": json.loads(json.dumps(asdict(finished.settings))),
        "source": finished.source,
        "versions": finished.versions,
    }


def compare(out: Path, there: Facts, asked: Facts, hint: str = "") -> None:
    """UserError unless all that `asked` says is so `there`, in `out`; it ends in `hint`."""
    changed = [
        line
        for part in ("settings", "source", "versions")
        for name, value in asked[part].items()
        for line in _difference(f"{part}.{name}", there[part].get(name), value)
    ]
    if there["format_version"] != asked["format_version"]:
        versions = there["format_version"], asked["format_version"]
        changed.insert(0, "format_version is {} there, {} here".format(*versions))
    if changed:
        hint = hint or "use the same ones to go on, or name a new folder"
        raise UserError(
            f"{out} holds shards of other inputs or settings: {'; '.join(changed[:3])}; {hint}"
        )


def _difference(name: str, there: Any, here: Any) -> list[str]:
    """Lines for what differs; nothing nested is printed."""
    if there == here:
        return []
    if name == "settings.detectors":
        before, now = ({d["name"]: d["options"] for d in side} for side in (there, here))
        if list(before) != list(now):
            return [f"{name} is {','.join(before)} there, {','.join(now)} here"]
        return [
            f"{detector}.{option} is {before[detector].get(option)} there, {value} here"
            for detector, options in now.items()
            for option, value in options.items()
            if before[detector].get(option) != value
        ]
    if name == "settings.area":
        name, there, here = "settings.area", there[0], here[0]
    if name == "source.sha256":
        return ["source.sha256 differs: files were added, removed or changed"]
    return [f"{name} is {there} there, {here} here"]


def check_manifest_is_not_lost(out: Path) -> None:
    """UserError if `out` holds shards of a set whose manifest is gone."""
    if not (out / MANIFEST).exists() and any((out / n).exists() for n in (INDEX, shard_name(0))):
        raise UserError(
            f"{out} has shards but no {MANIFEST}, without which nobody knows what they hold; "
            "restore that file, or build into a new folder"
        )


def check_reuse(reuse: Path, facts: Facts) -> None:
    """UserError unless the set in `reuse` is sound and has the frames that `facts` ask for."""
    finished = load(reuse)
    if finished.container != "webdataset":
        raise UserError(f"{reuse} is an FFCV set; reuse the WebDataset set it was made from")
    there, asked = facts_of_set(finished), {**facts, "settings": {}, "versions": {}}
    for name in ("frame", "quality"):
        asked["settings"][name] = facts["settings"][name]
    for name in finished.versions:
        asked["versions"][name] = facts["versions"].get(name, finished.versions[name])
    compare(reuse, there, asked)
    damage = damaged_files(reuse, finished)
    if damage:
        raise UserError(damage[0])


def check_files(out: Path, finished: Manifest) -> None:
    """BuildError unless each file of the finished set is there, with its size."""
    for file in [*finished.shards, finished.index, finished.rejected]:
        try:
            check_size(out / file.name, file.bytes)
        except ValueError as error:
            raise BuildError(str(error)) from None


def reuse_hint(out: Path, there: Facts, asked: Facts) -> str:
    """What to type where the frames of the finished set in `out` can be kept; else empty."""
    same = all(there[part] == asked[part] for part in ("source", "format_version"))
    same = same and all(
        there["settings"][name] == asked["settings"][name] for name in ("frame", "quality")
    )
    versions = there["versions"].items()
    if not same or any(asked["versions"].get(name, value) != value for name, value in versions):
        return ""
    names = [[d["name"] for d in facts["settings"]["detectors"]] for facts in (there, asked)]
    added = [name for name in names[1] if name not in names[0]] or ["new"]
    return (
        "keep its frames and maps by building into a new folder: "
        f"kamim shards build SOURCE {out}-{'-'.join(added)} --reuse {out}"
    )


def flags_of(settings: Settings, shard_size: int) -> str:
    """The options of `kamim shards build` that give `settings`, without those that it takes
    unasked; `shard_size` is what it chooses by itself.
    """
    words = [f"--detector {','.join(detector.name for detector in settings.detectors)}"]
    defaults: Mapping[str, Mapping[str, Any]] = {**OPTIONS, FREQUENCY: OF_FREQUENCY}
    for detector in settings.detectors:
        for option, value in detector.options.items():
            if value != defaults[detector.name].get(option):
                words.append(f"--detector-option {detector.name}.{option}={value}")
    for name in PLAIN:
        value = getattr(settings, name)
        if value != getattr(DEFAULTS, name):
            words.append(f"--{name.replace('_', '-')} {value}")
    if settings.area[0] != DEFAULTS.area[0]:
        words.append(f"--area {settings.area[0]}")
    if settings.weights is not None:
        words.append("--weights {},{}".format(*settings.weights))
    if settings.shard_size != shard_size:
        words.append(f"--shard-size {settings.shard_size}")
    return " ".join(words)
