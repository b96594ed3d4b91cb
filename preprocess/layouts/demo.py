"""The demo source: photographs that ship inside the scikit-image wheel, cut into 312 images.

scikit-image is only looked up for its files, never imported.
"""

import importlib.util
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from preprocess.decode import Rejected, decode_image
from preprocess.source import Entry, Source
from shards.errors import UserError, install

_FILES = """
    astronaut.png brick.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png
    gravel.png hubble_deep_field.jpg moon.png motorcycle_left.png rocket.jpg
    """
PHOTOGRAPHS = _FILES.split()
# Windows of each photograph: their share of each side, and how many down and across.
WINDOWS = ((0.5, 3, 3), (0.7, 3, 3), (0.85, 2, 3))
LONGEST = 640  # px; the two large photographs are first brought to an ordinary size


def list_demo(split: str) -> Source:
    """Windows of each photograph, labelled by its number."""
    if split:
        raise UserError(f"the demo has no split {split}; leave --split out")
    windows = sum(down * across for _, down, across in WINDOWS)
    entries = [
        Entry(f"{Path(photograph).stem}/{window:02d}.jpg", label, 0)
        for label, photograph in enumerate(PHOTOGRAPHS)
        for window in range(windows)
    ]
    return Source("demo", str(_folder()), entries, PHOTOGRAPHS)


def _folder() -> Path:
    found = importlib.util.find_spec("skimage")
    for place in (found.submodule_search_locations or []) if found else []:
        if (Path(place) / "data" / PHOTOGRAPHS[0]).is_file():
            return Path(place) / "data"
    raise UserError(f"the demo photographs are not installed; {install('skimage')}")


def image(root: str, entry: Entry) -> bytes:
    """The image as JPEG bytes (quality 95), cut from its photograph."""
    stem, _, window = entry.name.removesuffix(".jpg").partition("/")
    name = next(each for each in PHOTOGRAPHS if Path(each).stem == stem)
    top, left, height, width = _window(int(window))
    pixels = _photograph(Path(root, name))
    rows, columns = pixels.shape[:2]
    cut = pixels[
        round(top * rows) : round((top + height) * rows),
        round(left * columns) : round((left + width) * columns),
    ]
    jpeg: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(cut), 95, "RGB", "444")
    return jpeg


def _window(number: int) -> tuple[float, float, float, float]:
    for share, down, across in WINDOWS:
        if number < down * across:
            row, column = divmod(number, across)
            room = 1 - share
            return room * row / (down - 1), room * column / (across - 1), share, share
        number -= down * across
    raise UserError(f"a photograph has no window {number}")


@lru_cache(maxsize=2)
def _photograph(path: Path) -> NDArray[np.uint8]:
    try:
        pixels = decode_image(path.read_bytes())
    except OSError as error:
        raise Rejected("unreadable", str(error)) from None
    scale = LONGEST / max(pixels.shape[:2])
    if scale < 1:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return pixels
