"""Files of a source by path or URL, and their bytes."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import BinaryIO, TypeVar

from preprocess.decode import Rejected
from shards.remote import storage as remote
from shards.remote.storage import is_url

Result = TypeVar("Result")
# Not the image's fault: a build stops, and goes on when the machine is well again.
MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}


def join(root: str, name: str) -> str:
    """The place called `name` below `root`; `root` itself if the name is empty."""
    return os.path.join(root, name) if name else root


def kind_of(where: str) -> str:
    """`file`, `folder`, or nothing if there is no such place."""
    if is_url(where):
        return remote.kind_of(where)
    return "folder" if os.path.isdir(where) else "file" if os.path.isfile(where) else ""


def opened(where: str, ahead: bool = True) -> BinaryIO:
    """A file to read from front to back with jumps `ahead`, or in any order."""
    return remote.opened(where, ahead) if is_url(where) else open(where, "rb")


def of_each(root: str, call: Callable[[str], Result], parts: Iterable[str]) -> Iterator[Result]:
    """`call` of each part below `root`, in order; in a store, 16 at a time."""
    if not is_url(root):
        yield from map(call, parts)
        return
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(call, parts)


def read_all(where: str) -> bytes:
    """All bytes of a file. Raises OSError."""
    if is_url(where):
        return remote.read_all(where)
    with open(where, "rb") as file:
        return file.read()


def read_file(where: str, limit: int) -> bytes:
    """The first `limit` bytes of a file of its own. Raises Rejected with reason vanished,
    unreadable or not-a-file; OSError if a store cannot be reached or the machine is at fault.
    """
    with _rejecting(where):
        if is_url(where):
            return remote.read_range(where, 0, limit)
        with _opened(where) as file:
            _check_regular(file)
            return file.read(limit)


def read_part(where: str, start: int, size: int) -> bytes:
    """`size` bytes from `start` on of a file that holds many images and stays open. Raises as
    read_file does.
    """
    with _rejecting(where):
        if is_url(where):
            return remote.read_range(where, start, size)
        file = _kept_open(where, version_of(where))
        _check_regular(file)
        return os.pread(file.fileno(), size, start)


@contextmanager
def _rejecting(where: str) -> Iterator[None]:
    """As Rejected, an OSError that is the fault of the file `where`."""
    try:
        yield
    except FileNotFoundError:
        raise Rejected("vanished", "it was listed and is gone") from None
    except OSError as error:
        if is_url(where) or error.errno in MACHINE:
            raise
        raise Rejected("unreadable", error.strerror or str(error)) from None


def _opened(where: str) -> BinaryIO:
    # Without O_NONBLOCK, opening a pipe that took a file's name would wait for ever.
    return open(os.open(where, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _check_regular(file: BinaryIO) -> None:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise Rejected("not-a-file", "it is a folder, pipe, socket or device")


@lru_cache(maxsize=16)
def _kept_open(where: str, version: tuple[int, ...]) -> BinaryIO:
    """`where`, kept open until 16 others were asked for. A new file of that name is opened anew."""
    return _opened(where)


def version_of(where: str) -> tuple[int, ...]:
    """A value that changes when another file takes the name `where`: part of the key of what is
    kept. Raises FileNotFoundError. A store's files are taken not to change.
    """
    if is_url(where):
        return ()
    facts = os.stat(where)
    return facts.st_ino, facts.st_size, facts.st_mtime_ns
