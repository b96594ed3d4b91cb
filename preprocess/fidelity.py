"""What offline costs in accuracy: a finished set and its source in, errors of map and bank out.

The truth is the published way, detection on the crop. Beside the errors stand rulers: weights that
ignore the image, detection on the crop a little to the side or flipped, and another resize.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import joblib
import numpy as np
from numpy.typing import NDArray

from preprocess.decode import decode_image
from preprocess.densities import View, crop_counts, published_grey, squeezed
from preprocess.source import Source, read
from shards import Detector, Record, Settings, ShardSet
from shards.crops import crop_boxes, unit_boxes, weights
from shards.crops import read_crop as read_map_of
from shards.dataset import places_of
from shards.errors import UserError
from shards.progress import progress
from shards.record import DENSITY, WEIGHTS
from shards.rng import Purpose
from shards.spec import BANK_CELL

Floats = NDArray[np.float64]
FULL = BANK_CELL**2
SHIFT = 2  # px of the source


@dataclass(frozen=True, slots=True)
class Crop:
    """A crop to compare on: its box in source pixels, its flips, its pixels as flipped."""

    box: tuple[int, int, int, int]
    flips: tuple[bool, bool]
    pixels: NDArray[np.uint8]


def measure_fidelity(
    records: ShardSet,
    source: Source,
    samples: int = 1000,
    temperature: float = 0.25,
    w_ps: int = 8,
    seed: int = 0,
    jobs: int = 0,
) -> dict[str, dict[str, dict[str, float]]]:
    """{detector: {what: errors}} over one new random crop each of `samples` records.

    what: map; bank (on one of its own crops); uniform, shifted, flipped, torchvision: rulers.
    Errors, against detection on the crop: correlation of densities over all cells; wrong, the mean
    share of an image's loss weight on the wrong cell (total variation); bias of the mean weight,
    as a share of it; equal, the share of cells with the very same density.
    Raises UserError if the source is not that of the set.
    """
    settings = records.manifest.settings
    if not keypoint_detectors(settings):
        raise UserError(
            f"{records.folder} has no keypoint maps: there is no detection to compare with"
        )
    if w_ps % BANK_CELL or settings.crop % w_ps:
        raise UserError(f"w_ps {w_ps} is no multiple of {BANK_CELL} that divides {settings.crop}")
    if source.description()["sha256"] != records.manifest.source["sha256"]:
        raise UserError(f"{source.root} is not what {records.folder} was built from; name that")
    numbers = np.unique(np.linspace(0, len(records) - 1, samples).astype(int)).tolist()
    work = joblib.delayed(_densities)
    entries = [source.entries[int(records.index["key"][number])] for number in numbers]
    tasks = (
        work(records[number], settings, decode_image(read(source.kind, source.root, entry)), seed)
        for number, entry in zip(numbers, entries, strict=True)
    )
    found = joblib.Parallel(n_jobs=jobs or joblib.cpu_count(), return_as="generator")(tasks)
    counted = progress("fidelity", len(numbers), found)
    pairs = [_pooled(each, w_ps // BANK_CELL) for each in counted]
    return {
        detector.name: {
            what: _errors([pair[detector.name][what] for pair in pairs], temperature)
            for what in pairs[0][detector.name]
        }
        for detector in keypoint_detectors(settings)
    }


def keypoint_detectors(settings: Settings) -> list[Detector]:
    """Those whose maps detection on a crop can be compared with."""
    return [detector for detector in settings.detectors if detector.has_keypoints]


Pairs = dict[str, dict[str, tuple[Floats, Floats]]]  # detector, what: (estimate, truth)


def _densities(record: Record, settings: Settings, rgb: NDArray[np.uint8], seed: int) -> Pairs:
    """Estimates and truths of one record, densities float64 [c, c]."""
    cv2.setNumThreads(1)
    crop = trial_crop(record, settings, rgb, seed)
    aside = shifted(crop, rgb, settings.crop)
    mirrored = np.ascontiguousarray(crop.pixels[:, ::-1])
    other = _torchvision(crop, rgb, settings.crop)
    result: Pairs = {}
    for detector in keypoint_detectors(settings):
        detected = _detector_on_crops(detector, settings)
        truth = detected(crop.pixels)
        result[detector.name] = {
            "map": (read_crop(record, detector, settings, crop), truth),
            "uniform": (np.zeros_like(truth), truth),
            "shifted": (detected(aside), truth),
            "flipped": (detected(mirrored)[:, ::-1], truth),
        }
        if other is not None:
            result[detector.name]["torchvision"] = (detected(other), truth)
        if record.bank:
            slot = seed % len(record.bank.boxes)
            own = cut(
                tuple(record.bank.boxes[slot].tolist()),
                tuple(record.bank.flips[slot].tolist()),
                rgb,
                settings.crop,
            )
            result[detector.name]["bank"] = (
                record.bank.counts[detector.name][slot] / FULL,
                detected(own.pixels),
            )
    return result


def trial_crop(record: Record, settings: Settings, rgb: NDArray[np.uint8], seed: int) -> Crop:
    """A random crop of the training distribution that no map, bank or training run has seen."""
    epoch, number, height, width = (
        np.array([value]) for value in (seed, int(record.key), record.height, record.width)
    )
    boxes, flips = crop_boxes(Purpose.TRIAL, seed, epoch, number, height, width, settings.area)
    box, turned = tuple(boxes[0].tolist()), tuple(flips[0].tolist())
    return cut(box, turned, rgb, settings.crop)


def cut(box: tuple[int, ...], flips: tuple[bool, ...], rgb: NDArray[np.uint8], side: int) -> Crop:
    """The published crop of `rgb`: cut, resized by INTER_LINEAR, flipped."""
    top, left, tall, wide = box
    pixels = squeezed(rgb, View((top, left, tall, wide), side, side))
    turned = pixels[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1]
    return Crop((top, left, tall, wide), (flips[0], flips[1]), np.ascontiguousarray(turned))


def shifted(crop: Crop, rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The crop SHIFT px of the source further down and right, or up and left where it must."""
    (top, left, tall, wide), (height, width) = crop.box, rgb.shape[:2]
    top += SHIFT if top + tall + SHIFT <= height else -min(SHIFT, top)
    left += SHIFT if left + wide + SHIFT <= width else -min(SHIFT, left)
    return cut((top, left, tall, wide), crop.flips, rgb, side).pixels


def read_crop(record: Record, detector: Detector, settings: Settings, crop: Crop) -> Floats:
    """What a training run reads off the detector's map for `crop`, float64 [c, c]."""
    size = np.array([record.height]), np.array([record.width])
    box = unit_boxes(np.array([crop.box]), *size)[0].tolist()
    cells = settings.crop // BANK_CELL
    return read_map_of(record.maps[detector.name], detector, settings, box, crop.flips, cells)


def _detector_on_crops(
    detector: Detector, settings: Settings
) -> Callable[[NDArray[np.uint8]], Floats]:
    return lambda rgb: crop_counts(detector, published_grey(rgb), settings.mark) / FULL


def _torchvision(crop: Crop, rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8] | None:
    """The crop as torchvision resizes it (bilinear, no antialias); None where it is missing."""
    try:
        import torch
        from torchvision.transforms.v2.functional import resized_crop
    except ImportError:
        return None
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1)
    resized = resized_crop(pixels, *crop.box, [side, side], antialias=False)
    turned = resized.flip([axis for axis, on in ((2, crop.flips[0]), (1, crop.flips[1])) if on])
    return np.ascontiguousarray(turned.permute(1, 2, 0).numpy())


def _pooled(pairs: Pairs, part: int) -> Pairs:
    """Both densities of each pair as means of part x part cells."""

    def pool(density: Floats) -> Floats:
        cells = len(density) // part
        return np.asarray(density.reshape(cells, part, cells, part).mean(axis=(1, 3)))

    return {
        name: {what: (pool(a), pool(b)) for what, (a, b) in of_detector.items()}
        for name, of_detector in pairs.items()
    }


def _errors(pairs: list[tuple[Floats, Floats]], temperature: float) -> dict[str, float]:
    estimates, truths = (np.stack(side) for side in zip(*pairs, strict=True))
    wrong, means = [], []
    for estimate, truth in pairs:
        a, b = weights(estimate, temperature), weights(truth, temperature)
        wrong.append(np.abs(a / a.sum() - b / b.sum()).sum() / 2)
        means.append((a.mean(), b.mean()))
    varies = bool(np.ptp(estimates) > 0 and np.ptp(truths) > 0)
    correlation = np.corrcoef(estimates.ravel(), truths.ravel())[0, 1] if varies else 0.0
    ours, published = np.mean(means, axis=0)
    return {
        "correlation": round(float(correlation), 4),
        "wrong": round(float(np.mean(wrong)), 4),
        "bias": round(float(ours / published - 1), 4),
        "equal": round(float((estimates == truths).mean()), 4),
        "samples": len(pairs),
    }


def storage(records: ShardSet) -> dict[str, float]:
    """Mean bytes an image: frame, arrays by kind and the whole record with headers and padding, and
    the share that the arrays add to a record without them.
    """
    mean = {
        name: float(records.index[name].astype(np.float64).mean())
        for name in ("frame_bytes", "bytes")
    }
    kinds = {"maps_bytes": 0, "bank_bytes": 0, "weights_bytes": 0}
    for array, _ in records.places.values():
        kind = {DENSITY: "maps", WEIGHTS: "weights"}.get(array.kind, "bank")
        kinds[f"{kind}_bytes"] += array.bytes
    stored = places_of(records.manifest)[1]
    added = stored / (mean["bytes"] - stored)
    figures = {"frame_bytes": round(mean["frame_bytes"]), **kinds, "bytes": round(mean["bytes"])}
    return figures | {"added": round(added, 4)}
