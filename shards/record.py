"""One record as named byte members, and back: frame, label, source's size, maps and bank.

The layout is FORMAT.md; tests/golden holds its bytes.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.errors import UserError
from shards.spec import BANK_HEAD, LARGEST

KEY_DIGITS = 9
UINT8 = np.dtype(np.uint8)
JPEG, RAW = "jpg", "frame.npy"
LABEL, META, MAPS = "cls", "json", "maps.npy"
LEVEL = 17  # maps have the 16 densities 0, 17, ... 255 of 255: more would be lost in their error
BOX = np.dtype([("box", "<u4", 4), ("flips", "u1", 2)])  # BANK_HEAD bytes before a slot's counts


@dataclass(frozen=True, slots=True)
class Bank:
    """K crops of a source. boxes: uint32 [K, 4] (top, left, height, width, source pixels); flips:
    uint8 [K, 2] (horizontal, vertical), 0 or 1; counts: uint8 [K, D, c, c], marked pixels of each
    BANK_CELL of the crop as flipped, density = count / 64.
    """

    boxes: NDArray[np.uint32]
    flips: NDArray[np.uint8]
    counts: NDArray[np.uint8]

    def equals(self, other: "Bank") -> bool:
        """Whether every number is the same."""
        return (
            np.array_equal(self.boxes, other.boxes)
            and np.array_equal(self.flips, other.flips)
            and np.array_equal(self.counts, other.counts)
        )


@dataclass(frozen=True, slots=True)
class Record:
    """What a shard holds of one source image.

    `frame` is the encoded square frame (a JPEG file or a .npy file), `maps` uint8 [D, G, G] with
    density = value / 255 in steps of LEVEL, one map per detector in the manifest's order. `label`
    is -1 for none, `height` and `width` are the source's in pixels, `source` is its name below the
    source's root.
    `bank` holds stored crops with their exact counts, if the set has them.
    """

    key: str
    frame: bytes
    label: int
    height: int
    width: int
    source: str
    maps: NDArray[np.uint8]
    bank: Bank | None = None


def key_of(index: int) -> str:
    """The key of input number `index`: its decimal digits, zero-padded to nine."""
    return f"{index:0{KEY_DIGITS}d}"


def npy_bytes(array: NDArray[Any]) -> bytes:
    """`array` as a .npy version 1.0 file: 128 header bytes for our shapes, then C-order data."""
    return npy_header(array.shape, array.dtype) + array.tobytes()


@lru_cache(maxsize=64)
def npy_header(shape: tuple[int, ...], dtype: Any = UINT8) -> bytes:
    """What stands before the data of a .npy file of `shape` and `dtype`."""
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    facts = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


def npy_size(array: NDArray[Any]) -> int:
    """len(npy_bytes(array))."""
    return len(npy_header(array.shape, array.dtype)) + array.nbytes


def npy_array(data: bytes) -> NDArray[np.uint8]:
    """The uint8 array of a .npy file; what may follow it is left alone.

    Raises UserError for any other dtype, or for objects.
    """
    try:
        array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # NumPy tokenizes the header: hostile bytes raise anything
        raise UserError(f"the .npy member is damaged: {error}") from None
    if array.dtype != np.uint8:
        raise UserError("the .npy member does not hold a uint8 array")
    return array


def members(record: Record) -> list[tuple[str, bytes]]:
    """The members of `record` in stored order: frame, maps with bank, label, metadata."""
    frame_suffix = RAW if record.frame.startswith(b"\x93NUMPY") else JPEG
    bank = npy_bytes(to_rows(record.bank)) if record.bank else b""
    meta = {"height": record.height, "source": record.source, "width": record.width}
    return [
        (frame_suffix, record.frame),
        (MAPS, npy_bytes(packed(record.maps)) + bank),
        (LABEL, str(record.label).encode("ascii")),
        (META, json.dumps(meta, sort_keys=True, separators=(",", ":")).encode("ascii")),
    ]


def from_members(key: str, parts: Mapping[str, bytes]) -> Record:
    """The record whose members are `parts` (suffix to bytes). Raises UserError if one is wrong."""
    frames = [suffix for suffix in (JPEG, RAW) if suffix in parts]
    missing = {LABEL, META, MAPS} - set(parts)
    if len(frames) != 1 or missing or len(parts) != 4:
        raise UserError(
            f"record {key} has members {sorted(parts)}; the format wants {MAPS}, {LABEL}, {META} "
            f"and one of {JPEG} or {RAW}"
        )
    try:
        meta: dict[str, Any] = json.loads(parts[META])
        height, width, source = meta["height"], meta["width"], meta["source"]
        label = int(parts[LABEL])
        halves = npy_array(parts[MAPS])
        if halves.ndim != 3:
            raise UserError(f"the maps are {halves.shape}")
        rest = parts[MAPS][npy_size(halves) :]
        bank = from_rows(npy_array(rest), len(halves)) if rest else None
        maps = unpacked(halves)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"record {key} does not parse: {error}") from None
    if not (isinstance(height, int) and isinstance(width, int) and isinstance(source, str)):
        raise UserError(f"record {key}: height and width must be integers and source a string")
    return Record(key, parts[frames[0]], label, height, width, source, maps, bank)


def packed(maps: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Maps [..., G, G] with values in steps of LEVEL as stored: [..., G, G / 2], two cells per
    byte, the left one in the low half.
    """
    fours = maps // LEVEL
    return np.asarray(fours[..., ::2] | fours[..., 1::2] << 4, np.uint8)


def unpacked(halves: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The maps [..., G, G] of packed ones [..., G, G / 2]."""
    fours = np.stack([halves & 15, halves >> 4], axis=-1)
    return fours.reshape(*halves.shape[:-1], 2 * halves.shape[-1]) * np.uint8(LEVEL)


def encode_frame(rgb: NDArray[np.uint8], quality: int) -> bytes:
    """A uint8 RGB [F, F, 3] frame as a 4:2:0 JPEG of `quality` 1 to 100, or as .npy if it is 0."""
    if quality == 0:
        return npy_bytes(rgb)
    encoded: bytes = simplejpeg.encode_jpeg(rgb, quality, "RGB", "420")
    return encoded


def decode_frame(frame: bytes) -> NDArray[np.uint8]:
    """The uint8 RGB [F, F, 3] pixels of an encoded frame. Raises UserError if it is damaged."""
    if frame.startswith(b"\x93NUMPY"):
        return npy_array(frame)
    if not frame.endswith(b"\xff\xd9"):
        raise UserError("the JPEG frame does not end in an end-of-image marker")
    height, width, _ = jpeg_header(frame)
    if max(height, width) > LARGEST:
        raise UserError(f"the frame says {width} x {height} px; there are none beyond {LARGEST}")
    pixels = cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR_RGB)
    if pixels is None:
        raise UserError("the frame is not a JPEG that decodes")
    return pixels


def jpeg_header(data: bytes) -> tuple[int, int, str]:
    """Height, width and colour space of a JPEG. Raises UserError if its header does not decode."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except (ValueError, KeyError) as error:  # KeyError: a subsampling it has no name for
        raise UserError(f"the frame is not a JPEG that decodes ({error})") from None
    return height, width, space


def to_rows(bank: Bank) -> NDArray[np.uint8]:
    """`bank` as it is stored: uint8 [K, bytes], a BOX and the counts per slot."""
    crops = np.zeros(len(bank.boxes), BOX)
    crops["box"], crops["flips"] = bank.boxes, bank.flips
    plain = crops.view(np.uint8).reshape(len(crops), BANK_HEAD)
    return np.concatenate([plain, bank.counts.reshape(len(crops), -1)], axis=1)


def from_rows(rows: NDArray[np.uint8], detectors: int) -> Bank:
    """The bank of uint8 [n, bytes] rows, of one record or of a batch's chosen slots.

    Raises UserError if they are not of that shape for any number of cells.
    """
    if rows.ndim != 2 or not len(rows) or rows.shape[1] < BANK_HEAD:
        raise UserError(f"the bank's rows are {rows.shape}")
    cells = isqrt((rows.shape[1] - BANK_HEAD) // detectors)
    if not cells or rows.shape[1] != BANK_HEAD + detectors * cells * cells:
        raise UserError(f"the bank's rows are {rows.shape}, of no square for {detectors} detectors")
    crops = np.ascontiguousarray(rows[:, :BANK_HEAD]).view(BOX)[:, 0]
    counts = rows[:, BANK_HEAD:].reshape(len(rows), detectors, cells, cells)
    return Bank(crops["box"], crops["flips"], counts)
