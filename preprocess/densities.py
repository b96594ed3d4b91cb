"""Density maps and the bank: the pixels of a source in, uint8 densities of each detector out.

A map estimates, on a fixed grid of the unit square, the density that detection on a random crop
gives. It is made from a few views of the source. The bank has this density itself, on stored crops.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess.detectors import detect
from preprocess.frequency import frequency_map
from preprocess.rings import mark
from shards import Bank, Detector, Settings, decode_frame
from shards.crops import cell_sums, crop_boxes, read_crop, visible_sums, weights
from shards.record import fixed_point
from shards.rng import Purpose
from shards.spec import BANK_CELL

Image = NDArray[np.uint8]  # RGB [H, W, 3]
Floats = NDArray[np.float64]

SEED = 0  # of the boxes of views and banks; a training run has its own
LONGEST = 16  # crops' sides of a view: a source of 1 x 10,000 px would become 2 million px long
FLOOR = 0.2  # a map cell that fewer views than this have seen is 0


@dataclass(frozen=True, slots=True)
class View:
    """A box of the source (top, left, height, width, px), squeezed to `rows` x `columns` px."""

    box: tuple[int, int, int, int]
    rows: int
    columns: int


def density_maps(
    rgb: Image, number: int, settings: Settings, size: tuple[int, int] | None = None
) -> dict[str, Image]:
    """Maps of input `number` by detector, uint8 [grid, grid], density = value / 255.

    `rgb` is its pixels, or those of its frame; then `size` is the (height, width) of its source.
    """
    density = np.empty((len(settings.detectors), settings.grid, settings.grid))
    found = [detector.has_keypoints for detector in settings.detectors]
    if any(found):
        density[found] = _keypoint_densities(rgb, number, settings, size)
    for row, detector in enumerate(settings.detectors):
        if not detector.has_keypoints:
            density[row] = frequency_map(rgb, detector, settings.grid)
    most = settings.levels - 1
    levels = np.rint(np.minimum(density, 1) * most).astype(np.uint8) * np.uint8(255 // most)
    return dict(zip((detector.name for detector in settings.detectors), levels, strict=True))


def _keypoint_densities(
    rgb: Image, number: int, settings: Settings, size: tuple[int, int] | None
) -> Floats:
    """Densities of the keypoint detectors, float64 [detectors, grid, grid].

    The marked share of each cell is a mean over views, weighed by how much of the cell each view
    sees: crops do not show all of it, and no detector finds everything near an edge.
    """
    detectors = [detector for detector in settings.detectors if detector.has_keypoints]
    grid, (height, width) = settings.grid, rgb.shape[:2]
    edges = np.arange(grid + 1) / grid
    marked = np.zeros((len(detectors), grid, grid))
    seen = np.zeros_like(marked)
    for planned in map_views(number, size or (height, width), settings):
        view = _on(planned, size, (height, width)) if size else planned
        top, left, tall, wide = view.box
        pixels = squeezed(rgb, view)
        grey = published_grey(pixels)
        y = np.clip((edges * height - top) * (view.rows / tall), 0, view.rows)
        x = np.clip((edges * width - left) * (view.columns / wide), 0, view.columns)
        cell = height * view.rows / (grid * tall), width * view.columns / (grid * wide)  # px
        for row, detector in enumerate(detectors):
            shown = pixels if detector.plugin else grey
            bitmap = covered(detector, shown, settings.mark, settings.crop)
            marked[row] += cell_sums(cv2.integral(bitmap), y, x) / (cell[0] * cell[1])
            down = visible_sums(detector, view.rows, y, settings.mark) / cell[0]
            across = visible_sums(detector, view.columns, x, settings.mark) / cell[1]
            seen[row] += down[:, None] * across
    return np.asarray(np.where(seen > FLOOR, marked / np.maximum(seen, FLOOR), 0))


def maps_of(
    rgb: Image | None, frame: bytes, number: int, settings: Settings, size: tuple[int, int]
) -> dict[str, Image]:
    """density_maps from what settings.detect_on names: the source's pixels `rgb`, or its encoded
    `frame` and its `size` (height, width).
    """
    if settings.detect_on == "frame":
        return density_maps(decode_frame(frame), number, settings, size)
    assert rgb is not None
    return density_maps(rgb, number, settings)


def map_views(number: int, size: tuple[int, int], settings: Settings) -> list[View]:
    """What the map of input `number` is made from: the whole source, squeezed as a random crop
    squeezes it (to LONGEST crops at most), and settings.map_crops random crops, all of the training
    distribution.
    """
    boxes, _ = _boxes(Purpose.VIEW, number, settings.map_crops + 1, size, settings)
    side, (height, width) = settings.crop, size
    _, _, tall, wide = boxes[0]
    rows, columns = round(side * height / tall), round(side * width / wide)
    longest = LONGEST * side
    whole = View((0, 0, height, width), min(rows, longest), min(columns, longest))
    return [whole, *(View(box, side, side) for box in boxes[1:])]


def bank_of(rgb: Image, number: int, settings: Settings) -> Bank:
    """The bank of input `number`: the published recipe on settings.bank crops of its pixels.

    Crop, resize by INTER_LINEAR without antialias, flip, detect, draw rings, count marked pixels a
    BANK_CELL (KAMIM For GPUs/utils/dataset_loaders.py); `rgb` must be the source, not the frame.
    """
    side, cells = settings.crop, settings.crop // BANK_CELL
    height, width = rgb.shape[:2]
    boxes, flips = _boxes(Purpose.BANK, number, settings.bank, (height, width), settings)
    shape = (settings.bank, cells, cells)
    counts = {detector.name: np.empty(shape, np.uint8) for detector in settings.detectors}
    for slot, box in enumerate(boxes):
        crop = squeezed(rgb, View(box, side, side))
        crop = crop[:: -1 if flips[slot, 1] else 1, :: -1 if flips[slot, 0] else 1]
        crop = np.ascontiguousarray(crop)
        grey = published_grey(crop)
        for detector in settings.detectors:
            shown = crop if detector.plugin else grey
            counts[detector.name][slot] = crop_counts(detector, shown, settings.mark)
    return Bank(np.array(boxes, np.int64), flips, counts)


def weights_of(
    maps: dict[str, Image], bank: Bank | None, settings: Settings
) -> dict[str, NDArray[np.uint16]]:
    """The loss weights to store, by detector, as settings.weights asks: of each crop of the bank,
    uint16 [K, c, c], or of the whole frame as a training run reads it off the map, uint16 [c, c].
    """
    stored: dict[str, NDArray[np.uint16]] = {}
    if settings.weights is None:
        return stored
    temperature, w_ps = settings.weights
    cells, part = settings.crop // w_ps, w_ps // BANK_CELL
    for detector in settings.detectors:
        name = detector.name
        if not detector.has_keypoints:
            continue
        if bank:
            pooled = bank.counts[name].reshape(len(bank.boxes), cells, part, cells, part)
            found = pooled.mean(axis=(2, 4)) / BANK_CELL**2
        else:
            whole = (0.0, 0.0, 1.0, 1.0), (False, False)
            found = read_crop(maps[name], detector, settings, *whole, cells)[None]
        values = np.stack([fixed_point(weights(density, temperature)) for density in found])
        stored[name] = values if bank else values[0]
    return stored


def covered(
    detector: Detector, pixels: Image, kind: str, crop: int
) -> NDArray[np.uint8] | NDArray[np.float32]:
    """What `detector` finds in a view as [H, W]: uint8 0 or 1 of marks, or a plug-in's map, float32
    0 to 1. `pixels` are the view's grey, or RGB for a plug-in; crop: as detect.
    """
    rows, columns = pixels.shape[:2]
    found = detect(detector, pixels, crop)
    if found.shape[1] == 2:
        return mark(found, rows, columns, kind)
    shrinking = found.shape[0] > rows or found.shape[1] > columns
    method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(found, (columns, rows), interpolation=method), np.float32)


def crop_counts(detector: Detector, pixels: Image, kind: str) -> Image:
    """Marked pixels of each BANK_CELL of a square crop, uint8 [cells, cells], from its grey, or
    from RGB for a plug-in; a map's mean, to the nearest 64th, counts as as many.
    """
    side = len(pixels)
    bitmap = covered(detector, pixels, kind, side)
    cells = side // BANK_CELL
    parts = bitmap.reshape(cells, BANK_CELL, cells, BANK_CELL)
    if bitmap.dtype == np.uint8:
        return np.asarray(parts.sum(axis=(1, 3), dtype=np.uint8))
    return np.rint(parts.sum(axis=(1, 3), dtype=np.float64)).astype(np.uint8)


def published_grey(rgb: Image) -> Image:
    """Grey as the published code's detectors see it: RGB pixels weighed as if they were BGR."""
    return cv2.cvtColor(rgb, cv2.COLOR_BGR2GRAY)


def _on(view: View, source: tuple[int, int], frame: tuple[int, int]) -> View:
    """A view of the source as the nearest whole pixels of its frame, one at least."""
    down, across = frame[0] / source[0], frame[1] / source[1]
    top, left, tall, wide = view.box
    tall, wide = max(1, round(tall * down)), max(1, round(wide * across))
    top, left = min(round(top * down), frame[0] - tall), min(round(left * across), frame[1] - wide)
    return View((top, left, tall, wide), view.rows, view.columns)


def squeezed(rgb: Image, view: View) -> Image:
    """The pixels of a view, by INTER_LINEAR without antialias, as the published loader does."""
    top, left, tall, wide = view.box
    part = rgb[top : top + tall, left : left + wide]
    return cv2.resize(part, (view.columns, view.rows), interpolation=cv2.INTER_LINEAR)


def _boxes(
    purpose: int, number: int, count: int, size: tuple[int, int], settings: Settings
) -> tuple[Sequence[tuple[int, int, int, int]], NDArray[np.bool_]]:
    epochs, same = np.arange(count), np.full(count, number)
    sizes = np.full(count, size[0]), np.full(count, size[1])
    boxes, flips = crop_boxes(purpose, SEED, epochs, same, *sizes, settings.area)
    return [(top, left, tall, wide) for top, left, tall, wide in boxes.tolist()], flips
