"""Vectored reads of many records by one call, which releases the interpreter lock once; os.preadv
does so for each record. Compiled by numba, if that is installed (docs/decisions.md).
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from shards.crops import Ints

# Of n records: descriptors int64 [n], first bytes int64 [n], where they go int64 [n, parts, 2]
# (addresses and lengths), and what is filled: how many bytes were read, int64 [n], or -1.
AtOnce = Callable[[Ints, Ints, Ints, Ints], None]
READ = "void(int64[:], int64[:], int64[:,:,::1], int64[:])"
VECTOR = 16  # bytes of the kernel's iovec: one address and one length
preadv = ctypes.CDLL(None).preadv
preadv.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
preadv.restype = ctypes.c_int64


def vector(memory: memoryview) -> tuple[int, int]:
    """Address and length of `memory`, which must live as long as they are used."""
    return np.frombuffer(memory, np.uint8).ctypes.data if len(memory) else 0, len(memory)


def at_once(descriptors: Ints, starts: Ints, vectors: Ints, counts: Ints) -> None:
    """What numba compiles."""
    parts = vectors.shape[1]
    first, step = vectors.ctypes.data, parts * VECTOR
    for number in range(len(starts)):
        vector = first + number * step
        counts[number] = preadv(int(descriptors[number]), vector, parts, int(starts[number]))


def without_lock(function: Any, signature: str = READ) -> Any:
    """`function`, compiled for `signature` (numba's), or None where numba is missing."""
    try:
        from numba import njit

        return njit(signature, nogil=True)(function)
    except Exception:  # missing, broken or too old; it also refuses a NumPy newer than it knows
        return None


@cache
def compiled() -> AtOnce | None:
    """`at_once` without the lock, or None where numba is missing. The first call takes 0.7 s."""
    read: AtOnce | None = without_lock(at_once)
    return read
