"""What every write of a set shares: whole files or none, one writer a folder, progress to read.

In: bytes and a path; a folder; what is being worked through. Out: a file that survives a crash; the
folder held by this process; lines on stderr.
"""

import fcntl
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

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
    the process dies, however it dies. What a killed process left half written there goes.
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
        finally:
            lock.unlink(missing_ok=True)


def progress(title: str, total: int, items: Iterable[Any] | None = None, initial: int = 0) -> Any:
    """A tqdm of images on stderr, over `items` if there are any: ten times a second on a terminal,
    every ten seconds in a log.
    """
    pace = 0.1 if sys.stderr.isatty() else 10
    return tqdm(items, title, total, initial=initial, unit="img", mininterval=pace)


@contextmanager
def busy(title: str, pace: float = 0) -> Iterator[None]:
    """Say on stderr that `title` is under way and for how long, every `pace` seconds; 0: every
    second on a terminal, every ten in a log. For work that has no steps to count.
    """
    terminal, done, begin = sys.stderr.isatty(), threading.Event(), time.monotonic()
    pace = pace or (1 if terminal else 10)

    def watch() -> None:
        while not done.wait(pace):
            line = f"{title}: {time.monotonic() - begin:.0f} s"
            sys.stderr.write(f"\r{line}" if terminal else f"{line}\n")
            sys.stderr.flush()

    watcher = threading.Thread(target=watch, daemon=True, name="busy")
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        if terminal:
            sys.stderr.write("\r\033[K")  # the line goes: what was found takes its place
            sys.stderr.flush()
