"""A finished set with files that are missing or damaged: made whole again, to the same bytes.

What is built is held to the manifest's sha256 before it takes the place of what is damaged.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from preprocess import BuildError
from preprocess import executors as backends
from preprocess.building import claim, shard_size_for, sized, write_missing
from preprocess.compare import (
    check_manifest_is_not_lost,
    compare,
    facts_begun,
    facts_of,
    facts_of_set,
    flags_of,
)
from preprocess.datasets import check_outside
from preprocess.decode import Rejected, decode_image
from preprocess.shard import Job, read_row, rejected_line, row_path
from preprocess.source import Source
from shards.errors import UserError
from shards.files import MANIFEST, sync, write_atomically
from shards.index import flaws_of_files
from shards.progress import progress
from shards.record import npy_bytes
from shards.spec import File, Manifest, Settings, load, sha256_of_bytes
from shards.tar import index_of


def repair_shards(
    source: Source,
    out: Path,
    settings: Settings,
    jobs: int = 0,
    backend: str = "loky",
    scheduler: str = "",
) -> list[str]:
    """Hash every file of the finished set in `out`, build what is missing or damaged again.

    Returns the names of the files that were put in place. Stopped or killed, the same call goes
    on. Raises UserError if `out` holds no finished set, or one of another source or settings,
    BuildError if a file can no longer be built to the bytes that the manifest says.
    """
    backends.check(backend, scheduler)
    check_outside(source, out)
    if facts_begun(out) and not (out / MANIFEST).exists():
        raise UserError(f"{out} is unfinished; the same command without --repair goes on")
    check_manifest_is_not_lost(out)
    settings = sized(settings, source)
    finished, facts = load(out), facts_of(source, settings)
    if finished.container != "webdataset":
        raise UserError(f"{out} is an FFCV set; remove it and convert the set it was made from")
    flags = flags_of(finished.settings, shard_size_for(len(source.entries)))
    compare(out, facts_of_set(finished), facts, f"give those of the set to repair it: {flags}")
    with claim(source, settings, out, facts) as job:
        files = [*finished.shards, finished.index, finished.rejected]
        flaws = flaws_of_files(out, files)
        job = replace(job, out=job.work)
        numbers = [n for n, shard in enumerate(finished.shards) if shard.name in flaws]
        write_missing(source, job, numbers, backend, scheduler, jobs, "repairing")
        for number in numbers:
            _put(job, number, out / finished.shards[number].name, finished.shards[number])
        sync(out)
        if flaws.keys() & {finished.index.name, finished.rejected.name}:
            _restore_lists(source, out, finished)
    return [file.name for file in files if file.name in flaws]


def _put(job: Job, number: int, path: Path, file: File) -> None:
    """Shard `number` from the work folder to `path`, if it is what the manifest says."""
    row, built = read_row(job.work, job.out, number), job.out / file.name
    if row is None or row["file"]["sha256"] != file.sha256:
        row_path(job.work, number).unlink(missing_ok=True)  # or it would be found finished
        built.unlink(missing_ok=True)
        raise _changed(path)
    built.replace(path)


def _changed(path: Path) -> BuildError:
    return BuildError(
        f"{path} cannot be built to the bytes that its manifest says, though source, settings and "
        "versions are the same: an image may be unreadable now, or its content changed; build "
        "into a new folder"
    )


def _restore_lists(source: Source, out: Path, finished: Manifest) -> None:
    """index.npy from the shards, then rejected.jsonl from the inputs that it lacks."""
    shards = progress("indexing", len(finished.shards), finished.shards, unit="shard", delay=1)
    rows = [index_of(out / shard.name, finished.settings) for shard in shards]
    index = np.concatenate(rows)
    lists = (finished.index, npy_bytes(index)), (finished.rejected, _rejected(source, index))
    for file, data in lists:
        if sha256_of_bytes(data) != file.sha256:
            raise _changed(out / file.name)
        write_atomically(out / file.name, data)


def _rejected(source: Source, index: NDArray[np.void]) -> bytes:
    """The lines of the inputs that are in no shard: each is looked at again."""
    written, lines = set(index["key"].tolist()), []
    for number in sorted(set(range(len(source.entries))) - written):
        entry = source.entries[number]
        try:
            decode_image(source.read(entry))
        except Rejected as error:
            line = rejected_line(number, entry, error)
            lines.append(json.dumps(line, sort_keys=True) + "\n")
    return "".join(lines).encode("ascii")
