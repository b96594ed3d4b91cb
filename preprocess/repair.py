"""Makes a finished set whole again, to the same bytes, where files are missing or damaged.

A rebuilt file is checked by the manifest's sha256 before it replaces the damaged one.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from preprocess import BuildError
from preprocess import executors as backends
from preprocess.building import claim, index_in, names_in, shard_size_for, sized, write_missing
from preprocess.compare import (
    check_classes,
    check_manifest_is_not_lost,
    compare,
    facts_begun,
    facts_of,
    facts_of_set,
    flags_of,
)
from preprocess.datasets import check_outside
from preprocess.decode import Rejected, decode_image
from preprocess.shard import Job, make_record, read_rows, rejected_line, row_name
from preprocess.source import Source
from shards.errors import UserError
from shards.files import MANIFEST, sync, write_atomically
from shards.index import flaws_of_files
from shards.names import lists_of
from shards.progress import progress
from shards.record import npy_bytes
from shards.remote.place import Place
from shards.spec import File, Manifest, Settings, load, sha256_of_bytes
from shards.tar import index_of


def repair_shards(
    source: Source,
    out: Path | str,
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
    place = Place.of(out)
    if place.is_url:
        raise UserError(
            f"--repair works in a folder: fetch the files of {place} with the store's own tool, "
            "repair them here, and put back the ones that it names"
        )
    out = place.folder
    check_outside(source, str(place))
    if facts_begun(place) and not (out / MANIFEST).exists():
        raise UserError(f"{out} is unfinished; the same command without --repair goes on")
    check_manifest_is_not_lost(place, place.sizes())
    settings = sized(settings, source)
    finished, facts = load(out), facts_of(source, settings)
    if finished.container == "ffcv":
        raise UserError(f"{out} is an FFCV set; remove it and convert the set it was made from")
    size = shard_size_for(len(source.entries), settings.frame > 0)
    flags = flags_of(finished.settings, size)
    compare(out, facts_of_set(finished), facts, f"give those of the set to repair it: {flags}")
    check_classes(place, finished, source)
    with claim(source, settings, place, facts, repair=True) as job:
        files = finished.files
        flaws = flaws_of_files(out, files)
        job = replace(job, out=job.work)
        every = finished.container == "maps" and finished.index.name in flaws  # only rows have it
        numbers = [n for n, shard in enumerate(finished.shards) if every or shard.name in flaws]
        write_missing(source, job, numbers, backend, scheduler, jobs, "repairing")
        built = read_rows(job.work, job.out, job.fingerprint, numbers)
        hashes = {number: row["file"]["sha256"] for number, row in built}
        for number in numbers:
            file = finished.shards[number]
            _put(job, number, hashes.get(number), out / file.name, file)
        sync(out)
        if flaws.keys() - {shard.name for shard in finished.shards}:
            _restore_lists(source, job, out, finished, numbers if every else [])
    return [file.name for file in files if file.name in flaws]


def _put(job: Job, number: int, sha256: str | None, path: Path, file: File) -> None:
    """Shard `number` from the work folder to `path`, if it is what the manifest says."""
    if sha256 != file.sha256:
        job.work.remove(row_name(number))  # or it would be found finished
        job.out.remove(file.name)
        raise _changed(path)
    (job.out.folder / file.name).replace(path)


def _changed(path: Path) -> BuildError:
    return BuildError(
        f"{path} cannot be built to the bytes that its manifest says, though source, settings and "
        "versions are the same: an image may be unreadable now, or its content changed; build "
        "into a new folder"
    )


def _restore_lists(
    source: Source, job: Job, out: Path, finished: Manifest, built: list[int]
) -> None:
    """index.npy from the shards, or the rows of those `built`, rejected.jsonl from the inputs that
    it lacks, and the names, if the set has them, from the source.
    """
    if built:
        rows = read_rows(job.work, Place(str(out)), job.fingerprint, built)
        index = np.concatenate([index_in(row) for _, row in rows])
    elif finished.container == "maps":
        index = np.load(out / finished.index.name, allow_pickle=False)
    else:
        shards = progress("indexing", len(finished.shards), finished.shards, unit="shard", delay=1)
        index = np.concatenate([index_of(out / shard.name, finished.settings) for shard in shards])
    rejected = _rejected(source, index, finished.settings)
    lists = [(finished.index, npy_bytes(index)), (finished.rejected, rejected)]
    if finished.names:
        lists += zip(finished.names, lists_of(names_in(source, index), source.kind), strict=True)
    for file, data in lists:
        if sha256_of_bytes(data) != file.sha256:
            raise _changed(out / file.name)
        write_atomically(out / file.name, data)


def _rejected(source: Source, index: NDArray[np.void], settings: Settings) -> bytes:
    """The lines of the inputs that are in no shard: each is looked at again."""
    written, lines = set(index["key"].tolist()), []
    for number in sorted(set(range(len(source.entries))) - written):
        entry = source.entries[number]
        try:
            make_record(decode_image(source.read(entry)), number, entry, settings)
        except Rejected as error:
            line = rejected_line(number, entry, error)
            lines.append(json.dumps(line, sort_keys=True) + "\n")
    return "".join(lines).encode("ascii")
