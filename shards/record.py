"""One record as named byte members, and back: frame, label, source's size, densities and bank.

The layout is FORMAT.md; tests/golden holds its bytes.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from shards.errors import UserError
from shards.spec import FIXED_POINT, LARGEST, Settings

KEY_DIGITS = 9
UINT8, UINT16 = np.dtype(np.uint8), np.dtype("<u2")
JPEG, RAW, META, LABEL = "jpg", "frame.npy", "json", "cls"
DENSITY, COUNTS, WEIGHTS = "density", "counts", "weights"
LARGEST_BOX = 1 << 31  # px of a source's side


class Array(NamedTuple):
    """An array that every record of a set has: whose it is, which, and what its .npy file says."""

    detector: str
    kind: str  # DENSITY, COUNTS or WEIGHTS
    shape: tuple[int, ...]
    dtype: np.dtype[Any] = UINT8

    @property
    def name(self) -> str:
        """What it is called in stores that have no .npy files."""
        return f"{self.detector}.{self.kind}"

    @property
    def header(self) -> bytes:
        """What stands before the data in its .npy file."""
        return npy_header(self.shape, self.dtype)

    @property
    def bytes(self) -> int:
        """Of the data alone."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


def arrays_of(settings: Settings) -> list[Array]:
    """The arrays of each record of a set with `settings`, in stored order."""
    grid, cells = (settings.grid,) * 2, (settings.cells,) * 2
    names = [detector.name for detector in settings.detectors]
    arrays = [Array(name, DENSITY, grid) for name in names]
    if settings.bank:
        arrays += [Array(name, COUNTS, (settings.bank, *cells)) for name in names]
    if settings.weights:
        side = settings.crop // settings.weights[1]
        slots = (settings.bank,) if settings.bank else ()
        weighed = [detector.name for detector in settings.detectors if detector.has_keypoints]
        arrays += [Array(name, WEIGHTS, (*slots, side, side), UINT16) for name in weighed]
    return arrays


def fields_of(settings: Settings) -> list[Array]:
    """As arrays_of, then the bank's boxes and flips, which stand in the metadata of a tar."""
    if not settings.bank:
        return arrays_of(settings)
    boxes = Array("bank", "boxes", (settings.bank, 4), np.dtype("<i4"))
    return [*arrays_of(settings), boxes, Array("bank", "flips", (settings.bank, 2))]


@dataclass(frozen=True, slots=True)
class Bank:
    """K crops of a source. boxes: int64 [K, 4] (top, left, height, width, source pixels); flips:
    bool [K, 2] (horizontal, vertical); counts: by detector, uint8 [K, c, c], marked pixels of each
    BANK_CELL of the crop as flipped, density = count / 64.
    """

    boxes: NDArray[np.int64]
    flips: NDArray[np.bool_]
    counts: dict[str, NDArray[np.uint8]]

    def equals(self, other: "Bank") -> bool:
        """Whether every number is the same."""
        return (
            np.array_equal(self.boxes, other.boxes)
            and np.array_equal(self.flips, other.flips)
            and equal(self.counts, other.counts)
        )


@dataclass(frozen=True, slots=True)
class Record:
    """What a shard holds of one source image.

    `frame` is the encoded square frame (a JPEG file or a .npy file), `maps` the densities by
    detector, uint8 [G, G] with density = value / 255. `label` is -1 for none, `height` and `width`
    are the source's in pixels, `source` is its name below the source's root. `bank` holds stored
    crops with their exact counts, if the set has them; `weights` the loss weights by detector,
    uint16 [c, c] of the frame or [K, c, c] of the bank's crops, weight = value / 256.
    """

    key: str
    frame: bytes
    label: int
    height: int
    width: int
    source: str
    maps: dict[str, NDArray[np.uint8]]
    bank: Bank | None = None
    weights: dict[str, NDArray[np.uint16]] = field(default_factory=dict)

    def equals(self, other: "Record") -> bool:
        """Whether all of it is the same."""
        facts = ("key", "frame", "label", "height", "width", "source")
        banks = (
            self.bank.equals(other.bank) if self.bank and other.bank else self.bank is other.bank
        )
        return (
            banks
            and equal(self.maps, other.maps)
            and equal(self.weights, other.weights)
            and all(getattr(self, fact) == getattr(other, fact) for fact in facts)
        )


def equal(these: Mapping[str, NDArray[Any]], those: Mapping[str, NDArray[Any]]) -> bool:
    """Whether the same names have the same arrays, in the same order."""
    return [*these] == [*those] and all(np.array_equal(a, those[name]) for name, a in these.items())


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


def npy_array(data: bytes, dtype: np.dtype[Any] = UINT8) -> NDArray[Any]:
    """The array of a .npy file, which must be of `dtype` and nothing else.

    Raises UserError for any other dtype, or for objects, or where bytes follow it.
    """
    try:
        stream = io.BytesIO(data)
        array = np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # NumPy tokenizes the header: hostile bytes raise anything
        raise UserError(f"the .npy member is damaged: {error}") from None
    if array.dtype != dtype:
        raise UserError(f"the .npy member does not hold a {dtype} array")
    if stream.read(1):
        raise UserError("the .npy member does not end with its array")
    return np.asarray(array)


def members(record: Record) -> list[tuple[str, bytes]]:
    """The members of `record` in stored order: frame, metadata, arrays, label."""
    frame_suffix = RAW if record.frame.startswith(b"\x93NUMPY") else JPEG
    meta: dict[str, Any] = {
        "height": record.height,
        "source": record.source,
        "width": record.width,
    }
    kinds: list[tuple[str, dict[str, NDArray[Any]]]] = [(DENSITY, record.maps)]
    if record.bank:
        meta["boxes"] = record.bank.boxes.tolist()
        meta["flips"] = record.bank.flips.astype(int).tolist()
        kinds.append((COUNTS, record.bank.counts))
    kinds.append((WEIGHTS, record.weights))
    return [
        (frame_suffix, record.frame),
        (META, json.dumps(meta, sort_keys=True, separators=(",", ":")).encode("ascii")),
        *(
            (f"{name}.{kind}.npy", npy_bytes(array))
            for kind, arrays in kinds
            for name, array in arrays.items()
        ),
        (LABEL, str(record.label).encode("ascii")),
    ]


def from_members(key: str, parts: Mapping[str, bytes]) -> Record:
    """The record whose members are `parts` (suffix to bytes). Raises UserError if one is wrong."""
    frames = [suffix for suffix in (JPEG, RAW) if suffix in parts]
    arrays: dict[str, dict[str, bytes]] = {DENSITY: {}, COUNTS: {}, WEIGHTS: {}}
    foreign = len(frames) != 1 or not {LABEL, META} <= parts.keys()
    for suffix in parts.keys() - {JPEG, RAW, LABEL, META}:
        name, _, kind = suffix.removesuffix(".npy").rpartition(".")
        foreign |= kind not in arrays or not name or not suffix.endswith(".npy")
    if foreign:
        raise UserError(
            f"record {key} has members {sorted(parts)}; the format wants {META}, {LABEL}, one of "
            f"{JPEG} or {RAW}, and NAME.{DENSITY}.npy, .{COUNTS}.npy or .{WEIGHTS}.npy"
        )
    for suffix, data in parts.items():  # in their order
        name, _, kind = suffix.removesuffix(".npy").rpartition(".")
        if kind in arrays and name:
            arrays[kind][name] = data
    try:
        meta: dict[str, Any] = json.loads(parts[META])
        height, width, source = meta["height"], meta["width"], meta["source"]
        label = int(parts[LABEL])
        maps = {name: npy_array(data) for name, data in arrays[DENSITY].items()}
        if any(density.ndim != 2 for density in maps.values()):
            raise UserError("a density is no square")
        bank = None
        if arrays[COUNTS] or "boxes" in meta:
            counts = {name: npy_array(data) for name, data in arrays[COUNTS].items()}
            bank = Bank(*stored_crops(meta), counts)
            if not counts or any(a.ndim != 3 or len(a) != len(bank.boxes) for a in counts.values()):
                raise UserError(f"there are no counts of the {len(bank.boxes)} stored crops")
        weights = {name: npy_array(data, UINT16) for name, data in arrays[WEIGHTS].items()}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"record {key} does not parse: {error}") from None
    if not (isinstance(height, int) and isinstance(width, int) and isinstance(source, str)):
        raise UserError(f"record {key}: height and width must be integers and source a string")
    return Record(key, parts[frames[0]], label, height, width, source, maps, bank, weights)


def stored_crops(meta: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Boxes int64 [K, 4] and flips bool [K, 2] of the bank, from a record's metadata.

    Raises ValueError, KeyError, TypeError or OverflowError if they are none.
    """
    boxes, flips = np.asarray(meta["boxes"]), np.asarray(meta["flips"])
    whole = boxes.dtype == np.int64 and flips.dtype == np.int64
    if not whole or boxes.shape != (len(boxes), 4) or flips.shape != (len(boxes), 2):
        raise ValueError("the bank has no boxes and flips")
    if not len(boxes) or boxes.min() < 0 or boxes.max() >= LARGEST_BOX or (flips & ~1).any():
        raise ValueError("the bank has a box or a flip that is none")
    return boxes, flips.astype(bool)


def fixed_point(weights: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Loss weights, 1 to 255, as they are stored."""
    return np.rint(weights * FIXED_POINT).astype(UINT16)


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
