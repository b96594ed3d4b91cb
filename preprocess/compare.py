"""Whether the existing set is the requested one. If not, one line says what differs and what to
type.
"""

import json
import shlex
from collections.abc import Collection
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from preprocess import BuildError
from preprocess.detectors import option_flags
from preprocess.shard import FACTS, library_versions
from preprocess.source import Source
from shards.errors import UserError
from shards.files import MANIFEST, check_size
from shards.progress import waiting
from shards.remote.place import Place
from shards.spec import (
    EXTRAS,
    FORMAT_VERSION,
    INDEX,
    Manifest,
    Plugin,
    Settings,
    fingerprint,
    load,
    parse,
    settings_of,
)
from shards.spec import plain as as_plain
from shards.tar import shard_name
from shards.verification import damaged_files

Facts = dict[str, Any]
WORK = ".build"
PLUGIN = tuple(field.name for field in fields(Plugin))
PLAIN = ("frame", "quality", "crop", "map_crops", "bank", "grid", "mark", "detect_on", "levels")


def facts_of(source: Source, settings: Settings) -> Facts:
    """All that a record's bytes depend on. A build goes on only if all of it is equal."""
    with waiting(f"hashing the list of {len(source.entries)} inputs"):
        described = source.description()
    return _facts(FORMAT_VERSION, settings, described, library_versions(settings))


def facts_of_set(finished: Manifest) -> Facts:
    """What facts_of said when the finished set was built."""
    facts = finished.format_version, finished.settings, finished.source, finished.versions
    return _facts(*facts)


def _facts(version: int, settings: Settings, source: Facts, versions: Facts) -> Facts:
    plain: Facts = json.loads(json.dumps(as_plain(settings)))  # as it will be read back
    return {"format_version": version, "settings": plain, "source": source, "versions": versions}


def check_folder(out: Place, facts: Facts) -> Manifest | None:
    """The finished set in `out` if it is this one; None if `out` is ours to write. Raises UserError
    otherwise.
    """
    if not out.is_url and out.folder.exists() and not out.folder.is_dir():
        raise UserError(f"{out} is a file; name a folder for the shards")
    names = set(out.sizes())
    if MANIFEST in names:
        finished = parse(f"{out}/{MANIFEST}", out.read(MANIFEST) or b"")
        there = facts_of_set(finished)
        compare(out, there, facts, reuse_hint(out, there, facts))
        if finished.container == "ffcv":
            raise UserError(f"{out} is an FFCV set, and complete; name a new folder for shards")
        check_files(out, finished)
        return finished
    begun = facts_begun(out)
    if begun:
        compare(out, begun, facts)
        return None
    check_manifest_is_not_lost(out, names)
    if names - {WORK} - EXTRAS:
        some = ", ".join(sorted(names - {WORK} - EXTRAS)[:3])
        raise UserError(f"{out} holds other files ({some}); name a new or empty folder")
    return None


def check_classes(out: Place, finished: Manifest, source: Source) -> None:
    """UserError unless `source` calls its classes as the finished set in `out` does."""
    there, here = finished.classes, source.classes
    if there != here:
        pairs = zip(there, here, strict=False)
        changed = next((f"{a!r} there, {b!r} here" for a, b in pairs if a != b), "")
        which = changed or f"{len(there)} there, {len(here)} here"
        raise UserError(
            f"{out} holds shards of the same inputs with other names of classes: {which}; build "
            "into a new folder"
        )


def facts_begun(out: Place) -> Facts | None:
    """The facts of the unfinished build in `out`, if there is one. UserError if they are not such
    as a build writes.
    """
    work = out / WORK
    for name in (FACTS, "plan.json"):  # as it was called before
        facts: Any = None
        with suppress(ValueError, TypeError):  # half of it, or nothing, is there
            facts = json.loads(work.read(name))  # type: ignore[arg-type]
        if facts is not None:
            if not _are_facts(facts):
                raise UserError(f"{work}/{name} is damaged; remove {work} to begin the build anew")
            return dict(facts)
    return None


def _are_facts(facts: Any) -> bool:
    try:
        versions, source = facts["versions"].keys(), facts["source"].keys()
        if facts["format_version"] != FORMAT_VERSION:  # whose settings only its own kamim knows
            return bool(versions and source and facts["settings"].keys())
        settings = settings_of(facts["settings"])
        return facts["source"]["inputs"] > 0 and settings.shard_size > 0
    except (TypeError, KeyError, ValueError, AttributeError):
        return False


def compare(out: Path | Place, there: Facts, asked: Facts, hint: str = "") -> None:
    """Raise UserError unless `there`, the facts of `out`, agree with all that is `asked`; its line
    ends in `hint`.
    """
    changed = [
        line
        for part in ("settings", "source", "versions")
        for name, value in asked[part].items()
        for line in _difference(f"{part}.{name}", there[part].get(name), value)
    ]
    versions = there["format_version"], asked["format_version"]
    if versions[0] != versions[1]:
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
        before, now = ({d["name"]: _facts_of_detector(d) for d in side} for side in (there, here))
        if list(before) != list(now):
            return [f"{name} is {','.join(before)} there, {','.join(now)} here"]
        return [
            f"{detector}.{option} is {before[detector].get(option)} there, {value} here"
            for detector, options in now.items()
            for option, value in options.items()
            if before[detector].get(option) != value
        ]
    if name == "source.sha256":
        what = "files were added, removed or changed, or an older kamim listed them"
        return [f"source.sha256 differs: {what}"]
    if name == "settings.area":
        there, here = there[0], here[0]
    return [f"{name} is {there} there, {here} here"]


def _facts_of_detector(row: Facts) -> Facts:
    """Options, plug-in and edge rule of a detector, each as one line can say it."""
    edge = row.get("edge") and f"of {row['edge']['photos']} photos, {fingerprint(row['edge'])[:8]}"
    return {**row["options"], "edge": edge} | row.get("plugin", dict.fromkeys(PLUGIN))


def check_manifest_is_not_lost(out: Place, names: Collection[str]) -> None:
    """Raise UserError if `out`, which holds `names`, has shards but its manifest is gone."""
    if MANIFEST not in names and {INDEX, shard_name(0), "shard-000000.npy"} & set(names):
        raise UserError(
            f"{out} has shards but no {MANIFEST}, without which nobody knows what they hold; "
            "restore that file, or build into a new folder"
        )


def _frames(facts: Facts) -> Facts:
    """The part of `facts` that frames depend on, beside the versions; none if there are none."""
    if facts["settings"]["frame"] == 0:
        return {}
    return {name: facts["settings"][name] for name in ("frame", "quality")}


def check_reuse(reuse: Path, facts: Facts) -> None:
    """UserError unless the set in `reuse` is sound and has the frames that `facts` ask for."""
    finished = load(reuse)
    if finished.container == "ffcv":
        raise UserError(f"{reuse} is an FFCV set; reuse the WebDataset set it was made from")
    versions = {name: facts["versions"].get(name, v) for name, v in finished.versions.items()}
    asked = {**facts, "settings": _frames(facts), "versions": versions}
    hint = "--reuse takes a set of the same source, frame and quality: name one, or leave it out"
    compare(reuse, facts_of_set(finished), asked, hint)
    damage = damaged_files(reuse, finished)
    if damage:
        raise UserError(damage[0])


def check_files(out: Place, finished: Manifest) -> None:
    """BuildError unless each file of the finished set is there, with its size."""
    sizes = out.sizes() if out.is_url else {}
    for file in finished.files:
        if not out.is_url:
            try:
                check_size(out.folder / file.name, file.bytes)
            except UserError as error:
                raise BuildError(str(error)) from None
        elif sizes.get(file.name) != file.bytes:
            raise BuildError(
                f"{out}/{file.name} has {sizes.get(file.name, 'no')} bytes, the manifest says "
                f"{file.bytes}; restore it, or build into a new place"
            )


def reuse_hint(out: Place, there: Facts, asked: Facts) -> str:
    """What to type if the frames of the finished set in `out` can be kept; else empty."""
    same = all(there[part] == asked[part] for part in ("source", "format_version"))
    versions = there["versions"].items()
    same = same and all(asked["versions"].get(name, value) == value for name, value in versions)
    if out.is_url or not same or _frames(there) != _frames(asked):
        return ""
    before, now = ([d["name"] for d in facts["settings"]["detectors"]] for facts in (there, asked))
    added = "-".join(name for name in now if name not in before) or "new"
    return (
        "keep its frames, and the maps of those of its detectors that you name again, by building "
        "into a new folder: "
        f"kamim shards build SOURCE {shlex.quote(f'{out}-{added}')} --reuse {shlex.quote(str(out))}"
    )


def flags_of(settings: Settings, shard_size: int) -> str:
    """The options of `kamim shards build` that give `settings`. Defaults are left out, and so is
    `shard_size`, which a build chooses by itself.
    """
    default = Settings()
    words = [f"--detector {shlex.quote(','.join(each.call for each in settings.detectors))}"]
    for detector in settings.detectors:
        words += option_flags(detector)
        if detector.edge:
            words.append(f"--edge-rule {detector.name}.edge.json")
    for name in PLAIN if settings.frame else PLAIN[2:]:  # kamim maps build has no frame, no quality
        value = getattr(settings, name)
        if value != getattr(default, name):
            words.append(f"--{name.replace('_', '-')} {value}")
    if settings.area[0] != default.area[0]:
        words.append(f"--area {settings.area[0]}")
    if settings.weights is not None:
        words.append("--weights {},{}".format(*settings.weights))
    if settings.shard_size not in (0, shard_size):
        words.append(f"--shard-size {settings.shard_size}")
    return " ".join(words)
