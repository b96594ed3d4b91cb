"""The picture beside the figures of fidelity: crops with detected, read and stored densities.

In: a set, its source, how many crops. Out: one RGB picture, a row a crop and detector.
"""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess.decode import decode_image
from preprocess.densities import crop_counts, published_grey
from preprocess.fidelity import FULL, keypoint_detectors, read_crop, trial_crop
from preprocess.source import Source, read
from shards import ShardSet
from shards.files import write_atomically

SIDE, BAR, GAP = 192, 22, 6  # px of a tile, of the line of text above it, between tiles
TITLES = ("crop", "detected on the crop", "read off the map", "difference (red: too much)")


def draw_fidelity(records: ShardSet, source: Source, crops: int = 6) -> NDArray[np.uint8]:
    """Tiles of `crops` random crops, spread over the set, by each detector, as RGB [H, W, 3]."""
    settings, rows = records.manifest.settings, []
    for number in np.linspace(0, len(records) - 1, crops).astype(int).tolist():
        record = records[number]
        entry = source.entries[int(record.key)]
        crop = trial_crop(
            record, settings, decode_image(read(source.kind, source.root, entry)), seed=0
        )
        for detector in keypoint_detectors(settings):
            grey = published_grey(crop.pixels)
            truth = crop_counts(detector, grey, settings.mark) / FULL
            estimate = read_crop(record, detector, settings, crop)
            tiles = [crop.pixels, _heat(truth), _heat(estimate), _difference(estimate - truth)]
            titles = [f"{detector.name}: {TITLES[0]}", *TITLES[1:]]
            rows.append(np.hstack([_tile(*pair) for pair in zip(tiles, titles, strict=True)]))
    return np.vstack(rows)


def _heat(density: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Dark is density 0, yellow 1."""
    levels = np.rint(np.clip(density, 0, 1) * 255).astype(np.uint8)
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[:, :, ::-1])


def _difference(error: NDArray[np.float64]) -> NDArray[np.uint8]:
    """White is none, red is too much, blue too little; full colour at one half."""
    share = np.clip(np.abs(error)[:, :, None] * 2, 0, 1)
    colour = np.where(error[:, :, None] > 0, (215, 48, 39), (69, 117, 180))
    return np.rint(255 * (1 - share) + colour * share).astype(np.uint8)


def _tile(picture: NDArray[np.uint8], title: str) -> NDArray[np.uint8]:
    tile = np.full((SIDE + BAR, SIDE + GAP, 3), 255, np.uint8)
    tile[BAR:, :SIDE] = cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    font = cv2.FONT_HERSHEY_SIMPLEX
    return np.asarray(cv2.putText(tile, title, (1, 15), font, 0.38, (40, 40, 40), 1, cv2.LINE_AA))


def write_picture(path: Path, rgb: NDArray[np.uint8]) -> None:
    """Write an RGB picture as PNG, whole or not at all."""
    png = cv2.imencode(".png", np.ascontiguousarray(rgb[:, :, ::-1]))[1]
    write_atomically(path, png.tobytes())
