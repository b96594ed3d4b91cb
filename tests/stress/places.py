"""Places that fail: full and read-only disks, a full /dev/shm, few descriptors, another clock.

The calling process alone lives in such a place (a mount namespace of its own where it needs one,
which takes root); the machine's own disks and clock are never touched.
"""

import ctypes
import os
import resource
import signal
import time
from pathlib import Path

NEW_MOUNTS, PRIVATE, RECURSIVE = 0x20000, 1 << 18, 1 << 14
READ_ONLY, REMOUNT, BIND = 1, 32, 4096


def own_mounts() -> None:
    """From here on, what this process mounts is seen by it and its children only."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "no mount namespace of one's own")
    _mount(None, "/", None, PRIVATE | RECURSIVE)


def allowed() -> bool:
    """Whether this machine lets us have mounts of our own."""
    pid = os.fork()
    if not pid:
        try:
            own_mounts()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def small_disk(place: Path, size: int, again: bool = False) -> None:
    """A disk of `size` bytes at `place`; `again` changes the size of the one there."""
    _mount("tmpfs", str(place), "tmpfs", REMOUNT if again else 0, f"size={size}")


def read_only(place: Path, off: bool = False) -> None:
    """Make the folder `place` one that cannot be written to, or again one that can."""
    if not off:
        _mount(str(place), str(place), None, BIND)
    _mount(None, str(place), None, REMOUNT | BIND | (0 if off else READ_ONLY))


def full_memory() -> None:
    """A /dev/shm without room."""
    _mount("tmpfs", "/dev/shm", "tmpfs", 0, "size=65536")
    Path("/dev/shm/filler").write_bytes(bytes(65536))


def short_files(size: int) -> None:
    """No file may grow beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def few_descriptors(count: int) -> None:
    """No more than `count` files may be open."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def early_clock() -> None:
    """The time of day runs, forty years ago."""
    now = time.time
    time.time = lambda: now() - 40 * 365 * 86400


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [None if t is None else t.encode() for t in (source, target, kind)]
    if libc.mount(*texts, ctypes.c_ulong(flags), data.encode()):
        error = ctypes.get_errno()
        raise OSError(error, f"mount {target}: {os.strerror(error)}")
