"""What every long write of a set shares: one writer a folder, and progress that fits its reader.

In: a folder, or what is being worked through. Out: the folder held by this process; lines on
stderr.
"""

import fcntl
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


@contextmanager
def alone(folder: Path, lock: Path) -> Iterator[None]:
    """Hold `lock`, a file in `folder` that is made and removed here, or raise ValueError.

    The kernel lets go of it when the process dies, however it dies.
    """
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is writing into {folder}; wait for it") from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def progress(title: str, total: int, items: Iterable[Any] | None = None, initial: int = 0) -> Any:
    """A tqdm of images on stderr, over `items` if there are any: ten times a second on a terminal,
    every ten seconds in a log.
    """
    pace = 0.1 if sys.stderr.isatty() else 10
    return tqdm(items, title, total, initial=initial, unit="img", mininterval=pace)
