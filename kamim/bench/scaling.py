"""What ImageNet-22K and LAION-400M would cost: computed from measured rates and the sizes below.

The tables of docs/scaling.md, rendered by `make readme`.
"""

from typing import Any

from kamim.bench.markdown import renewed_parts, table
from kamim.bench.readme import REPOSITORY, kept, newest
from preprocess.detectors import detector_settings
from shards import Settings
from shards.tar import INDEX_DTYPE, places_of

PAGE = REPOSITORY / "docs" / "scaling.md"
DATASETS = {"ImageNet-22K": 14_200_000, "LAION-400M": 400_000_000}
SHARD = 1000  # inputs; what build chooses from 64,000 inputs on
# Means over the 800 ImageNet photos, bytes; a record is of frame, label, metadata and headers.
PHOTO, RECORD = 109_820, 24_589
# Of a listed input, a manifest's row as text, a File, and a record in a shard's .build row; and
# seconds to hash one input's listing. CPython 3.11; a test holds sizes to the objects themselves.
ENTRY, MANIFEST_ROW, FILE, BUILD_ROW, LISTING_HASH = 282, 170, 315, 81, 1.8e-6
SHA256 = 1.4e9  # bytes per second and core: docs/decisions.md, "Every shard is hashed"
STAT = 1e-3  # seconds per file on a network file system: assumed
LINKS = (1, 10, 100)  # Gbit/s
CORES = (16, 256, 4096)


def record_bytes(detectors: int, bank: int) -> int:
    """Bytes of a record in its tar: frame, maps, bank, and headers as in the 800 photos."""
    names = ("fast", "orb", "sift")[:detectors]
    chosen = Settings(detectors=tuple(map(detector_settings, names)), bank=bank)
    return RECORD + places_of(chosen)[1]


def core_seconds(row: dict[str, Any]) -> dict[str, float]:
    """Seconds per image and core by stage, and the rest of a one-job build, from a build's row."""
    stages = {stage: ms / 1000 for stage, ms in row["stages_ms"].items()}
    whole = 1 / row["images_per_s_1_job"]["median"]
    return {**stages, "read, write, hash": whole - sum(stages.values()), "whole": whole}


def cost() -> str:
    """Milliseconds by stage, core-hours, and the time on so many cores."""
    rows = newest("build")
    names = [row["detector"].upper() for row in rows]
    seconds = [core_seconds(row) for row in rows]
    groups = {
        "decode": ("decode",),
        "frame: shrink": ("frame",),
        "frame: encode": ("encode",),
        "four views: resize": ("resize",),
        "detect": ("detect",),
        "mark and sum": ("mark", "grid"),
        "read, write, hash: the rest of a build": ("read, write, hash",),
        "whole build, one core": ("whole",),
    }
    lines = [
        [f"{title}, ms", *(f"{1000 * sum(s[stage] for stage in parts):.2f}" for s in seconds)]
        for title, parts in groups.items()
    ]
    for dataset, images in DATASETS.items():
        needed = [images * s["whole"] for s in seconds]
        lines.append([f"{dataset}, core-hours", *(f"{n / 3600:,.0f}" for n in needed)])
        lines += [
            [f"{dataset} on {cores:,} cores", *(_time(n / cores) for n in needed)]
            for cores in CORES
        ]
    paces = [f"{CORES[-1] / s['whole'] / SHARD:,.0f}" for s in seconds]
    lines.append([f"tasks per second, {CORES[-1]:,} cores", *paces])
    return _table("one detector, 3 map crops", names, lines) + _origin(rows[0])


def storage() -> str:
    """Bytes of what goes in and what comes out."""
    lines = [["photos to read, 110 kB each", *(_bytes(n * PHOTO) for n in DATASETS.values())]]
    for detectors, bank in ((1, 0), (3, 0), (1, 4), (3, 4)):
        size = record_bytes(detectors, bank)
        title = f"shards, {detectors} detector{'s' * (detectors > 1)}, bank of {bank}: {size:,} B"
        lines.append([title, *(_bytes(n * size) for n in DATASETS.values())])
    lines.append(["shards of 1,000", *(f"{n // SHARD:,}" for n in DATASETS.values())])
    index = [_bytes(n * INDEX_DTYPE.itemsize) for n in DATASETS.values()]
    lines.append([f"index.npy, {INDEX_DTYPE.itemsize} B per record", *index])
    return _table("", list(DATASETS), lines)


def network() -> str:
    """The time that the bytes take on a link, and the cores that fill it."""
    size, lines = record_bytes(1, 0), list[list[str]]()
    for dataset, images in DATASETS.items():
        for title, each in (("photos in", PHOTO), ("shards out, or one epoch", size)):
            spent = [_time(images * each * 8 / (link * 1e9)) for link in LINKS]
            lines.append([f"{dataset}: {title}", *spent])
    for row in newest("build"):
        rate = (PHOTO + size) / core_seconds(row)["whole"]
        cores = [f"{link * 1e9 / 8 / rate:,.0f}" for link in LINKS]
        lines.append([f"cores that fill the link, building {row['detector'].upper()}", *cores])
    return _table("", [f"{link} Gbit/s" for link in LINKS], lines)


def driver() -> str:
    """What the process that lists, hands out and publishes holds and waits for."""
    files = {name: -(-images // SHARD) for name, images in DATASETS.items()}
    images, counts = list(DATASETS.values()), list(files.values())
    total = [n * record_bytes(1, 0) for n in images]
    rows = {
        f"listing in memory, {ENTRY} B per input": [_bytes(n * ENTRY) for n in images],
        "listing hashed": [_time(n * LISTING_HASH) for n in images],
        "folder listed at 1 ms per file": [_time(n * STAT) for n in images],
        "rows of finished shards in .build": [_bytes(n * BUILD_ROW) for n in images],
        "index while it is written (held three times)": [
            _bytes(3 * n * INDEX_DTYPE.itemsize) for n in images
        ],
        f"manifest.json, {MANIFEST_ROW} B per shard": [_bytes(n * MANIFEST_ROW) for n in counts],
        "opening: shards as Python objects, per process": [_bytes(n * FILE) for n in counts],
        "opening: one stat per shard at 1 ms": [_time(n * STAT) for n in counts],
        "opening: index hashed on one core": [
            _time(n * INDEX_DTYPE.itemsize / SHA256) for n in images
        ],
        "start: all shards hashed by 16 cores": [_time(n / SHA256 / 16) for n in total],
        "start: all shards read at 10 Gbit/s": [_time(n * 8 / 10e9) for n in total],
    }
    return _table("", list(DATASETS), [[title, *cells] for title, cells in rows.items()])


def loading() -> str:
    """What one GPU asks of its host, by backbone."""
    (loader,) = newest("loader")
    tar = loader["loader, threads, with maps"]["median"] / loader["cores"]
    found = {(row["loader"], row["detector"]): row for row in kept("versus")}
    ffcv = found["offline, FFCV raw", "fast"]
    raw = ffcv["images_per_s"]["median"] / ffcv["cores"]
    rows = list({row["recipe"]: row for row in kept("meaning")}.values())
    size, lines = record_bytes(1, 0), list[list[str]]()
    for row in rows:
        rate = row["gpu_images_per_s"]
        cells = [f"{rate:,}", f"{rate / tar:.1f}", f"{rate / raw:.1f}"]
        epochs = [_time(images / rate) for images in DATASETS.values()]
        lines.append([row["recipe"], *cells, f"{rate * size * 8 / 1e9:.1f}", *epochs])
    heads = ["images/s", "cores, WebDataset", "cores, FFCV raw", "Gbit/s"]
    heads += [f"an epoch of {name}" for name in DATASETS]
    kinds = " or ".join(sorted({row["gpu_is"] for row in rows}))
    return _table("one GPU", heads, lines) + f"\nThe GPU's rate is {kinds}.\n"


def _table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join([*table([title, *heads], rows), ""])


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, {"B": "kB", "kB": "MB", "MB": "GB", "GB": "TB"}[unit]
    return f"{count:,.1f} {unit}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def _origin(row: dict[str, Any]) -> str:
    return (
        f"\nMeasured with one job on {row['cores']} cores of an {row['cpu']}, ImageNet photos, "
        f"files in the page cache; {row['date']}, docs/results/bench/build.jsonl.\n"
    )


def renewed(text: str) -> str:
    """`text` of the page with its tables rendered anew."""
    parts = {
        "cost": cost(),
        "storage": storage(),
        "network": network(),
        "driver": driver(),
        "loading": loading(),
    }
    return renewed_parts(text, parts)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
