"""The build: a listed source and settings in, a finished, verified-by-ledger set of shards out.

Shards are tasks for any backend; each publishes itself. What is finished survives any kill, a
restart does only what is missing, and the manifest, written last, says that all is there.
"""

import json
import os
import shutil
import sys
import time
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
from preprocess.compare import WORK, Facts, check_folder, check_reuse, facts_of
from preprocess.datasets import check_outside, open_source
from preprocess.detectors import detector_settings
from preprocess.shard import FACTS, Job, confirm, read_row, write_shard
from preprocess.source import Source
from shards import spec
from shards.card import write_card
from shards.errors import UserError
from shards.files import alone, sweep, write_atomically
from shards.names import write_names
from shards.progress import progress, waiting
from shards.record import npy_bytes
from shards.spec import INDEX, REJECTED, File, Ledger, Manifest, Settings, fingerprint
from shards.tar import INDEX_DTYPE

TRIES = 5  # connections to a lost engine without a shard in between
PAUSE_SECONDS = 2  # before the first of them; each waits that much longer


def shard_size_for(inputs: int, frames: bool = True) -> int:
    """Inputs per shard: 1000, or 10,000 without frames; fewer for small sources, so that about 64
    shards share out evenly.
    """
    return min(1000 if frames else 10_000, max(16, inputs // 64))


def sized(settings: Settings, source: Source) -> Settings:
    """`settings` with a shard size for `source`, if they leave it open."""
    size = settings.shard_size or shard_size_for(len(source.entries), settings.frame > 0)
    return replace(settings, shard_size=size)


def build(
    source: str,
    out: Path | str,
    detectors: Sequence[str] = ("fast",),
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
    """Build shards of `source` in the folder `out`, or finish that; returns the manifest.

    source: a folder, tar or URL of class folders, or a dataset as NAME or NAME:PATH; split and
    partial as open_source. detectors: by name, with OpenCV's defaults. settings: fields of
    shards.Settings; frame=0 stores densities alone. The rest as build_shards, whose errors are
    raised; UserError also for a setting that there is not, or that is out of its range.
    """
    known = {field.name for field in fields(Settings)} - {"detectors"}
    for name in settings.keys() - known:
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(sorted(known))}"
        raise UserError(f"there is no setting {name!r}{hint}")
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
    return build_shards(
        listed, Path(out), chosen, jobs, on_error, max_rejected, old, backend, scheduler
    )


def build_shards(
    source: Source,
    out: Path,
    settings: Settings,
    jobs: int = 0,
    on_error: str = "quarantine",
    max_rejected: float = 0.01,
    reuse: Path | None = None,
    backend: str = "loky",
    scheduler: str = "",
) -> Manifest:
    """Write `source` into shards under `out` by `jobs` processes (0: one per core), or finish that.

    `backend` loky, dask or ray runs them, here or on the cluster of `scheduler`. The finished set
    `reuse` of the same source gives its frames, and the maps it shares, so that nothing is encoded
    or detected twice; the bytes are those of a build without it. Returns the manifest. Raises
    UserError if `out` lies in the source or holds anything else or other settings or inputs,
    BuildError if a finished set lacks a file or one has another size (repair_shards mends it), if
    an input is rejected and on_error is `fail`, if no input could be used, if the engine is lost
    for good, or, after a complete build, if more than the share `max_rejected` was rejected.
    """
    backends.check(backend, scheduler)
    check_outside(source, out)
    settings = sized(settings, source)
    facts = facts_of(source, settings)
    complete = check_folder(out, facts)
    if complete is None:
        if reuse:
            check_reuse(reuse, facts)
        old = reuse.resolve() if reuse else None
        with claim(source, settings, out, facts, reuse=old, fail=on_error == "fail") as job:
            numbers = range(-(-len(source.entries) // settings.shard_size))
            write_missing(source, job, numbers, backend, scheduler, jobs)
            with waiting("writing the index"):
                complete = _publish(source, job, facts)
    elif (out / WORK).exists():  # killed between the manifest and the tidying up
        with suppress(ValueError), alone(out, out / WORK / "lock"):  # or a repair is under way
            shutil.rmtree(out / WORK, ignore_errors=True)  # as whoever finished it may do now
    if complete.ledger.rejected_share > max_rejected:
        raise BuildError(
            f"{complete.ledger.rejected_share:.1%} of the inputs were rejected, more than "
            f"{max_rejected:.1%}: {complete.ledger.rejected}; the shards are complete without "
            f"them, see {out / REJECTED}, and accept with a larger --max-rejected"
        )
    return complete


@contextmanager
def claim(
    source: Source, settings: Settings, out: Path, facts: Facts, **options: Any
) -> Iterator[Job]:
    """The build of `facts`, which are written into its work folder for all of its processes.

    This process alone holds that folder; it goes when the build is finished. options: of Job.
    """
    work = out / WORK
    with alone(out, work / "lock"):
        sweep(work)
        write_atomically(work / FACTS, json.dumps(facts).encode("ascii"))
        bare = replace(source, entries=[], classes=[])
        folders = out.resolve(), work.resolve()
        if any(detector.plugin for detector in settings.detectors):
            # An engine's processes may be older than what this one has come to know.
            options["modules"] = (*sys.path, os.getcwd())
            options["seconds"] = isolation.allowed()
        yield Job(settings, bare, *folders, fingerprint(facts), **options)
        sweep(out)  # a killed build's orphan may have outlived the kill
        shutil.rmtree(work, ignore_errors=True)  # the next build finds what is left, and removes it


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

    An engine that is gone is looked for again, TRIES times without a new shard in between.
    """
    size = job.settings.shard_size
    parts = {n: slice(n * size, n * size + size) for n in numbers}
    inputs = sum(len(source.entries[part]) for part in parts.values())
    missing = {n for n in parts if read_row(job.work, job.out, n) is None}
    seen = inputs - sum(len(source.entries[parts[n]]) for n in missing)
    tries = TRIES  # until a first shard arrives, a failure is for the user to see
    with progress(title, inputs, initial=seen) as bar:
        while missing:
            tasks = ((job, n, source.entries[parts[n]]) for n in sorted(missing))
            most = min(jobs or joblib.cpu_count(), len(missing)) if not scheduler else jobs
            results = backends.run(backend, scheduler, most, write_shard, tasks, job.work)
            try:
                for written in results:
                    if backend != "loky":
                        confirm(job, written, source.entries[parts[written.number]])
                    missing.discard(written.number)
                    bar.update(written.inputs)
                    tries = 0
            except backends.Lost as lost:
                if any(read_row(job.work, job.out, n) for n in missing):  # out of our sight
                    tries = 0
                tries += 1
                if tries > TRIES:
                    raise BuildError(
                        f"{lost}; what is finished is kept: run the same command again"
                    ) from None
                bar.write(f"{lost}; trying again, {tries} of {TRIES}", file=sys.stderr)
                time.sleep(PAUSE_SECONDS * tries)
                for n in [n for n in missing if read_row(job.work, job.out, n)]:
                    missing.discard(n)
                    bar.update(len(source.entries[parts[n]]))
            finally:
                results.close()


def names_in(source: Source, index: NDArray[np.void]) -> list[str]:
    """The name of each record of an `index`, as its source has it."""
    return [source.entries[key].name for key in index["key"].tolist()]


def index_in(row: Mapping[str, Any]) -> NDArray[np.void]:
    """The index of a shard, from its row."""
    return np.array([tuple(each) for each in row["index"]], INDEX_DTYPE)


def _publish(source: Source, job: Job, facts: Facts) -> Manifest:
    """Join the rows into index, list of rejected inputs and manifest, in that order."""
    size, inputs = job.settings.shard_size, len(source.entries)
    files, indexes, reasons, rejected = [], [], dict[str, int](), []
    for number in range(-(-inputs // size)):
        row = read_row(job.work, job.out, number)
        assert row is not None, f"shard {number} was published without a row"
        files.append(File(**row["file"]))
        indexes.append(index_in(row))
        for line in row["rejected"]:
            reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
            rejected.append(json.dumps(line, sort_keys=True) + "\n")
    index = np.concatenate(indexes)
    if len(index) == 0:
        raise BuildError(f"all {inputs} inputs were rejected: {reasons}; nothing was published")
    ledger, lines = Ledger(inputs, len(index), reasons), "".join(rejected).encode("ascii")
    names = []
    if job.settings.frame == 0:
        names = write_names(job.out, names_in(source, index), source.kind)
    manifest = Manifest(
        format_version=spec.FORMAT_VERSION,
        container="webdataset" if job.settings.frame else "maps",
        settings=job.settings,
        source=facts["source"],
        classes=source.classes,
        versions=facts["versions"],
        fingerprint=fingerprint(facts),
        ledger=ledger,
        shards=files,
        index=spec.write_file(job.out / INDEX, npy_bytes(index), len(index)),
        rejected=spec.write_file(job.out / REJECTED, lines, len(rejected)),
        fidelity={},
        names=names,
    )
    assert ledger.balanced
    write_card(job.out, manifest)
    spec.write(job.out, manifest)
    return manifest
