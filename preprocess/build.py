"""The build: a listed source and settings in, a finished, verified-by-ledger set of shards out.

Shards are tasks for any backend; each publishes itself. What is finished survives any kill, a
restart does only what is missing, and the manifest, written last, says that all is there.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from preprocess import backends, frequency
from preprocess.shard import (
    PLAN,
    BuildError,
    Job,
    confirm,
    library_versions,
    read_row,
    write_shard,
)
from preprocess.sources import Source, check_outside
from shards import File, Ledger, Manifest, Settings
from shards import manifest as _manifest
from shards.manifest import INDEX, MANIFEST, REJECTED
from shards.record import npy_bytes
from shards.verify import damaged_files
from shards.webdataset import INDEX_DTYPE
from shards.writing import alone, progress, sweep, write_atomically

WORK = ".build"
TRIES = 5  # connections to a lost engine without a shard in between
PAUSE_SECONDS = 2  # before the first of them; each waits that much longer


def shard_size_for(inputs: int) -> int:
    """Inputs a shard: 1000, fewer for small sources, so that about 64 shards share out evenly."""
    return min(1000, max(16, inputs // 64))


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
    """Write `source` into shards under `out` by `jobs` processes (0: one a core), or finish that.

    `backend` loky, dask or ray runs them, here or on the cluster of `scheduler`. The finished set
    `reuse` of the same source gives its frames, and the maps it shares, so that nothing is encoded
    or detected twice; the bytes are those of a build without it. Returns the manifest. Raises
    ValueError if `out` lies in the source or holds anything else or other settings or inputs,
    BuildError if an input is rejected and on_error is `fail`, if no input could be used, if the
    engine is lost for good, or, after a complete build, if more than the share `max_rejected` was
    rejected.
    """
    frequency.check_bank(settings)
    backends.check(backend, scheduler)
    check_outside(source, out)
    facts = _facts(source, settings)
    complete = _check_folder(out, facts)
    if complete is None:
        if reuse:
            _check_reuse(reuse, facts)
        with _claim(out) as work:
            write_atomically(work / PLAN, json.dumps(facts).encode("ascii"))
            folders = out.resolve(), work.resolve(), reuse.resolve() if reuse else None
            fail, plan = on_error == "fail", _manifest.fingerprint(facts)
            job = Job(settings, source.kind, source.root, *folders, fail, plan)
            _write_missing(source, job, backend, scheduler, jobs)
            complete = _publish(source, job, facts)
    elif (out / WORK).exists():  # killed between the manifest and the tidying up
        shutil.rmtree(out / WORK, ignore_errors=True)  # as whoever finished it may be doing now
    if complete.ledger.rejected_share > max_rejected:
        raise BuildError(
            f"{complete.ledger.rejected_share:.1%} of the inputs were rejected, more than "
            f"{max_rejected:.1%}: {complete.ledger.rejected}; the shards are complete without "
            f"them, see {out / REJECTED}, and accept with a larger --max-rejected"
        )
    return complete


def _facts(source: Source, settings: Settings) -> dict[str, Any]:
    """All that a record's bytes depend on; a build goes on only where all of it is equal."""
    facts = {
        "format_version": _manifest.FORMAT_VERSION,
        "settings": asdict(settings),
        "source": source.description(),
        "versions": library_versions(settings),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))  # as it will be read back
    return plain


def _check_folder(out: Path, facts: dict[str, Any]) -> Manifest | None:
    """The finished set in `out` if it is this one, None if it is ours to write, else ValueError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder for the shards")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if MANIFEST in names:
        finished = _manifest.load(out)
        _compare(out, _facts_of(finished), facts)
        return finished
    plan = out / WORK / PLAN
    if plan.is_file():
        _compare(out, json.loads(plan.read_bytes()), facts)
    elif names - {WORK}:
        some = ", ".join(sorted(names)[:3])
        raise ValueError(f"{out} holds something else ({some}); name a new or empty folder")
    return None


def _facts_of(finished: Manifest) -> dict[str, Any]:
    """What _facts said when the finished set was built."""
    return {
        "format_version": finished.format_version,
        "settings": json.loads(json.dumps(asdict(finished.settings))),
        "source": finished.source,
        "versions": finished.versions,
    }


def _check_reuse(reuse: Path, facts: dict[str, Any]) -> None:
    """ValueError unless the set in `reuse` is sound and has the frames that `facts` ask for."""
    finished = _manifest.load(reuse)
    if finished.container != "webdataset":
        raise ValueError(f"{reuse} is an FFCV set; reuse the WebDataset set it was made from")
    there, asked = _facts_of(finished), {**facts, "settings": {}, "versions": {}}
    for name in ("frame", "quality"):
        asked["settings"][name] = facts["settings"][name]
    for name in finished.versions:
        asked["versions"][name] = facts["versions"].get(name, finished.versions[name])
    _compare(reuse, there, asked)
    damage = damaged_files(reuse, finished)
    if damage:
        raise ValueError(damage[0])


def _compare(out: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    changed = [
        f"{part}.{name} is {there[part].get(name)} there, {value} here"
        for part in ("settings", "source", "versions")
        for name, value in asked[part].items()
        if there[part].get(name) != value
    ]
    if there["format_version"] != asked["format_version"] or changed:
        raise ValueError(
            f"{out} holds shards of other inputs or settings: {'; '.join(changed[:3])}; "
            "use the same ones to go on, or name a new folder"
        )


@contextmanager
def _claim(out: Path) -> Iterator[Path]:
    """The build's work folder, held by this process alone; it goes when the build is finished."""
    work = out / WORK
    with alone(out, work / "lock"):
        sweep(work)
        yield work
        sweep(out)  # a killed build's orphan may have outlived the kill
        shutil.rmtree(work, ignore_errors=True)  # the next build finds what is left, and removes it


def _write_missing(source: Source, job: Job, backend: str, scheduler: str, jobs: int) -> None:
    """Write every shard that has no row yet, with progress on stderr.

    An engine that is gone is looked for again, TRIES times without a new shard in between.
    """
    size, inputs = job.settings.shard_size, len(source.entries)
    parts = {n: slice(n * size, n * size + size) for n in range(-(-inputs // size))}
    missing = {n for n in parts if read_row(job.work, job.out, n) is None}
    seen = inputs - sum(len(source.entries[parts[n]]) for n in missing)
    tries = TRIES  # until a first shard arrives, a failure is for the user to see
    with progress("building", inputs, initial=seen) as bar:
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


def _publish(source: Source, job: Job, facts: dict[str, Any]) -> Manifest:
    """Join the rows into index, list of rejected inputs and manifest, in that order."""
    size, inputs = job.settings.shard_size, len(source.entries)
    files, indexes, reasons, rejected = [], [], dict[str, int](), []
    for number in range(-(-inputs // size)):
        row = read_row(job.work, job.out, number)
        assert row is not None, f"shard {number} was published without a row"
        files.append(File(**row["file"]))
        indexes.append(np.array([tuple(r) for r in row["index"]], INDEX_DTYPE))
        for line in row["rejected"]:
            reasons[line["reason"]] = reasons.get(line["reason"], 0) + 1
            rejected.append(json.dumps(line, sort_keys=True) + "\n")
    index = np.concatenate(indexes)
    if len(index) == 0:
        raise BuildError(f"all {inputs} inputs were rejected: {reasons}; nothing was published")
    ledger = Ledger(inputs, len(index), reasons)
    manifest = Manifest(
        format_version=_manifest.FORMAT_VERSION,
        container="webdataset",
        settings=job.settings,
        source=source.description(),
        classes=source.classes,
        versions=facts["versions"],
        fingerprint=_manifest.fingerprint(facts),
        ledger=ledger,
        shards=files,
        index=_manifest.write_file(job.out / INDEX, npy_bytes(index), len(index)),
        rejected=_manifest.write_file(
            job.out / REJECTED, "".join(rejected).encode("ascii"), len(rejected)
        ),
        fidelity={},
    )
    assert ledger.balanced
    _manifest.write(job.out, manifest)
    return manifest
