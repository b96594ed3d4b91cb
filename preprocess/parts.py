"""Builds a set in n parts, on machines that share only its place, and joins the parts.

A part is a range of whole shards of one plan, so names and bytes are those of one build. The part's
ledger, written last, marks it as complete. Joining writes the manifest.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preprocess import BuildError
from preprocess import executors as backends
from preprocess.building import (
    check_rejected,
    claim,
    finish_tidying,
    hold,
    ledger_of,
    prepare,
    publish,
    shard_size_for,
    shards_of,
    tidy,
    write_missing,
)
from preprocess.compare import WORK, Facts, check_files, facts_begun, flags_of
from preprocess.shard import read_rows
from preprocess.source import Source
from shards import spec
from shards.errors import UserError
from shards.files import MANIFEST, alone
from shards.progress import waiting
from shards.remote.place import Place
from shards.spec import FORMAT_VERSION, Ledger, Manifest, Settings, fingerprint
from shards.tar import shard_name

Part = tuple[int, int]  # the i-th, from 1 on, of n
FILE = re.compile(r"part-(\d+)-of-(\d+)\.json")


def parse_part(text: str) -> Part:
    """(i, n) of `i/n`. Raises UserError if it is no such part."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--part {text} is not i/n with i from 1 to n; give 1/8 for the first of 8")
    return part, parts


def build_part(
    source: Source,
    out: Path | str,
    settings: Settings,
    part: Part,
    jobs: int = 0,
    on_error: str = "quarantine",
    max_rejected: float = 0.01,
    reuse: Path | None = None,
    backend: str = "loky",
    scheduler: str = "",
) -> Ledger | None:
    """Write the shards of `part` of a build of `source` into `out`, or finish that.

    Returns the part's ledger, None if the whole set is finished. The rest as build_shards, whose
    errors are raised; join_parts makes the set of all parts.
    """
    backends.check(backend, scheduler)
    place, settings, facts, complete = prepare(source, out, settings, reuse)
    if complete is not None:
        return None
    old, fail, name = reuse.resolve() if reuse else None, on_error == "fail", _name(part)
    with claim(source, settings, place, facts, name, reuse=old, fail=fail) as job:
        numbers = _numbers(part, facts)
        write_missing(source, job, numbers, backend, scheduler, jobs)
        rows = dict(_brief(job.out, facts, numbers))
        if len(rows) < len(numbers):
            raise BuildError(
                f"shards of {name} of {place} are gone again; run the same command again"
            )
        ledger = _ledger(part, facts, rows.values())
        content = {"classes": source.classes, "fingerprint": job.fingerprint, **asdict(ledger)}
        job.work.write(f"{name}.json", json.dumps(content).encode("ascii"))
    where = "and rejected.jsonl will name these once they are joined"
    check_rejected(ledger, max_rejected, on_error, where)
    return ledger


def join_parts(out: Path | str, max_rejected: float = 0.01) -> Manifest:
    """Make one finished set of the parts in `out`; returns its manifest, which is one build's.

    Raises UserError if no build was begun there, or another process builds there, BuildError if a
    part or a shard of it is missing, naming it and what to type, or too many inputs were rejected.
    """
    place = Place.of(out)
    there = place.sizes()
    facts = facts_begun(place)
    if MANIFEST in there:
        finished = spec.parse(f"{place}/{MANIFEST}", place.read(MANIFEST) or b"")
        check_files(place, finished)
        if WORK in there:
            finish_tidying(place)
    elif facts is None:
        raise UserError(
            f"{place} holds no parts to join; build them first, the first of N by: kamim shards "
            f"build SOURCE {shlex.quote(str(place))} --part 1/N"
        )
    elif facts["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{place} was begun with format version {facts['format_version']}, this kamim writes "
            f"{FORMAT_VERSION}; join it with the kamim that built the parts"
        )
    else:
        with hold(place):
            if not place.is_url:  # a new name in a folder has NFS look again at what it holds
                with alone(place.folder), alone((place / WORK).folder):
                    pass
            with waiting(f"looking at what is in {place}"):
                classes = _classes(place, facts)
            finished = publish(place, facts, classes)
            tidy(place)
    check_rejected(finished.ledger, max_rejected, "", f"see {place}/{spec.REJECTED}")
    return finished


def _name(part: Part) -> str:
    return "part-{}-of-{}".format(*part)


def _numbers(part: Part, facts: Facts) -> range:
    """The shards of a part: of neighbours, as they lie beside each other in the source."""
    (i, n), shards = part, shards_of(facts)
    return range(shards * (i - 1) // n, shards * i // n)


def _brief(out: Place, facts: Facts, numbers: range) -> Iterable[tuple[int, dict[str, Any]]]:
    """What the ledger needs of the rows of those shards that are whole."""
    for number, row in read_rows(out / WORK, out, fingerprint(facts), numbers):
        yield number, {"count": row["file"]["count"], "rejected": row["rejected"]}


def _ledger(part: Part, facts: Facts, rows: Collection[dict[str, Any]]) -> Ledger:
    """What the rows of a part add up to. BuildError if that is not its inputs."""
    numbers = _numbers(part, facts)
    size, inputs = facts["settings"]["shard_size"], facts["source"]["inputs"]
    asked = min(inputs, numbers.stop * size) - numbers.start * size if numbers else 0
    written = sum(row["count"] for row in rows)
    return ledger_of(asked, written, [line for row in rows for line in row["rejected"]])


def _classes(place: Place, facts: Facts) -> list[str]:
    """The classes that all parts name. BuildError unless each part is there, whole."""
    found = _parts(place, facts)
    if not found:
        raise _lacks(place, facts, "1/N", "no part of it has ended")
    ended = Counter(n for _, n in found)
    n = max(ended, key=lambda n: (ended[n] == n, ended[n]))  # parts of another n may lie there, too
    parts = [(i, n) for i in range(1, n + 1)]
    missing = [f"{i}/{n}" for i, n in parts if (i, n) not in found]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise _lacks(place, facts, missing[0], f"it lacks part {', '.join(missing[:5])}{more}")
    classes: list[str] = found[parts[0]]["classes"]
    rows = dict(_brief(place, facts, range(shards_of(facts))))
    for part in parts:
        name, numbers = "{}/{}".format(*part), _numbers(part, facts)
        lost = [number for number in numbers if number not in rows]
        if lost:
            shard = shard_name(lost[0], spec.settings_of(facts["settings"]))
            raise _lacks(place, facts, name, f"{shard} of part {name} is gone, or cut short")
        ledger = asdict(_ledger(part, facts, [rows[number] for number in numbers]))
        if any(found[part][field] != value for field, value in ledger.items()):
            raise _lacks(place, facts, name, f"part {name} has shards that it does not count")
        if found[part]["classes"] != classes:
            raise _lacks(place, facts, name, f"part {name} has other classes than part 1/{n}")
    return classes


def _parts(place: Place, facts: Facts) -> dict[Part, dict[str, Any]]:
    """What the parts of this build that have ended say of themselves."""
    parts, work = {}, place / WORK
    for found in filter(None, map(FILE.fullmatch, work.sizes())):
        with suppress(ValueError):  # half of it is there
            content = json.loads(work.read(found[0]) or b"{}")
            if content.get("fingerprint") == fingerprint(facts):
                parts[int(found[1]), int(found[2])] = content
    return parts


def _lacks(place: Place, facts: Facts, part: str, why: str) -> BuildError:
    """What keeps the parts from being joined, and what to type for this `part`, as i/n."""
    settings = spec.settings_of(facts["settings"])
    door = "shards" if settings.frame else "maps"
    flags = flags_of(settings, shard_size_for(facts["source"]["inputs"], settings.frame > 0))
    return BuildError(
        f"{place} cannot be joined yet: {why}; type, where its source is: kamim {door} build "
        f"SOURCE {shlex.quote(str(place))} {flags} --part {part}"
    )
