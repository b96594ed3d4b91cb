"""Offline against online detection: all loaders on the same images and cores, interleaved.

Images per second with their spread, the chain of factors between the published loader and ours, and
each loader's share of what no loader can beat.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch

from kamim.bench.provenance import ratio, spread
from kamim.bench.rivals import (
    Rate,
    ceilings,
    image_folder,
    litdata_stream,
    offline,
    offline_ffcv,
    online,
    stock_webdataset,
)
from preprocess import build_shards, detector_settings
from preprocess.source import Source
from shards import Settings, ShardSet
from shards.beton import convert_to_ffcv
from shards.errors import install
from shards.progress import waiting

DETECTORS = ["fast", "orb", "sift"]
NOISY = 1.3  # most over least of a decoding ceiling in one run; beyond it, nothing is to be trusted
FRAMES = "published, from frames"
# From the published loader to ours, a change at a time: (what changes, faster, slower).
CHAIN = (
    ("marks by dilation", "published, marks by dilation: fast", "online, published: fast"),
    ("no detection", "online, published: None", "published, marks by dilation: fast"),
    ("smaller JPEG", f"{FRAMES}: None", "online, published: None"),
    ("no crop on the CPU", f"{FRAMES}, no crop: None", f"{FRAMES}: None"),
    ("threads, simplejpeg, no copies", "offline, WebDataset: fast", f"{FRAMES}, no crop: None"),
)
# What each loader is measured against.
CEILING = {
    "online, published": "decode only, photographs by Pillow",
    "ImageFolder": "decode only, photographs by Pillow",
    "online, optimised": "decode only, frames",
    "offline, WebDataset": "decode only, frames",
    "offline, WebDataset raw": "copy only, raw frames",
    "offline, FFCV JPEG": "decode only, frames",
    "offline, FFCV raw": "copy only, raw frames",
    "litdata": "decode only, photographs by Pillow",
    "stock webdataset": "decode only, frames",
    "FFCV's RandomResizedCrop": "decode only, frames",
}


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure: seconds a repeat of each loader, and repeats."""

    seconds: float
    repeats: int


def prepare_set(source: Source, folder: Path, quick: bool = False, quality: int = 90) -> ShardSet:
    """The set that all of ours read, built if it is not there: FAST's maps, not `quick` all.

    Of quality 0 are raw frames, with FAST's maps alone.
    """
    folder /= f"set-{quality}"
    detectors = tuple(map(detector_settings, DETECTORS[: 1 if quick or not quality else None]))
    settings = Settings(detectors=detectors, quality=quality)
    build_shards(source, folder, settings, max_rejected=1)
    return ShardSet(folder)


def prepare_rivals(source: Source, folder: Path, cores: int, quick: bool) -> dict[str, Rate]:
    """Build the sets under `folder` and make every loader that this machine can run."""
    records = prepare_set(source, folder, quick)
    detectors = records.manifest.detectors
    rates = online(source, records, detectors, cores)
    for name in (*detectors, None):
        rates[f"offline, WebDataset: {name}"] = offline(records, name)
    raw = prepare_set(source, folder, quick, quality=0)
    for name in ("fast",) if quick else ("fast", None):
        rates[f"offline, WebDataset raw: {name}"] = offline(raw, name)
    _as_files(source, folder / "files")
    rates["ImageFolder: None"] = image_folder(folder / "files", cores)
    try:
        import webdataset  # noqa: F401

        rates["stock webdataset: None"] = stock_webdataset(records, cores)
    except ImportError:
        print("the webdataset library is not installed and not compared", file=sys.stderr)
    try:
        import litdata  # noqa: F401

        if not quick:  # writing its chunks takes longer than measuring them
            rates["litdata: None"] = litdata_stream(source, folder / "litdata", cores)
    except ImportError:
        print("litdata is not installed and not compared: pip install litdata", file=sys.stderr)
    try:
        rates |= _ffcv(records, source, folder, quick)
    except (ImportError, ValueError) as error:
        print(
            f"FFCV is not installed and not compared ({error}); {install('ffcv')}", file=sys.stderr
        )
    return rates | ceilings(source, records, cores)


def _ffcv(records: ShardSet, source: Source, folder: Path, quick: bool) -> dict[str, Rate]:
    from kamim.bench.ffcv import stock, write_stock

    rates: dict[str, Rate] = {}
    for frames, images in (("jpeg", 10_000), ("raw", 50_000)):
        convert_to_ffcv(records.folder, folder / frames, frames)
        copy = ShardSet(folder / frames)
        title = f"offline, FFCV {'JPEG' if frames == 'jpeg' else 'raw'}"
        for name in ("fast",) if quick else (*DETECTORS, None):
            rates[f"{title}: {name}"] = offline_ffcv(copy, name, images)
    write_stock(source, folder / "stock.beton")
    run = stock(folder / "stock.beton", len(source.entries))
    rates["FFCV's RandomResizedCrop: None"] = lambda _: run()
    return rates


def _as_files(source: Source, folder: Path) -> None:
    """The photographs as class folders of files, for ImageFolder."""
    for number, entry in enumerate(source.entries):
        path = folder / f"{entry.label:05d}" / f"{number:09d}{Path(entry.name).suffix or '.jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.read(entry))


def measure(
    rates: dict[str, Rate], count: int, effort: Effort
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Images per second of every loader, in turn, `effort.repeats` times; and of a warm-up."""
    cv2.setNumThreads(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    warm, images, wanted = {}, {}, 0.0
    for name, rate in rates.items():
        begin = time.perf_counter()
        with waiting(f"warm-up  {name}"):
            warm[name] = rate(count)
        wanted += max(time.perf_counter() - begin, effort.seconds)
        images[name] = max(count, round(warm[name] * effort.seconds))
        print(f"warm-up  {name:45s} {warm[name]:9,.0f} images/s", file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {name: [] for name in rates}
    for repeat in range(effort.repeats):
        left = (effort.repeats - repeat) * wanted
        round_of = f"repeat {repeat + 1} of {effort.repeats}"
        print(f"{round_of}, about {left:.0f} s left", file=sys.stderr, flush=True)
        for name, rate in rates.items():
            with waiting(f"repeat {repeat + 1}  {name}"):
                found[name].append(rate(images[name]))
    torch.set_num_threads(threads)
    return found, warm


def rows_of(
    found: dict[str, list[float]], warm: dict[str, float], images: int
) -> list[dict[str, Any]]:
    """One row per loader: rate, share of its ceiling, and times the published loader."""
    rows = []
    for name, values in found.items():
        loader, _, detector = name.partition(": ")
        row: dict[str, Any] = {"bench": "versus", "loader": loader, "detector": detector or "None"}
        row |= {"images": images, "n": len(values), "images_per_s": spread(values, 0)}
        row["warm_up_images_per_s"] = round(warm[name])
        top = CEILING.get(loader)
        if top:
            row["of_ceiling"] = ratio(values, found[top]) | {"ceiling": top}
        anchor = found.get(f"online, published: {detector}")
        if anchor and loader.startswith(("offline", "online, optimised")):
            row["times_published"] = ratio(values, anchor)
        rows.append(row)
    total = ratio(found[CHAIN[-1][1]], found[CHAIN[0][2]])
    factors = {change: ratio(found[fast], found[slow]) for change, fast, slow in CHAIN}
    chain: dict[str, Any] = {"bench": "versus", "loader": "chain", "detector": "fast"}
    chain |= {"images": images, "n": len(found[CHAIN[0][1]]), "total": total, "factors": factors}
    chain["product"] = round(math.prod(factor["median"] for factor in factors.values()), 2)
    return [*rows, chain]


def noise(found: dict[str, list[float]]) -> str:
    """Why the run is not to be trusted, or nothing: decoding alone must not vary within a run."""
    anchors = {name: values for name, values in found.items() if name.startswith("decode only")}
    wide = {name: max(values) / min(values) for name, values in anchors.items()}
    worst = max(wide, key=lambda name: wide[name])
    if wide[worst] <= NOISY:
        return ""
    return (
        f"this machine was too noisy to trust: {worst!r} varied {wide[worst]:.2f}-fold between "
        "repeats; run again when it is quiet, or with more --repeats"
    )
