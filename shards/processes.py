"""Reading and decoding in processes, into memory that they share with the loader.

For trainers whose own thread waits for the interpreter lock. Threads of the loader take it twice
per JPEG file, processes once per chunk. A process knows no plan: it gets places, and returns what
is wrong with them. It ends when the loader's end of its pipe closes, however the loader ends.
"""

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.crops import Ints
from shards.dataset import Held
from shards.errors import UserError
from shards.reading import Layout, Reader, buffers_of

START = "import sys; sys.path[:] = {path!r}; from shards.processes import serve; serve({pipe})"


class Shared:
    """Memory without a name, seen by all that have its descriptor. The kernel frees it with the
    last of them.

    `allocate` gives uint8 arrays, one behind the other; the same calls give the same arrays in any
    process. `pin`, if set, is called with each.
    """

    pin: Callable[[NDArray[np.uint8]], None] | None = None

    def __init__(self, descriptor: int = -1) -> None:
        if not hasattr(os, "memfd_create"):
            raise UserError("processes of the loader need Linux; use threads")
        self.mine, self.end = descriptor < 0, 0
        self.descriptor = os.memfd_create("batches", os.MFD_CLOEXEC) if self.mine else descriptor

    def allocate(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """The next array of `shape`."""
        size = int(np.prod(shape))
        if not size:
            return np.empty(shape, np.uint8)
        begin, self.end = self.end, self.end - (-size // mmap.PAGESIZE) * mmap.PAGESIZE
        if self.mine:
            os.ftruncate(self.descriptor, self.end)
        array = np.frombuffer(mmap.mmap(self.descriptor, size, offset=begin), np.uint8)
        if self.pin:
            self.pin(array)
        return array.reshape(shape)

    def __del__(self) -> None:
        if self.mine:
            os.close(self.descriptor)


class Processes:
    """`count` processes that read into the loader's buffers, of `shape` (batches, samples).

    `read` is as Reader's, for any number of threads. sets: of each its layout, the paths of its
    shards, and how many of them a process may keep open.
    """

    def __init__(
        self,
        count: int,
        shared: Shared,
        sets: Sequence[tuple[Layout, list[str], int]],
        shape: tuple[int, int],
    ) -> None:
        self.idle: SimpleQueue[tuple[Connection, subprocess.Popen[bytes]]] = SimpleQueue()
        self.all: list[tuple[Connection, subprocess.Popen[bytes]]] = []
        facts = shared.descriptor, sets, shape
        for _ in range(count):
            mine, theirs = Pipe()
            start = START.format(path=sys.path, pipe=theirs.fileno())
            given = theirs.fileno(), shared.descriptor
            process = subprocess.Popen(
                [sys.executable, "-c", start], stdin=subprocess.DEVNULL, pass_fds=given
            )
            theirs.close()
            self.all.append((mine, process))
            self.idle.put((mine, process))
        for pipe, _ in self.all:  # while they start
            pipe.send(facts)

    def read(self, number: int, owner: int, places: Ints) -> dict[int, str]:
        """As Reader.read, of set `owner` into the loader's buffers `number`, by any process that is
        idle.
        """
        pipe, process = self.idle.get()
        try:
            pipe.send((number, owner, places))
            problems: dict[int, str] | OSError = pipe.recv()
        except (EOFError, OSError):
            raise ChildProcessError(
                f"a process of the loader ended (status {process.wait()}); if memory is short, use "
                "fewer workers"
            ) from None
        finally:
            self.idle.put((pipe, process))
        if isinstance(problems, OSError):
            raise problems
        return problems

    def end(self) -> None:
        """End all of them. Whoever waits in `read` is told."""
        for _, process in self.all:
            process.kill()
        for _, process in self.all:
            process.wait()

    def close(self) -> None:
        """Close the pipes, when nobody is in `read`."""
        for pipe, _ in self.all:
            pipe.close()


def serve(descriptor: int) -> None:
    """What a process does: it answers until the loader is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # to a whole group, they are the loader's
        signal.signal(number, signal.SIG_IGN)
    pipe: Any = Connection(descriptor)
    memory, sets, (count, size) = pipe.recv()
    shared = Shared(memory)
    layouts = [layout for layout, *_ in sets]
    buffers = [buffers_of(layouts, size, shared.allocate) for _ in range(count)]

    def opener(paths: list[str], files: int) -> Callable[[int], Held]:
        return lru_cache(files)(
            lambda shard: Held(os.open(paths[shard], os.O_RDONLY | os.O_CLOEXEC))
        )

    readers = [Reader(layout, opener(paths, files)) for layout, paths, files in sets]
    while True:
        try:
            number, owner, places = pipe.recv()
            try:
                found: dict[int, str] | OSError = readers[owner].read(
                    buffers[number][owner], places
                )
            except OSError as error:
                found = error
            pipe.send(found)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
