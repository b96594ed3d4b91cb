"""Copying a finished set between folders and URLs.

Every file is checked by the manifest's sha256, and the manifest is written last. A restart copies
only what is missing.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from shards import spec
from shards.errors import UserError
from shards.files import LOCK, MANIFEST, alone, check_sha256, replacing
from shards.progress import progress
from shards.remote import storage as remote
from shards.remote.place import Place
from shards.remote.retry import retried
from shards.spec import CARD, File, Manifest

MARK = "copying.json"  # which set an unfinished copy is of, as _mark tells it


def copy_set(source: str, target: str, jobs: int = 4) -> tuple[Manifest, int]:
    """Copy the finished set at `source` to `target`; returns its manifest and the files copied.

    Raises UserError if there is no finished set, if a file of it is damaged or missing, or if
    `target` holds anything else; OSError if a store cannot be reached or written.
    """
    origin, place = Place(source.removeprefix("file://").rstrip("/")), Place.of(target)
    data = origin.read(MANIFEST)
    if data is None:
        raise UserError(f"{source} has no {MANIFEST}: it is not a finished set of shards; name one")
    manifest = spec.parse(f"{origin}/{MANIFEST}", data)
    ours = next((f.name for f in manifest.files if f.name in {MANIFEST, MARK, LOCK}), None)
    if ours:
        raise UserError(f"{source} lists a file called {ours}, which is none of a set's")
    if place.is_url:
        return manifest, _copy_files(origin, place, manifest, data, jobs)
    if place.folder.exists() and not place.folder.is_dir():
        raise UserError(f"{target} is a file; name a folder for the shards")
    with alone(place.folder):
        return manifest, _copy_files(origin, place, manifest, data, jobs)


def _copy_files(source: Place, target: Place, manifest: Manifest, data: bytes, jobs: int) -> int:
    """Copy what `target` lacks. Then write `data`, the manifest, if it has none."""
    files, mark = manifest.files, _mark(manifest)
    there = _check_target(target, mark, {file.name: file.bytes for file in files})
    if there is None:
        return 0
    target.write(MARK, mark)
    copied, pool = 0, ThreadPoolExecutor(jobs)
    try:
        tasks = {pool.submit(_copy_file, source, target, f, f.name in there): f for f in files}
        with progress("copying", manifest.count) as bar:
            for task in as_completed(tasks):
                copied += task.result()
                bar.update(tasks[task].count if tasks[task] in manifest.shards else 0)
    finally:
        pool.shutdown(cancel_futures=True)
    sizes = target.sizes()
    wrong = next((file.name for file in files if sizes.get(file.name) != file.bytes), None)
    if wrong:
        raise OSError(f"{target}/{wrong} was written and has another size now; copy again")
    card = source.read(CARD)
    if card is not None and CARD not in sizes:
        target.write(CARD, card)
    if MANIFEST not in sizes:  # one that is there may say what was measured on it
        target.write(MANIFEST, data)
    target.remove(MARK)
    return copied


def _mark(manifest: Manifest) -> bytes:
    """What tells a set from another: its manifest, but for what was measured on it since."""
    data = spec.to_json(replace(manifest, fidelity={}))
    return hashlib.sha256(data).hexdigest().encode("ascii")


def _check_target(target: Place, mark: bytes, files: dict[str, int]) -> set[str] | None:
    """Names in `target` that may be files of this set, to be hashed; None if it is a store that
    has all of it, by their sizes. Raises UserError if it holds anything else.
    """
    sizes = target.sizes()
    data = target.read(MANIFEST) if MANIFEST in sizes else None
    finished = spec.parse(f"{target}/{MANIFEST}", data) if data is not None else None
    begun = target.read(MARK) if MARK in sizes else None
    if (finished and _mark(finished) != mark) or (begun or mark) != mark:
        raise UserError(f"{target} holds another set of shards, or part of one; name a new place")
    if begun is not None:  # what a killed copy left half written is ours to remove
        for name in [n for n in sizes if n.endswith(".tmp") and n.rsplit(".", 2)[0] in files]:
            del sizes[name]
            target.remove(name)
    others = sizes.keys() - files.keys() - {MANIFEST, MARK}
    others -= {CARD} if begun is not None else set()
    if finished is None and (others or (sizes and begun is None)):
        some = min(others or sizes)
        raise UserError(f"{target} holds something else ({some}); name a new or empty place")
    whole = {name for name, size in files.items() if sizes.get(name) == size}
    if finished is None or whole != files.keys() or not target.is_url:
        return whole
    if begun is not None:  # killed between the manifest and the tidying up
        target.remove(MARK)
    return None


def _copy_file(source: Place, target: Place, file: File, there: bool) -> bool:
    """Whether `file` was copied. One that is there already is hashed where it is."""
    if there:
        try:
            with _here(target, file.name) as path:
                check_sha256(path, file.sha256)
            return False
        except ValueError:
            pass  # of that size, but not whole
    if target.is_url:
        with _here(source, file.name) as path:
            check_sha256(path, file.sha256, name=f"{source}/{file.name}")
            target.put(file.name, path)
        return True
    with replacing(target.folder / file.name) as temporary:
        _fetch(source, file.name, temporary)
        check_sha256(temporary, file.sha256, name=f"{source}/{file.name}")
    return True


@contextmanager
def _here(place: Place, name: str) -> Iterator[Path]:
    """The file as a path of this machine: itself, or a copy for as long as the block lasts."""
    if not place.is_url:
        yield place.folder / name
        return
    with tempfile.TemporaryDirectory() as folder:
        _fetch(place, name, Path(folder) / name)
        yield Path(folder) / name


def _fetch(place: Place, name: str, path: Path) -> None:
    """Copy the file `name` at `place` to `path`. Raises UserError if it is missing."""
    try:
        if place.is_url:
            files, folder = remote.filesystem(place.where)
            there = f"{folder}/{name}"
            retried(f"{place}/{name}", lambda: files.get_file(there, str(path)))
        else:
            shutil.copyfile(place.folder / name, path)
    except FileNotFoundError:
        raise UserError(f"{place}/{name} is missing, the manifest lists it") from None
