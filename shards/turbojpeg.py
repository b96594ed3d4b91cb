"""JPEG frames of a chunk, each read and decoded, by one call that is without the interpreter lock.

simplejpeg and os.preadv take that lock for each frame, and all threads of a process share it. Here
numba compiles a loop that calls libc and the system's libturbojpeg, which decodes the same pixels.
Without either of the two nothing changes but the speed (docs/decisions.md).
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import simplejpeg

from shards import vectored
from shards.crops import Ints
from shards.record import encode_frame
from shards.vectored import VECTOR, preadv

# Of n records: side; descriptors, first bytes, vectors and counts as in vectored.AtOnce;
# of each its JPEG's bytes, the bytes that its vectors hold, and the address of its pixels.
ReadAndDecode = Callable[[int, Ints, Ints, Ints, Ints, Ints, Ints, Ints], None]
Decode = Callable[[int, int, int, int], int]  # JPEG, its bytes, pixels, side; 0 if sound
DECODE = "int64(int64, int64, int64, int64)"
READ = "void(int64, int64[:], int64[:], int64[:,:,::1], int64[:], int64[:], int64[:], int64[:])"
NAMES = (
    *("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib"),
    f"{sys.prefix}/lib/libturbojpeg.so.0",  # conda's
)
POINTER, NUMBER = ctypes.c_int64, ctypes.c_int  # numba passes addresses as numbers
UNDECODED = -2  # a count: read, but no sound JPEG of this side


@cache
def library() -> Any:
    """The system's libturbojpeg, or None where it is missing or has not what we call."""
    for name in NAMES:
        try:
            found = ctypes.CDLL(name)
            found.tjInitDecompress.argtypes, found.tjInitDecompress.restype = [], POINTER
            found.tjDestroy.argtypes = [POINTER]
            header = [POINTER, POINTER, ctypes.c_ulong, *[POINTER] * 4]
            found.tjDecompressHeader3.argtypes = header
            pixels = [POINTER, POINTER, ctypes.c_ulong, POINTER, *[NUMBER] * 5]
            found.tjDecompress2.argtypes = pixels
            return found
        except (OSError, AttributeError):
            continue
    return None


def decoder(turbojpeg: Any) -> Decode:
    """What decodes a JPEG of `side` x `side` px to RGB, and nothing else, for numba to compile."""
    create, destroy = turbojpeg.tjInitDecompress, turbojpeg.tjDestroy
    header, decompress = turbojpeg.tjDecompressHeader3, turbojpeg.tjDecompress2

    def decode(jpeg: int, size: int, pixels: int, side: int) -> int:
        found = np.zeros(4, np.int32)  # width, height, subsampling, colourspace
        at = found.ctypes.data
        handle = create()  # a used one has the last JPEG's tables, and takes one that lacks its own
        wrong = header(handle, jpeg, size, at, at + 4, at + 8, at + 12)
        if found[0] != side or found[1] != side:  # it would be scaled
            wrong = 1
        if wrong == 0:
            wrong = decompress(handle, jpeg, size, pixels, side, 3 * side, side, 0, 0)  # 0 is RGB
        destroy(handle)
        return int(wrong)

    return decode


def without_lock(decode: Decode) -> ReadAndDecode | None:
    """The loop over the records, compiled, or None where numba is missing."""
    decode = vectored.without_lock(decode, DECODE)

    def read(
        side: int,
        descriptors: Ints,
        starts: Ints,
        vectors: Ints,
        counts: Ints,
        sizes: Ints,
        wanted: Ints,
        pixels: Ints,
    ) -> None:
        parts = vectors.shape[1]
        first, step = vectors.ctypes.data, parts * VECTOR
        for number in range(len(starts)):
            count = preadv(
                int(descriptors[number]), first + number * step, parts, int(starts[number])
            )
            jpeg, size = vectors[number, 0]
            if (
                count == wanted[number]
                and 0 <= sizes[number] <= size
                and decode(jpeg, sizes[number], pixels[number], side) != 0
            ):
                count = UNDECODED
            counts[number] = count

    loop: ReadAndDecode | None = vectored.without_lock(read, READ)
    return loop


@cache
def compiled() -> ReadAndDecode | None:
    """The loop, or None where numba or libturbojpeg is missing, or where its pixels are not those
    of simplejpeg. The first call takes about a second.
    """
    if library() is None:
        return None
    decode = decoder(library())
    read = without_lock(decode)
    return read if read and all(_same(decode, side) for side in (16, 61, 256)) else None


def _same(decode: Decode, side: int) -> bool:
    """Whether `decode` gives the pixels of simplejpeg, of noise on a slope."""
    noise = np.random.default_rng(side).integers(0, 128, (side, side, 3))
    slope = np.linspace(0, 127, side)[:, None, None]
    jpeg = np.frombuffer(encode_frame((noise + slope).astype(np.uint8), 90), np.uint8)
    pixels = np.zeros((side, side, 3), np.uint8)
    wrong = decode(jpeg.ctypes.data, len(jpeg), pixels.ctypes.data, side)
    return not wrong and np.array_equal(pixels, simplejpeg.decode_jpeg(jpeg, "RGB"))
