"""Pixels of an image file of any format as uint8 RGB, or one named reason for its rejection.

Pixels equal Pillow's `convert("RGB")`, which the field's loaders use: orientation tags ignored,
alpha dropped, the first frame of an animation. JPEGs take OpenCV's faster, equal path.
"""

import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from shards.bar import STDERR
from shards.record import jpeg_header

MAX_PIXELS = 100_000_000  # 300 MB as RGB; the largest photo of ImageNet-1K has 24 million
# Formats that only hold pixels: EPS and PDF run programs, SVG and the like fetch things.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
END_OF_IMAGE = b"\xff\xd9"
LONGEST_MESSAGE = 10_000  # bytes kept of what a library prints about one input


class Rejected(Exception):
    """An input that cannot become a record. `reason` is a word of the ledger, `detail` a line."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, " ".join(detail.split())


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """The pixels of an image file as uint8 RGB [H, W, 3].

    Raises Rejected with reason `empty`, `not-an-image`, `too-large` (more than MAX_PIXELS, told
    from the header), `truncated` or `damaged`.
    """
    if not data:
        raise Rejected("empty", "the file has no bytes")
    if data.startswith(b"\xff\xd8\xff"):
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
    return _decode_with_pillow(data)


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Put the name of the input before each line that libtiff or libjpeg prints in the block.

    They write to descriptor 2, past Python. It is redirected, unless another thread writes there.
    """
    if not STDERR.acquire(blocking=False):
        yield
        return
    try:
        aside, kept = _aside(os.getpid()), os.dup(2)
        try:
            os.dup2(aside, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            _say(aside, source)
    finally:
        STDERR.release()


@lru_cache(maxsize=1)
def _aside(pid: int) -> int:
    """A file without a name, of this process alone."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("stderr")
    descriptor, path = tempfile.mkstemp()
    os.unlink(path)
    return descriptor


def _say(aside: int, source: str) -> None:
    if not os.fstat(aside).st_size:
        return
    text = os.pread(aside, LONGEST_MESSAGE, 0).decode(errors="replace")
    os.ftruncate(aside, 0)
    os.lseek(aside, 0, os.SEEK_SET)
    for line in filter(None, map(str.strip, text.splitlines())):
        sys.stderr.write(f"{source}: {line}\n")


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Pixels of an ordinary JPEG, or None for Pillow to decode (CMYK) or to diagnose (damage)."""
    try:
        height, width, colorspace = jpeg_header(data)
        if colorspace not in {"YCbCr", "Gray", "RGB"}:
            return None
        _check_size(width, height)
        if not data.endswith(END_OF_IMAGE):
            # OpenCV before 5 fills a cut-off picture with grey and says nothing; this does not.
            simplejpeg.decode_jpeg(data, strict=True)
    except ValueError as error:
        if "Premature end" in str(error):
            raise Rejected("truncated", str(error)) from None
        return None
    try:
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(*image.size)
            return _rgb(image)
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise Rejected("not-an-image", f"none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise Rejected("too-large", str(error)) from None
    except MemoryError:
        raise Rejected("too-large", "not enough memory to decode it") from None
    except Exception as error:  # hostile bytes make parsers raise anything; none may stop a build
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise Rejected("truncated" if cut else "damaged", f"{error}"[:200]) from None


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Rejected("too-large", f"{width} x {height} px, the limit is {MAX_PIXELS} pixels")


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise Rejected("not-an-image", "pixels of floats or of 32 bits have no defined white")
    if image.mode.startswith("I"):  # 16-bit grey; convert("RGB") would clip it to white
        grey = np.asarray(image)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise Rejected("damaged", f"{image.mode} image with values outside 0..65535")
        return np.repeat((grey >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))
