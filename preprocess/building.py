"""The build: a listed source and settings in, a finished set of shards out.

A shard is a task for any backend, and is put in place when it is whole. After a kill, the next
start makes only the shards that are missing. The manifest is written last, if the ledger balances.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

from preprocess import BuildError, isolation
from preprocess import executors as backends
from preprocess.compare import (
    WORK,
    Facts,
    check_classes,
    check_folder,
    check_reuse,
    compare,
    facts_begun,
    facts_of,
)
from preprocess.datasets import check_outside, open_source
from preprocess.detectors import detector_settings
from preprocess.shard import FACTS, Job, confirm, read_rows, write_shard
from preprocess.source import Source
from shards import spec
from shards.card import card
from shards.errors import UserError
from shards.files import MANIFEST, alone, locked, naming_if_full, sweep
from shards.names import KEYS, NAMES, lists_of
from shards.progress import progress, waiting
from shards.record import npy_bytes
from shards.remote.place import Place
from shards.spec import CARD, INDEX, REJECTED, File, Ledger, Manifest, Settings, fingerprint
from shards.tar import INDEX_DTYPE

TRIES = 5  # connections to a lost engine without a shard in between
PAUSE_SECONDS = 2  # before the first of them; each waits that much longer


def shard_size_for(inputs: int, frames: bool = True) -> int:
    """Inputs per shard: 1000, or 10,000 without frames. Fewer for small sources: about 64 shards
    keep all processes busy to the end.
    """
    return min(1000 if frames else 10_000, max(16, inputs // 64))


def sized(settings: Settings, source: Source) -> Settings:
    """`settings`, with a shard size for `source` if they have none."""
    size = settings.shard_size or shard_size_for(len(source.entries), settings.frame > 0)
    return replace(settings, shard_size=size)


def build(
    source: str | Path,
    out: Path | str,
    detectors: str | Sequence[str] = ("fast",),
    *,
    split: str = "",
    partial: bool = False,
    jobs: int = 0,
    on_error: str = "quarantine",
    max_rejected: float = 0.01,
    reuse: Path | str | None = None,
    backend: str = "loky",
    scheduler: str = "",
    **settings: Any,
) -> Manifest:
    """Build shards of `source` in the folder or at the URL `out`, or finish that; returns the
    manifest.

    source: a folder, tar or URL of class folders, or a dataset as NAME or NAME:PATH; split and
    partial as open_source. detectors: one or more, by name, with OpenCV's defaults. settings:
    fields of shards.Settings; frame=0 stores densities alone. The rest as build_shards, whose
    errors are raised; UserError also for a setting that there is not, or that is out of its range.
    """
    known = {field.name for field in fields(Settings)} - {"detectors"}
    for name in settings.keys() - known:
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(known))}"
        raise UserError(f"there is no setting {name!r}{hint}")
    detectors = (detectors,) if isinstance(detectors, str) else detectors
    if not detectors or len(set(detectors)) < len(detectors):
        raise UserError(f"detectors {', '.join(detectors) or '()'}: name one or more, each once")
    if jobs < 0:
        raise UserError(f"jobs {jobs} is out of range; give 0 (one per core) or more")
    if on_error not in ("quarantine", "fail"):
        raise UserError(f"on_error is {on_error!r}; there are quarantine and fail")
    if not 0 <= max_rejected <= 1:
        raise UserError(f"max_rejected {max_rejected} is out of range; give 0 to 1")
    if settings.get("frame") == 0:
        settings.setdefault("quality", 0)
    chosen = Settings(detectors=tuple(map(detector_settings, detectors)), **settings)
    listed, old = open_source(source, split, partial), Path(reuse) if reuse else None
    return build_shards(listed, out, chosen, jobs, on_error, max_rejected, old, backend, scheduler)


def build_shards(
    source: Source,
    out: Path | str,
    settings: Settings,
    jobs: int = 0,
    on_error: str = "quarantine",
    max_rejected: float = 0.01,
    reuse: Path | None = None,
    backend: str = "loky",
    scheduler: str = "",
) -> Manifest:
    """Write `source` into shards under `out` by `jobs` processes (0: one per core), or finish that.

    `out` is a folder, or the URL of a store. `backend` loky, dask or ray runs the processes, here
    or on the cluster of `scheduler`. `reuse`: a finished set of the same source, whose frames and
    maps are copied where the settings agree; the bytes are those of a build without it. Returns the
    manifest.

    Raises UserError if `out` lies in the source, or holds something else, other settings or other
    inputs. BuildError: a finished set lacks a file or a file has another size (repair_shards mends
    it); an input is rejected and on_error is `fail`; no input could be used; the backend is lost;
    or, after a complete build, more than the share `max_rejected` was rejected. OSError: a store
    cannot be reached.
    """
    backends.check(backend, scheduler)
    place, settings, facts, complete = prepare(source, out, settings, reuse)
    if complete is None:
        old, fail = reuse.resolve() if reuse else None, on_error == "fail"
        with claim(source, settings, place, facts, reuse=old, fail=fail) as job:
            write_missing(source, job, range(shards_of(facts)), backend, scheduler, jobs)
            complete = publish(place, facts, source.classes)
    elif WORK in place.sizes():
        finish_tidying(place)
    check_rejected(complete.ledger, max_rejected, on_error, f"see {place}/{REJECTED}")
    return complete


def prepare(
    source: Source, out: Path | str, settings: Settings, reuse: Path | None
) -> tuple[Place, Settings, Facts, Manifest | None]:
    """Where to build, the settings, the facts, and the manifest of a build that is finished.

    Raises UserError if `out` or `reuse` does not fit.
    """
    place = Place.of(out)
    check_outside(source, str(place))
    settings = sized(settings, source)
    facts = facts_of(source, settings)
    complete = check_folder(place, facts)
    if complete:
        check_classes(place, complete, source)
    if reuse and complete is None:
        check_reuse(reuse, facts)
    return place, settings, facts, complete


def shards_of(facts: Facts) -> int:
    """The number of shards of a build with these facts."""
    return -(-int(facts["source"]["inputs"]) // int(facts["settings"]["shard_size"]))


def check_rejected(ledger: Ledger, most: float, on_error: str, where: str) -> None:
    """BuildError if more than the share `most` of the inputs was rejected, in this build or in one
    before; if `on_error` is `fail`, if any was.
    """
    fail = on_error == "fail"
    if ledger.rejected_share > (0 if fail else most):
        how = "--on-error quarantine" if fail else "a larger --max-rejected"
        raise BuildError(
            f"{ledger.rejected_share:.1%} of the inputs were rejected"
            f"{'' if fail else f', more than {most:.1%}'}: {ledger.rejected}; the shards are "
            f"complete without them, {where}, and accept with {how}"
        )


@contextmanager
def claim(
    source: Source,
    settings: Settings,
    out: Place,
    facts: Facts,
    part: str = "",
    repair: bool = False,
    **options: Any,
) -> Iterator[Job]:
    """The build of `facts`, a `part` of it, or its `repair`. The facts are written into the work
    folder, for all processes of the build.

    The work folder is removed when the build is finished, not when a part is. options: of Job.
    UserError if another process has finished a set in `out` since it was looked at.
    """
    work = out / WORK
    with hold(out, part) as scratch:
        if not repair and MANIFEST in out.sizes():
            raise UserError(f"{out} was finished by another process; run the same command again")
        work.create(FACTS, json.dumps(facts).encode("ascii"))
        compare(out, facts_begun(out) or facts, facts)  # another may have begun at the same time
        bare = replace(source, entries=[], classes=[])
        if any(detector.plugin for detector in settings.detectors):
            # An engine's processes may be older than what this one has come to know.
            options["modules"] = (*sys.path, os.getcwd())
            options["seconds"] = isolation.allowed()
        there = out if out.is_url else Place(str(out.folder.resolve()))
        yield Job(settings, bare, there, there / WORK, scratch, fingerprint(facts), **options)
        if not part:
            tidy(out)


@contextmanager
def hold(out: Place, part: str = "") -> Iterator[Path]:
    """Be the only process that builds in `out`, or this `part` of it. Gives a scratch folder.

    In a store, processes of other machines are not kept out: they write the same bytes.
    """
    if out.is_url:
        digest = hashlib.sha256(f"{out} {part}".encode()).hexdigest()[:16]
        scratch = Path(tempfile.gettempdir(), f"kamim-{os.getuid()}-{digest}")
        with locked(scratch.with_suffix(".lock"), out), naming_if_full(scratch.parent):
            shutil.rmtree(scratch, ignore_errors=True)  # what a killed build left
            scratch.mkdir(mode=0o700)
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        return
    work = (out / WORK).folder
    if part:
        with (
            locked(work / "lock", out, shared=True),
            locked(work / f"{part}.lock", out),
            naming_if_full(out.folder),
        ):
            yield work
        return
    with alone(out.folder, work / "lock"):
        sweep(work)
        yield work


def tidy(out: Place) -> None:
    """Remove what a finished build needs no more. What a kill leaves, the next build removes."""
    out.sweep()  # a killed build's orphan may have outlived the kill
    (out / WORK).remove_all()


def finish_tidying(out: Place) -> None:
    """Tidy up after a build that was killed between its manifest and `tidy`."""
    with suppress(ValueError), hold(out):  # or a repair is under way
        tidy(out)


def write_missing(
    source: Source,
    job: Job,
    numbers: Iterable[int],
    backend: str,
    scheduler: str,
    jobs: int,
    title: str = "building",
) -> None:
    """Write every shard of `numbers` that has no row yet, with progress on stderr.

    If the backend is lost, it is started again, up to TRIES times without a new shard in between.
    """
    size = job.settings.shard_size
    parts = {n: slice(n * size, n * size + size) for n in numbers}
    inputs = sum(len(source.entries[part]) for part in parts.values())
    with waiting(f"looking at what is in {job.out}"):
        missing = set(parts) - _finished(job, parts)
    seen = inputs - sum(len(source.entries[parts[n]]) for n in missing)
    tries = TRIES  # until a first shard arrives, a failure is for the user to see
    with progress(title, inputs, initial=seen) as bar:
        while missing:
            tasks = ((job, n, source.entries[parts[n]]) for n in sorted(missing))
            most = min(jobs or joblib.cpu_count(), len(missing)) if not scheduler else jobs
            results = backends.run(backend, scheduler, most, write_shard, tasks)
            try:
                for written in results:
                    if backend != "loky":
                        confirm(job, written, source.entries[parts[written.number]])
                    missing.discard(written.number)
                    bar.update(written.inputs)
                    tries = 0
            except backends.Lost as lost:
                found = _finished(job, missing)  # out of our sight
                tries = 0 if found else tries
                tries += 1
                if tries > TRIES:
                    raise BuildError(
                        f"{lost}; what is finished is kept: run the same command again"
                    ) from None
                bar.write(f"{lost}; trying again, {tries} of {TRIES}", file=sys.stderr)
                time.sleep(PAUSE_SECONDS * tries)
                for n in found | _finished(job, missing):
                    missing.discard(n)
                    bar.update(len(source.entries[parts[n]]))
            finally:
                results.close()


def _finished(job: Job, numbers: Iterable[int]) -> set[int]:
    """Those shards of `numbers` that are in place."""
    return {n for n, _ in read_rows(job.work, job.out, job.fingerprint, numbers)}


def names_in(source: Source, index: NDArray[np.void]) -> list[str]:
    """The name of each record of an `index`, as its source has it."""
    return [source.entries[key].name for key in index["key"].tolist()]


def index_in(row: Mapping[str, Any]) -> NDArray[np.void]:
    """The index of a shard, from its row."""
    return np.array([tuple(each) for each in row["index"]], INDEX_DTYPE)


def ledger_of(inputs: int, written: int, rejected: Iterable[Mapping[str, str]]) -> Ledger:
    """The ledger, from the lines of rejected inputs. BuildError if it does not balance."""
    ledger = Ledger(inputs, written, dict(Counter(line["reason"] for line in rejected)))
    if not ledger.balanced:
        raise BuildError(f"the rows of the shards do not account for {inputs} inputs: {ledger}")
    return ledger


def publish(out: Place, facts: Facts, classes: list[str]) -> Manifest:
    """Join the rows into index, list of rejected inputs and manifest, in that order.

    Raises BuildError if a shard is not there, or if no input could be used.
    """
    settings, source = spec.settings_of(facts["settings"]), facts["source"]
    files, indexes, rejected, names = list[File](), [], list[dict[str, str]](), list[str]()
    with waiting("writing the index"):
        numbers, mark = range(shards_of(facts)), fingerprint(facts)
        for _, row in read_rows(out / WORK, out, mark, numbers):
            files.append(File(**row["file"]))
            indexes.append(index_in(row))
            rejected += row["rejected"]
            names += row["names"]
        if len(files) < len(numbers):
            raise BuildError(
                f"{len(numbers) - len(files)} shards of {out} are gone again, or another process "
                "has finished it meanwhile; run the same command again"
            )
        index = np.concatenate(indexes)
        ledger = ledger_of(source["inputs"], len(index), rejected)
        if len(index) == 0:
            first = rejected[0]
            reasons = ", ".join(f"{n} {reason}" for reason, n in ledger.rejected.items())
            raise BuildError(
                f"all {ledger.inputs} inputs were rejected ({reasons}); the first, "
                f"{first['source']!r}: {first['detail']}; nothing was published: remove {out}, "
                "mend the cause, and build again"
            )
        lines = "".join(json.dumps(line, sort_keys=True) + "\n" for line in rejected)
        lists = [(INDEX, npy_bytes(index), len(index)), (REJECTED, lines.encode(), len(rejected))]
        if settings.frame == 0:
            found = lists_of(names, source["kind"])
            lists += [(n, data, len(names)) for n, data in zip((NAMES, KEYS), found, strict=True)]
        for name, data, _ in lists:
            out.write(name, data)
        rows = [spec.file_of(*each) for each in lists]
        manifest = Manifest(
            format_version=facts["format_version"],
            container="webdataset" if settings.frame else "maps",
            settings=settings,
            source=source,
            classes=classes,
            versions=facts["versions"],
            fingerprint=mark,
            ledger=ledger,
            shards=files,
            index=rows[0],
            rejected=rows[1],
            fidelity={},
            names=rows[2:],
        )
        if CARD not in out.sizes():  # there may be one of somebody's
            out.write(CARD, card(manifest).encode("ascii"))
        out.write(MANIFEST, spec.to_json(manifest))
    return manifest
