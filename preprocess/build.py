"""The build: a listed source and settings in, a finished, verified-by-ledger set of shards out.

Shards are tasks for joblib; each publishes itself. What is finished survives any kill, a restart
does only what is missing, and the manifest, written last, says that all is there.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import PIL
import simplejpeg

from preprocess.shard import BuildError, Job, read_row, write_shard
from preprocess.sources import Source
from shards import File, Ledger, Manifest, Settings
from shards import manifest as _manifest
from shards.manifest import INDEX, MANIFEST, REJECTED, write_atomically
from shards.record import npy_bytes
from shards.verify import damaged_files
from shards.webdataset import INDEX_DTYPE
from shards.writing import alone, progress

WORK = ".build"


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
) -> Manifest:
    """Write `source` into shards under `out` by `jobs` processes (0: one a core), or finish that.

    The finished set `reuse` of the same source gives its frames, and the maps it shares, so that
    nothing is encoded or detected twice; the bytes are those of a build without it. Returns the
    manifest. Raises ValueError if `out` holds anything else or other settings or inputs, BuildError
    if an input is rejected and on_error is `fail`, if no input could be used, or, after a complete
    build, if more than the share `max_rejected` of inputs was rejected.
    """
    facts = _facts(source, settings)
    complete = _check_folder(out, facts)
    if complete is None:
        if reuse:
            _check_reuse(reuse, facts)
        with _claim(out) as work:
            write_atomically(work / "plan.json", json.dumps(facts).encode("ascii"))
            folders = out.resolve(), work.resolve(), reuse.resolve() if reuse else None
            job = Job(settings, source.kind, source.root, *folders, on_error == "fail")
            _write_missing(source, job, jobs or joblib.cpu_count())
            complete = _publish(source, job, facts)
    elif (out / WORK).exists():  # killed between the manifest and the tidying up
        shutil.rmtree(out / WORK)
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
        "versions": {
            "opencv": cv2.__version__,
            "pillow": PIL.__version__,
            "simplejpeg": simplejpeg.__version__,
        },
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
    plan = out / WORK / "plan.json"
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
    work.mkdir(parents=True, exist_ok=True)
    with alone(out, work / "lock"):
        for stale in [*out.glob("*.tmp"), *work.glob("*.tmp")]:
            stale.unlink(missing_ok=True)
        yield work
        for stale in out.glob("*.tmp"):  # a killed build's orphan may have outlived the kill
            stale.unlink(missing_ok=True)
        shutil.rmtree(work)


def _write_missing(source: Source, job: Job, jobs: int) -> None:
    """Write every shard that has no row yet, with progress on stderr."""
    size, inputs = job.settings.shard_size, len(source.entries)
    numbers = range(-(-inputs // size))
    missing = [n for n in numbers if read_row(job.work, job.out, n) is None]
    counts = {n: min(size, inputs - n * size) for n in numbers}
    seen = inputs - sum(counts[n] for n in missing)
    tasks = (
        joblib.delayed(write_shard)(job, n, source.entries[n * size : n * size + size])
        for n in missing
    )
    pool = joblib.Parallel(
        n_jobs=min(jobs, len(missing) or 1),
        return_as="generator_unordered",
        temp_folder=str(job.work),  # or a killed build leaves folders in shared memory for good
    )
    results = pool(tasks)
    try:
        with progress("building", inputs, initial=seen) as bar:
            for count in results:
                bar.update(count)
    except joblib.externals.loky.process_executor.TerminatedWorkerError:
        raise BuildError(
            "a worker process died, perhaps for want of memory; finished shards are kept: run the "
            "same command again, with fewer --jobs if it happens again"
        ) from None
    finally:
        results.close()  # ends the workers' tasks when we were stopped in the middle


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
