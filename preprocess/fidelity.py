"""Errors of maps and bank: a finished set and its source in, errors out.

The truth is detection on the crop, the published way. For comparison there are rulers: uniform
weights, detection on a slightly moved crop, on the flipped crop, and with another resize.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import joblib
import numpy as np
from numpy.typing import NDArray

from preprocess.decode import Rejected, decode_image
from preprocess.densities import View, crop_counts, published_grey, squeezed
from preprocess.source import Source
from shards import Detector, Record, Settings, ShardSet
from shards.correction import correction
from shards.crops import crop_boxes, read_crop, unit_boxes, weights
from shards.errors import UserError
from shards.html import heat
from shards.index import places_of
from shards.progress import progress
from shards.record import DENSITY, WEIGHTS
from shards.report import spread
from shards.rng import Purpose
from shards.spec import BANK_CELL

Floats = NDArray[np.float64]
Weigh = Callable[[Floats, float], Floats]  # (densities of a crop, T) in, weights out
FULL = BANK_CELL**2
TEMPERATURES = (0.1, 0.25, 1.0)
SHIFT = 2  # px of the source
SIDE, BAR, GAP = 192, 22, 6  # of a picture: px of a tile, of the text above it, between tiles
TITLES = ("crop", "detected on the crop", "read off the map", "difference (red: too much)")


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

    what: map; uncorrected, the map without shards/correction.py;
    bank (on one of its own crops); uniform, shifted, flipped, torchvision: rulers.
    Errors, against detection on the crop: correlation of densities over all cells; wrong, the mean
    share of an image's loss weight on the wrong cell (total variation); bias of the mean weight,
    as a share of it; equal, the share of cells with the very same density. `wrong at T`, `bias at
    T`: at each of TEMPERATURES.
    Raises UserError if the source is not that of the set.
    """
    settings = records.manifest.settings
    if not keypoint_detectors(settings):
        raise UserError(
            f"{records.folder} has no keypoint maps: there is no detection to compare with"
        )
    if w_ps < 1 or w_ps % BANK_CELL or settings.crop % w_ps:
        raise UserError(f"w_ps {w_ps} is no multiple of {BANK_CELL} that divides {settings.crop}")
    if source.description()["sha256"] != records.manifest.source["sha256"]:
        raise UserError(f"{source.root} is not what {records.folder} was built from; name that")
    numbers = spread(len(records), samples)
    work, part = joblib.delayed(_densities), w_ps // BANK_CELL
    tasks = (work(*looked_up(records, source, n), settings, seed, part) for n in numbers)
    found = joblib.Parallel(n_jobs=jobs or joblib.cpu_count(), return_as="generator")(tasks)
    pairs = list(progress("fidelity", len(numbers), found))
    result: dict[str, dict[str, dict[str, float]]] = {}
    for detector in keypoint_detectors(settings):
        of_detector = [pair[detector.name] for pair in pairs]
        corrected, errors = weighing(detector, settings, w_ps), {}
        for what in of_detector[0]:
            of_what = [pair[what] for pair in of_detector]
            if what == "map":
                errors["map"] = _errors(of_what, temperature, corrected)
                what = "uncorrected"
            errors[what] = _errors(of_what, temperature, weights)
        result[detector.name] = errors
    return result


def weighing(detector: Detector, settings: Settings, w_ps: int) -> Weigh:
    """How training weighs by densities that it reads off the detector's map."""
    tables = {}

    def weigh(density: Floats, temperature: float) -> Floats:
        if temperature not in tables:
            tables[temperature] = correction(
                detector, settings.mark, temperature, w_ps, len(density)
            )
        table = tables[temperature]
        return table.weights(density, temperature) if table else weights(density, temperature)

    return weigh


def looked_up(records: ShardSet, source: Source, number: int) -> tuple[Record, NDArray[np.uint8]]:
    """Record `number`, and the pixels of its source. UserError if that cannot be read any more."""
    record = records[number]
    try:
        return record, decode_image(source.read(source.entries[int(record.key)]))
    except Rejected as error:
        raise UserError(f"{record.source!r} is now {error.reason}: {error.detail}") from None


def keypoint_detectors(settings: Settings) -> list[Detector]:
    """Those whose maps detection on a crop can be compared with."""
    return [detector for detector in settings.detectors if detector.has_keypoints]


def detected(pixels: NDArray[np.uint8], detector: Detector, settings: Settings) -> Floats:
    """The published densities of a crop, float64 [c, c]."""
    shown = pixels if detector.plugin else published_grey(pixels)
    try:
        return crop_counts(detector, shown, settings.mark) / FULL
    except Rejected as error:
        raise UserError(f"{error.reason} on a crop: {error.detail}") from None


def _densities(
    record: Record, rgb: NDArray[np.uint8], settings: Settings, seed: int, part: int
) -> dict[str, dict[str, tuple[Floats, Floats]]]:
    """{detector: {what: (estimate, truth)}} of one record, densities float64 [c, c] as means of
    `part` x `part` cells.
    """
    cv2.setNumThreads(1)
    side, bank = settings.crop, record.bank
    crop = trial_crop(record, settings, rgb, seed)
    rulers = {
        "shifted": shifted(crop, rgb, side),
        "flipped": np.ascontiguousarray(crop.pixels[:, ::-1]),
        "torchvision": _torchvision(crop, rgb, side),
    }
    result = {}
    for detector in keypoint_detectors(settings):
        truth = detected(crop.pixels, detector, settings)
        pairs = {
            "map": (crop_estimate(record, detector, settings, crop), truth),
            "uniform": (np.zeros_like(truth), truth),
        }
        for what, pixels in rulers.items():
            if pixels is not None:
                found = detected(pixels, detector, settings)
                pairs[what] = found[:, ::-1] if what == "flipped" else found, truth
        if bank:
            slot = seed % len(bank.boxes)
            box, flips = bank.boxes[slot].tolist(), bank.flips[slot].tolist()
            own = cut(box, flips, rgb, side)
            stored = bank.counts[detector.name][slot] / FULL
            pairs["bank"] = stored, detected(own.pixels, detector, settings)
        result[detector.name] = {
            what: (_pooled(estimate, part), _pooled(true, part))
            for what, (estimate, true) in pairs.items()
        }
    return result


def _pooled(density: Floats, part: int) -> Floats:
    cells = len(density) // part
    return np.asarray(density.reshape(cells, part, cells, part).mean(axis=(1, 3)))


def trial_crop(record: Record, settings: Settings, rgb: NDArray[np.uint8], seed: int) -> Crop:
    """A random crop of the training distribution that no map, bank or training run has seen."""
    epoch, number, height, width = (
        np.array([value]) for value in (seed, int(record.key), record.height, record.width)
    )
    boxes, flips = crop_boxes(Purpose.TRIAL, seed, epoch, number, height, width, settings.area)
    return cut(boxes[0].tolist(), flips[0].tolist(), rgb, settings.crop)


def cut(box: Sequence[int], flips: Sequence[bool], rgb: NDArray[np.uint8], side: int) -> Crop:
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


def crop_estimate(record: Record, detector: Detector, settings: Settings, crop: Crop) -> Floats:
    """What a training run reads off the detector's map for `crop`, float64 [c, c]."""
    size = np.array([record.height]), np.array([record.width])
    box = unit_boxes(np.array([crop.box]), *size)[0].tolist()
    cells = settings.crop // BANK_CELL
    return read_crop(record.maps[detector.name], detector, settings, box, crop.flips, cells)


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


def _errors(
    pairs: list[tuple[Floats, Floats]], temperature: float, weigh: Weigh
) -> dict[str, float]:
    estimates, truths = (np.stack(side) for side in zip(*pairs, strict=True))
    varies = bool(np.ptp(estimates) > 0 and np.ptp(truths) > 0)
    correlation = np.corrcoef(estimates.ravel(), truths.ravel())[0, 1] if varies else 0.0
    wrong, bias = _of_weights(pairs, temperature, weigh)
    found = {
        "correlation": round(float(correlation), 4),
        "wrong": wrong,
        "bias": bias,
        "equal": round(float((estimates == truths).mean()), 4),
        "samples": len(pairs),
    }
    for each in TEMPERATURES:
        found[f"wrong at {each:g}"], found[f"bias at {each:g}"] = _of_weights(pairs, each, weigh)
    return found


def _of_weights(
    pairs: list[tuple[Floats, Floats]], temperature: float, weigh: Weigh
) -> tuple[float, float]:
    """(share of an image's weight on the wrong cell, bias of the mean weight)."""
    wrong, means = [], []
    for estimate, truth in pairs:
        a, b = weigh(estimate, temperature), weights(truth, temperature)
        wrong.append(np.abs(a / a.sum() - b / b.sum()).sum() / 2)
        means.append((a.mean(), b.mean()))
    ours, published = np.mean(means, axis=0)
    return round(float(np.mean(wrong)), 4), round(float(ours / published - 1), 4)


def table(found: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """Lines for a terminal of what measure_fidelity found."""
    lines = [f"{'densities':18s}{'correlation':>12s}{'wrong':>8s}{'bias':>8s}{'equal':>8s}"]
    rows = [(f"{n} {what}", e) for n, each in found.items() for what, e in each.items()]
    for name, e in rows:
        figures = f"{e['correlation']:12.3f}{e['wrong']:8.1%}{e['bias']:+8.1%}{e['equal']:8.1%}"
        lines.append(f"{name:18s}{figures}")
    lines.append(f"{'wrong, bias':18s}" + "".join(f"{f'T {t:g}':>15s}" for t in TEMPERATURES))
    for name, e in rows:
        if name.endswith((" map", " uncorrected")):
            pairs = ((e[f"wrong at {t:g}"], e[f"bias at {t:g}"]) for t in TEMPERATURES)
            lines.append(
                f"{name:18s}" + "".join(f"{wrong:7.1%}{bias:+8.1%}" for wrong, bias in pairs)
            )
    return lines


def storage(records: ShardSet) -> dict[str, float]:
    """Mean bytes per image: the frame, arrays by kind, and the whole record with headers and
    padding; and the share that the arrays add to a record without them.
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
    bare = records.manifest.settings.frame == 0  # there is nothing that they are added to
    added = 0.0 if bare else stored / (mean["bytes"] - stored)
    figures = {"frame_bytes": round(mean["frame_bytes"]), **kinds, "bytes": round(mean["bytes"])}
    return figures | {"added": round(added, 4)}


def draw_fidelity(records: ShardSet, source: Source, crops: int = 6) -> NDArray[np.uint8]:
    """Tiles of `crops` random crops, spread over the set, by each detector, as RGB [H, W, 3]."""
    settings, rows = records.manifest.settings, []
    for number in np.linspace(0, len(records) - 1, crops).astype(int).tolist():
        record, rgb = looked_up(records, source, number)
        crop = trial_crop(record, settings, rgb, seed=0)
        for detector in keypoint_detectors(settings):
            truth = detected(crop.pixels, detector, settings)
            estimate = crop_estimate(record, detector, settings, crop)
            tiles = [crop.pixels, _heat(truth), _heat(estimate), _difference(estimate - truth)]
            titles = [f"{detector.name}: {TITLES[0]}", *TITLES[1:]]
            rows.append(np.hstack([_tile(*pair) for pair in zip(tiles, titles, strict=True)]))
    return np.vstack(rows)


def _heat(density: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Dark is density 0, yellow 1."""
    return heat(np.rint(np.clip(density, 0, 1) * 255).astype(np.uint8))


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
