"""How far detection on a crop spreads round what its map says, and what that does to weights.

`python -m kamim.bench.spread PHOTOS` measures the tables of shards/correction.py on every other
photo and prints them, then measures bias and misplaced weight, corrected and not, on the others;
a row a detector.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

from kamim.bench.measuring import keep
from preprocess import build_shards, detector_settings, open_source
from preprocess.fidelity import detected, looked_up, measure_fidelity, read_crop, trial_crop
from shards import Record, Settings, ShardSet
from shards.correction import AT
from shards.progress import progress

NAMES = ("fast", "orb", "sift")
CROPS = 2  # of each photo, for the tables
FEW = 300  # cells round one of AT; with fewer it takes what its neighbour has
Floats = NDArray[np.float64]
Pairs = dict[str, list[tuple[Floats, Floats]]]


def pairs_of(record: Record, rgb: NDArray[np.uint8], settings: Settings) -> Pairs:
    """(read off the map, detected) on some crops of a photo, by detector."""
    found: Pairs = {detector.name: [] for detector in settings.detectors}
    for seed in range(CROPS):
        crop = trial_crop(record, settings, rgb, seed)
        for detector in settings.detectors:
            truth = detected(crop.pixels, detector, settings)
            found[detector.name].append((read_crop(record, detector, settings, crop), truth))
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


def measure_all(where: str) -> list[dict[str, Any]]:
    """A row per detector, on the photos that the tables were not measured on."""
    whole = open_source(where)
    settings = Settings(detectors=tuple(map(detector_settings, NAMES)), shard_size=100)
    halves = [replace(whole, entries=whole.entries[number::2]) for number in (0, 1)]
    with tempfile.TemporaryDirectory() as name:
        sets = []
        for number, half in enumerate(halves):
            build_shards(half, Path(name) / str(number), settings, max_rejected=1)
            sets.append(ShardSet(Path(name) / str(number)))
        work, records = joblib.delayed(pairs_of), sets[0]
        tasks = (work(*looked_up(records, halves[0], n), settings) for n in range(len(records)))
        found = joblib.Parallel(n_jobs=joblib.cpu_count(), return_as="generator")(tasks)
        pairs: list[Pairs] = list(progress("tables", len(records), found))
        errors = measure_fidelity(sets[1], halves[1], len(sets[1]))
    rows = []
    for detector in NAMES:
        sides = zip(*(pair for each in pairs for pair in each[detector]), strict=True)
        mean, deviation = fitted(*(np.concatenate([x.ravel() for x in side]) for side in sides))
        tables = {"mean": in_words(mean), "deviation": in_words(deviation)}
        print(detector, *tables.values(), sep="\n")
        of_detector = {what: errors[detector][what] for what in ("map", "uncorrected", "shifted")}
        rows.append({"bench": "spread", "detector": detector, **tables, **of_detector})
    return rows


if __name__ == "__main__":
    keep("spread", measure_all)
