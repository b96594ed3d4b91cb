"""Files of a set: written whole or not at all, by one process per folder, and checked."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import UserError

MANIFEST = "manifest.json"  # of a finished set
LOCK = ".lock"
PART = 1 << 20  # bytes that are hashed at once
TYPED_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # s3://a, which a Path makes s3:/a
LEFT = re.compile(r"\.[0-9a-f]{12}\.tmp")  # how names of temporary_of end


def temporary_of(path: Path) -> Path:
    """A name beside `path` that no other process uses, on this machine or any other."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`, where nobody else may write."""
    for path in folder.glob("*.tmp"):
        if LEFT.search(path.name):
            path.unlink(missing_ok=True)


def check_local(path: Path) -> None:
    """UserError if `path` was typed as a URL, where only files of this machine are written."""
    if TYPED_URL.match(str(path)):
        raise UserError(f"{path} is a URL; this is written on this machine only: name a local path")


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary path to write; when the block ends, it takes the place of `path`.

    After a crash `path` is whole, or as it was before. Without `durable` this holds for a killed
    process but not for a power cut, and two syncs are saved. If the block raises, `path` is
    untouched.
    """
    temporary = temporary_of(path)
    try:
        yield temporary
        if durable:
            sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if str(error.filename) == str(temporary):
            error.filename = str(path)  # which people know
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync(path.parent)


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Write `data` to `path`, as `replacing` does."""
    with replacing(path, durable) as temporary:
        temporary.write_bytes(data)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path, lock: Path | None = None) -> Iterator[None]:
    """Be the only process that writes into `folder`, which is made if it is missing; or UserError.

    `lock`, by default .lock in the folder, is made and removed here. The kernel frees it when the
    process dies, in whatever way. What a killed process left half written is removed.
    """
    with locked(lock or folder / LOCK, folder), naming_if_full(folder):
        sweep(folder)
        yield


@contextmanager
def locked(lock: Path, place: object, shared: bool = False) -> Iterator[None]:
    """Hold the file `lock`, made here, while writing into `place`. UserError if somebody else does.

    `shared`: together with others that share it. Only a process that held it alone removes it.
    """
    check_local(lock.parent)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
        except OSError:  # held, or its last holder removed it since it was opened
            ours = False
        if not ours:
            raise UserError(f"another process is writing into {place}; wait for it")
        try:
            yield
        finally:
            if not shared:
                lock.unlink(missing_ok=True)


@contextmanager
def naming_if_full(folder: Path) -> Iterator[None]:
    """If a disk is full, have the OSError name `folder`, which is on it, and say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = "free space, then run the same command again (what is done is kept)"
        raise OSError(error.errno, f"the disk is full; {what}", str(folder)) from error


def check_sha256(
    path: Path,
    expected: str,
    told: Callable[[int], object] = lambda count: None,
    name: Path | str | None = None,
) -> None:
    """Raise UserError unless `path` can be read and its sha256 (hex) is `expected`; `told` as in
    sha256_of. `name`: what the error calls it.
    """
    name = name or path
    try:
        actual = sha256_of(path, told)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); {mending(path)}") from None
    if actual != expected:
        raise UserError(
            f"{name} is damaged: its sha256 is {actual[:12]}..., the manifest says "
            f"{expected[:12]}...; {mending(path)}"
        )


def sha256_of(path: Path, told: Callable[[int], object] = lambda count: None) -> str:
    """sha256 (hex) of a file's content. `told` is called with the bytes of each part once it is
    hashed.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(PART))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            told(count)
    return digest.hexdigest()


def check_size(path: Path, expected: int) -> None:
    """Raise UserError unless the file `path` exists and has `expected` bytes."""
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing, the manifest lists it; {mending(path)}") from None
    if actual != expected:
        raise UserError(f"{path} has {actual} bytes, the manifest says {expected}; {mending(path)}")


def mending(path: Path) -> str:
    """What to do about `path`, a file of a set that is missing or damaged."""
    folder, words = path.parent, shlex.quote(str(path.parent))
    if path.suffix == ".beton" or any(folder.glob("*.beton")):
        return f"convert it again: kamim shards convert FOLDER --out {words}"
    if not (folder / MANIFEST).exists():  # a copy under way, or a cache of a store's shards
        return "restore it where it came from"
    door = "maps" if any(folder.glob("shard-*.npy")) else "shards"
    return f"restore it, or type: kamim {door} build SOURCE {words} --repair"
