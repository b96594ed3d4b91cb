"""Measures the edge rule of a detector: what it finds near the edge of a crop, as a share of what
it finds there in a larger picture.

Each photo is squeezed to WHOLE px. The density in its middle WINDOW px is compared with that of
detection on this window alone (docs/decisions.md, "A map is what its views found").
"""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
from numpy.typing import NDArray

from preprocess.decode import Rejected, decode_image
from preprocess.densities import View, covered, published_grey, squeezed
from preprocess.detectors import option_flags
from preprocess.source import Entry, Source
from shards.errors import UserError
from shards.files import write_atomically
from shards.progress import progress
from shards.report import spread
from shards.spec import Detector, Edge, as_json, detector_of, fingerprint, plain

WHOLE, WINDOW = 320, 192  # px
REACH = 64  # px from the edge that are measured; all of the density is found beyond
FULL = 0.99  # share from which on a rule ends
LEAST = 20  # photos

Floats = NDArray[np.float64]


def measure_edge(
    source: Source, detector: Detector, mark: str = "ring", samples: int = 800, jobs: int = 0
) -> Edge:
    """The edge rule of `detector` on `samples` images of `source`, spread evenly.

    Raises UserError if too few can be read, or if it finds nothing on them.
    """
    picked = spread(len(source.entries), samples)
    bare, work = replace(source, entries=[], classes=[]), joblib.delayed(_profiles)
    tasks = (work(bare, source.entries[n], detector, mark) for n in picked)
    found = joblib.Parallel(n_jobs=jobs or joblib.cpu_count(), return_as="generator")(tasks)
    profiles = [pair for pair in progress("edge rule", len(picked), found) if pair is not None]
    if len(profiles) < LEAST:
        raise UserError(f"{len(profiles)} images could be used, {LEAST} are needed: {source.root}")
    window, whole = np.sum(profiles, axis=0)
    if not (whole > 0).all() or not window[REACH:].sum() > 0:
        raise UserError(f"{detector.name} finds too little on these images for an edge rule")
    return _edge(window / whole * (whole[REACH:].sum() / window[REACH:].sum()), mark, len(profiles))


def _edge(shares: Floats, mark: str, photos: int) -> Edge:
    """The rule of noisy `shares` by distance, px: they are made to rise, and end where everything
    is found. Of leading zeros only the last is kept.
    """
    rising = np.maximum.accumulate(shares[:REACH])
    falling = np.minimum.accumulate(shares[:REACH][::-1])[::-1]
    rule = np.minimum((rising + falling) / 2, 1)
    last = int(np.argmax(rule >= FULL)) if (rule >= FULL).any() else REACH - 1
    rule[last] = 1
    first = max(int(np.argmax(rule > 0.0005)) - 1, 0)
    at = range(first, last + 1)
    return Edge([*map(float, at)], [round(float(rule[n]), 3) for n in at], mark, photos)


def _profiles(
    source: Source, entry: Entry, detector: Detector, mark: str
) -> tuple[Floats, Floats] | None:
    """Density of the window and of the whole at each distance from the window's edge, float64
    [WINDOW / 2], in the middle third of the other direction; None if the image is rejected.
    """
    cv2.setNumThreads(1)
    before = (WHOLE - WINDOW) // 2
    inside = slice(before, before + WINDOW)
    try:
        rgb = decode_image(source.read(entry))
        big = squeezed(rgb, View((0, 0, *rgb.shape[:2]), WHOLE, WHOLE))
        small = np.ascontiguousarray(big[inside, inside])
        window, whole = (
            covered(detector, shown if detector.plugin else published_grey(shown), mark, WINDOW)
            for shown in (small, big)
        )
    except Rejected:
        return None
    return _by_distance(window), _by_distance(whole[inside, inside])


def _by_distance(found: NDArray[Any]) -> Floats:
    middle = slice(WINDOW // 3, WINDOW - WINDOW // 3)
    lines = found[:, middle].sum(axis=1, dtype=float) + found[middle].sum(axis=0, dtype=float)
    return np.asarray((lines + lines[::-1])[: WINDOW // 2])


def write_edge(path: Path, detector: Detector, versions: dict[str, str]) -> None:
    """Write the rule of `detector` with all that it was measured for."""
    content: dict[str, Any] = {"detector": plain(detector), "versions": versions}
    write_atomically(path, as_json(content | {"checksum": fingerprint(content)}))


def measuring(detector: Detector, mark: str, source: str = "SOURCE") -> str:
    """The command that measures the edge rule of `detector`."""
    words = ["kamim shards edge-rule", shlex.quote(detector.call), source]
    words += option_flags(detector) + ([f"--mark {mark}"] if mark != "ring" else [])
    return " ".join(words)


def with_edge(
    detectors: tuple[Detector, ...], path: Path, mark: str = "ring"
) -> tuple[Detector, ...]:
    """`detectors` with the rule in `path`. UserError if it was measured for none of them.

    mark: what the build has a keypoint cover.
    """
    try:
        content = json.loads(path.read_bytes())
        checksum = content.pop("checksum")
        measured = detector_of(content["detector"])
        if fingerprint(content) != checksum or measured.edge is None:
            raise ValueError("it was changed")
    except FileNotFoundError:
        raise UserError(
            f"there is no file {path} for --edge-rule; measure one by kamim shards edge-rule"
        ) from None
    except OSError as error:
        raise UserError(
            f"--edge-rule {path} cannot be read ({error.strerror}); name a file that kamim shards "
            "edge-rule wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no edge rule that kamim wrote: {error}") from None
    asked = next((each for each in detectors if each.name == measured.name), None)
    if asked is None:
        names = ", ".join(each.name for each in detectors)
        raise UserError(f"{path} is the edge rule of {measured.name}; this build has {names} alone")
    if asked != replace(measured, edge=None):
        raise UserError(
            f"{path} was measured for {measured.name} with other options or other code: "
            f"{measured.options}; measure it again: {measuring(asked, mark)}"
        )
    return tuple(
        replace(d, edge=measured.edge) if d.name == measured.name else d for d in detectors
    )
