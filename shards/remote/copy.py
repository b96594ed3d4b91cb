"""Copying a finished set between folders and URLs.

Every file is held to the manifest's sha256, and the manifest is written last. A restart copies only
what is missing.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from shards import spec as _manifest
from shards.errors import UserError
from shards.files import LOCK, MANIFEST, alone, check_sha256, replacing, write_atomically
from shards.progress import progress
from shards.remote import storage as remote
from shards.remote.retry import retried
from shards.remote.storage import is_url
from shards.spec import CARD, File, Manifest

MARK = "copying.json"  # which set an unfinished copy is of: the sha256 of its manifest


def copy_set(source: str, target: str, jobs: int = 4) -> tuple[Manifest, int]:
    """Copy the finished set at `source` to `target`; returns its manifest and the files copied.

    Raises UserError if there is no finished set, if a file of it is damaged or missing, or if
    `target` holds anything else; OSError if a store cannot be reached or written.
    """
    source, target = (place.removeprefix("file://").rstrip("/") for place in (source, target))
    if target.startswith(("http://", "https://")):
        raise UserError(f"{target}: a web server takes no files; copy to a folder, s3:// or gs://")
    data = _read(source, MANIFEST)
    if data is None:
        raise UserError(f"{source} has no {MANIFEST}: it is not a finished set of shards; name one")
    manifest = _manifest.parse(f"{source}/{MANIFEST}", data)
    ours = next((f.name for f in manifest.shards if f.name in {MANIFEST, MARK, LOCK}), None)
    if ours:
        raise UserError(f"{source} lists a shard called {ours}, which is no shard")
    if is_url(target):
        return manifest, _copy_files(source, target, manifest, data, jobs)
    folder = Path(target)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{target} is a file; name a folder for the shards")
    with alone(folder):
        return manifest, _copy_files(source, target, manifest, data, jobs)


def _copy_files(source: str, target: str, manifest: Manifest, data: bytes, jobs: int) -> int:
    """Copy what `target` lacks, and `data`, the manifest, when all of it is there."""
    files = manifest.files
    mark = hashlib.sha256(data).hexdigest().encode("ascii")
    there = _check_target(target, data, mark, {file.name: file.bytes for file in files})
    if there is None:
        return 0
    _write(target, MARK, mark)
    copied, pool = 0, ThreadPoolExecutor(jobs)
    try:
        tasks = {pool.submit(_copy_file, source, target, f, f.name in there): f for f in files}
        with progress("copying", manifest.count) as bar:
            for task in as_completed(tasks):
                copied += task.result()
                bar.update(tasks[task].count if tasks[task] in manifest.shards else 0)
    finally:
        pool.shutdown(cancel_futures=True)
    sizes = _sizes(target)
    wrong = next((file.name for file in files if sizes.get(file.name) != file.bytes), None)
    if wrong:
        raise OSError(f"{target}/{wrong} was written and has another size now; copy again")
    card = _read(source, CARD)
    if card is not None:
        _write(target, CARD, card)
    _write(target, MANIFEST, data)
    _remove(target, MARK)
    return copied


def _check_target(target: str, data: bytes, mark: bytes, files: dict[str, int]) -> set[str] | None:
    """Names in `target` that may be files of this set, None if it is all there, else UserError."""
    sizes = _sizes(target)
    finished = _read(target, MANIFEST) if MANIFEST in sizes else None
    begun = _read(target, MARK) if MARK in sizes else None
    if (finished or data) != data or (begun or mark) != mark:
        raise UserError(f"{target} holds another set of shards, or part of one; name a new place")
    if begun is not None:  # what a killed copy left half written is ours to remove
        for name in [n for n in sizes if n.endswith(".tmp") and n.rsplit(".", 2)[0] in files]:
            del sizes[name]
            _remove(target, name)
    others = sizes.keys() - files.keys() - {MANIFEST, MARK}
    others -= {CARD} if begun is not None else set()
    if finished is None and (others or (sizes and begun is None)):
        some = min(others or sizes)
        raise UserError(f"{target} holds something else ({some}); name a new or empty place")
    whole = {name for name, size in files.items() if sizes.get(name) == size}
    if finished is None or whole != files.keys():
        return whole
    if begun is not None:  # killed between the manifest and the tidying up
        _remove(target, MARK)
    return None


def _copy_file(source: str, target: str, file: File, there: bool) -> bool:
    """Whether `file` was copied: one that is there already is hashed where it is."""
    if there:
        try:
            with _here(target, file.name) as path:
                check_sha256(path, file.sha256)
            return False
        except ValueError:
            pass  # of that size, but not whole
    if is_url(target):
        with _here(source, file.name) as path:
            check_sha256(path, file.sha256)
            files, folder = remote.filesystem(target)
            name = f"{folder}/{file.name}"
            retried(f"{target}/{file.name}", lambda: files.put_file(str(path), name))
        return True
    with replacing(Path(target) / file.name) as temporary:
        _fetch(source, file.name, temporary)
        check_sha256(temporary, file.sha256)
    return True


@contextmanager
def _here(place: str, name: str) -> Iterator[Path]:
    """The file as a path of this machine: itself, or fetched for as long as the block lasts."""
    if not is_url(place):
        yield Path(place) / name
        return
    with tempfile.TemporaryDirectory() as folder:
        _fetch(place, name, Path(folder) / name)
        yield Path(folder) / name


def _fetch(place: str, name: str, path: Path) -> None:
    """Copy the file `name` at `place` to `path`. Raises UserError if it is missing."""
    try:
        if is_url(place):
            files, folder = remote.filesystem(place)
            there = f"{folder}/{name}"
            retried(f"{place}/{name}", lambda: files.get_file(there, str(path)))
        else:
            shutil.copyfile(Path(place) / name, path)
    except FileNotFoundError:
        raise UserError(f"{place}/{name} is missing, the manifest lists it") from None


def _sizes(place: str) -> dict[str, int]:
    """Bytes of everything right in a folder."""
    if is_url(place):
        files, folder = remote.filesystem(place)
        files.invalidate_cache()
        try:
            rows = retried(place, lambda: files.ls(folder, detail=True))
        except FileNotFoundError:
            return {}
        names = ((row["name"].rstrip("/").rpartition("/")[2], row["size"]) for row in rows)
        return {name: int(size or 0) for name, size in names if name}
    return {path.name: path.stat().st_size for path in Path(place).iterdir() if path.name != LOCK}


def _read(place: str, name: str) -> bytes | None:
    try:
        if is_url(place):
            return remote.read_all(f"{place}/{name}")
        return (Path(place) / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(place: str, name: str, data: bytes) -> None:
    if is_url(place):
        files, folder = remote.filesystem(place)
        retried(f"{place}/{name}", lambda: files.pipe_file(f"{folder}/{name}", data))
    else:
        write_atomically(Path(place) / name, data)


def _remove(place: str, name: str) -> None:
    if is_url(place):
        files, folder = remote.filesystem(place)
        retried(f"{place}/{name}", lambda: files.rm_file(f"{folder}/{name}"))
    else:
        (Path(place) / name).unlink(missing_ok=True)
