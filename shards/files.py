"""What every write of a set shares: whole files or none, one writer a folder, progress to read.

In: bytes and a path; a folder; what is being worked through. Out: a file that survives a crash; the
folder held by this process; lines on stderr.
"""

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"
LEFT = re.compile(r"\.[0-9a-f]{12}\.tmp")  # how names of temporary_of end


def temporary_of(path: Path) -> Path:
    """A name beside `path` that no other process uses, on this machine or any other."""
    return path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written in `folder`, where nobody else may write."""
    for path in folder.glob("*.tmp"):
        if LEFT.search(path.name):
            path.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes, durable: bool = True) -> None:
    """Write `data` to `path` so that after a crash the file is whole, or as it was before.

    Not `durable`, that holds for a killed process but not for a power cut, and saves two syncs.
    """
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def alone(folder: Path, lock: Path | None = None) -> Iterator[None]:
    """Write into `folder`, made if need be, as nobody else does, or raise ValueError.

    `lock`, by default .lock in the folder, is made and removed here; the kernel lets go of it when
    the process dies, however it dies. What a killed process left half written there goes. The
    OSError of a full disk names the folder and what to do.
    """
    lock = lock or folder / LOCK
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(lock))
        except OSError:  # held, or its last holder removed it since it was opened
            ours = False
        if not ours:
            raise ValueError(f"another process is writing into {folder}; wait for it")
        try:
            sweep(folder)
            yield
        except OSError as error:
            raise _named_if_full(error, folder) from error
        finally:
            lock.unlink(missing_ok=True)


def progress(
    title: str,
    total: float,
    items: Iterable[Any] | None = None,
    initial: int = 0,
    unit: str = "img",
    delay: float = 0,
) -> Any:
    """A tqdm on stderr, over `items` if there are any: often on a terminal, a line every ten
    seconds in a log. With `delay`, work that takes fewer seconds shows nothing.
    """
    from shards.progress import Bar

    scale = unit == "B"
    return Bar(items, title, total, unit=unit, unit_scale=scale, initial=initial, delay=delay)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Say on stderr what is being done, and for how long, while the block takes over a second."""
    from shards.progress import Bar

    with Bar(None, title, bar_format="{desc} ... {elapsed}", delay=1):
        yield


def _named_if_full(error: OSError, folder: Path) -> OSError:
    """`error`, or what to do about it if the disk of `folder` is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    words = "the disk is full; free space, then run the same command again (what is done is kept)"
    return OSError(error.errno, words, str(folder))
