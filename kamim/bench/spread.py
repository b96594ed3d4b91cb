"""How far detection on a crop spreads round what its map says, and what that does to weights.

`python -m kamim.bench.spread PHOTOS WORK` measures the tables of shards/correction.py on every
other photo and prints them, then measures bias and misplaced weight, corrected and not, on the
others; a row per detector. What is finished is kept in WORK: killed, it goes on, at the same commit
and with the same PHOTOS.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kamim.bench.measuring import keep, once
from preprocess import build_shards, detector_settings, open_source
from preprocess.fidelity import crop_estimate, detected, looked_up, measure_fidelity, trial_crop
from preprocess.source import Source
from shards import Settings, ShardSet
from shards.correction import AT

NAMES = ("fast", "orb", "sift")
CROPS = 2  # of each photo, for the tables
FEW = 300  # cells round one of AT; with fewer it takes what its neighbour has
Floats = NDArray[np.float64]


def pairs_of(records: ShardSet, source: Source) -> list[tuple[Floats, Floats]]:
    """(read off the map, detected) on CROPS crops of each photo."""
    settings = records.manifest.settings
    found: list[tuple[Floats, Floats]] = []
    (detector,) = settings.detectors
    for number in range(len(records)):
        record, rgb = looked_up(records, source, number)
        for seed in range(CROPS):
            crop = trial_crop(record, settings, rgb, seed)
            truth = detected(crop.pixels, detector, settings)
            found.append((crop_estimate(record, detector, settings, crop), truth))
    return found


def fitted(read: Floats, truth: Floats) -> tuple[Floats, Floats]:
    """Mean and deviation of `truth` at AT, linear between them, by least squares."""
    at, read = np.array(AT), np.clip(read, 0, 1)
    low = np.clip(np.searchsorted(at, read, "right") - 1, 0, len(at) - 2)
    share = (read - at[low]) / (at[low + 1] - at[low])
    hats = np.zeros((len(at), len(read)))
    hats[low, np.arange(len(read))] = 1 - share
    hats[low + 1, np.arange(len(read))] = share
    enough = (hats > 0.5).sum(axis=1) > FEW

    def at_knots(values: Floats) -> Floats:
        found: Floats = np.asarray(
            np.linalg.lstsq(hats @ hats.T, hats @ values, rcond=None)[0], np.float64
        )
        for knot in np.flatnonzero(~enough):
            found[knot] = found[knot - 1]
        return found

    mean = at_knots(truth)
    variance = at_knots((truth - np.interp(read, at, mean)) ** 2)
    return mean, np.sqrt(np.maximum(variance, 0))


def in_words(values: Floats) -> str:
    """As a table of shards/correction.py has them."""
    return " ".join(f"{value:.3f}" for value in values)


def measure(where: str, name: str, folder: Path) -> dict[str, Any]:
    """The row of a detector."""
    whole = open_source(where)
    settings = Settings(detectors=(detector_settings(name),), shard_size=100)
    halves = [replace(whole, entries=whole.entries[number::2]) for number in (0, 1)]
    sets = []
    for number, half in enumerate(halves):
        out = folder / f"{name}-{number}"
        build_shards(half, out, settings, 1, max_rejected=1)
        sets.append(ShardSet(out))
    sides = zip(*pairs_of(sets[0], halves[0]), strict=True)
    mean, deviation = fitted(*(np.stack(side).ravel() for side in sides))
    row: dict[str, Any] = {"bench": "spread", "detector": name}
    row |= {"mean": in_words(mean), "deviation": in_words(deviation)}
    errors = measure_fidelity(sets[1], halves[1], len(sets[1]), jobs=1)[name]
    return row | {what: errors[what] for what in ("map", "uncorrected", "shifted")}


def measure_all(where: str, folder: Path) -> list[dict[str, Any]]:
    """A row per detector, on the photos that its tables were not measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [once(folder / f"{n}.json", partial(measure, where, n, folder)) for n in NAMES]
    for row in rows:
        print(row["detector"], row["mean"], row["deviation"], sep="\n")
    return rows


if __name__ == "__main__":
    keep("spread", measure_all, needs_folder=True)
