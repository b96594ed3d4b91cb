"""How fast shards are built, against the sum of their parts; run by `make bench-build`.

Each stage alone on one thread, whole builds by one and two jobs in turn with them, and peak memory
over 1x and 10x the images.
"""

import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kamim.bench.measuring import in_turn, keep
from kamim.bench.provenance import ratio, spread
from preprocess import build_shards, decode_image, detector_settings, open_source
from preprocess.densities import View, map_views, published_grey, squeezed
from preprocess.detectors import detect
from preprocess.rings import mark
from preprocess.shard import make_frame
from preprocess.source import Source
from shards import Settings, encode_frame
from shards.crops import cell_sums

REPEATS = {"fast": 5, "orb": 5, "sift": 3}
# Of the source in a measured build: its start, its end and the syncs of small shards are no part
# of the rate at which a large source is built.
COPIES = {"fast": 5, "orb": 3, "sift": 1}


def stage_ms(source: Source, name: str) -> dict[str, float]:
    """Milliseconds per image of each stage alone, one thread, on every image of `source`."""
    cv2.setNumThreads(1)
    detector = detector_settings(name)
    settings = Settings(detectors=(detector,), shard_size=1)
    edges = np.arange(settings.grid + 1) / settings.grid
    spent = dict.fromkeys(("decode", "frame", "encode", "resize", "detect", "mark", "grid"), 0.0)

    def timed(stage: str, work: Callable[..., Any], *arguments: Any) -> Any:
        begin = time.perf_counter()
        result = work(*arguments)
        spent[stage] += time.perf_counter() - begin
        return result

    for number, entry in enumerate(source.entries):
        rgb = timed("decode", decode_image, source.read(entry))
        timed("encode", encode_frame, timed("frame", make_frame, rgb, 256), 90)
        for view in map_views(number, rgb.shape[:2], settings):
            grey = timed("resize", _squeezed_grey, rgb, view)
            keypoints = timed("detect", detect, detector, grey, settings.crop)
            bitmap = timed("mark", mark, keypoints, view.rows, view.columns, "ring")
            timed("grid", _summed, bitmap, edges * view.rows, edges * view.columns)
    return {stage: 1000 * seconds / len(source.entries) for stage, seconds in spent.items()}


def _summed(bitmap: Any, y: Any, x: Any) -> Any:
    return cell_sums(cv2.integral(bitmap), y, x)


def _squeezed_grey(rgb: Any, view: View) -> Any:
    return published_grey(squeezed(rgb, view))


def build_rate(source: Source, name: str, jobs: int) -> float:
    """Images per second of one whole build with `jobs` processes, into a fresh folder."""
    settings = Settings(detectors=(detector_settings(name),))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        build_shards(source, Path(folder) / "out", settings, jobs, max_rejected=1)
        return len(source.entries) / (time.perf_counter() - begin)


def peak_megabytes(source: Source, copies: int) -> float:
    """Peak resident memory of a process that builds `source` repeated `copies` times, one job."""

    def work(pipe: Any) -> None:
        build_rate(replace(source, entries=source.entries * copies), "fast", 1)
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(send,))
    process.start()
    peak: float = receive.recv()
    process.join()
    return peak


def measure(source: Source, name: str, repeats: int, copies: int = 0) -> dict[str, Any]:
    """One row: stages alone, builds by one and two jobs of `source` listed `copies` times."""
    often = replace(source, entries=source.entries * (copies or COPIES[name]))
    build_rate(source, name, 2)  # warm-up: starts the workers and fills the page cache
    works: dict[str, Callable[[], Any]] = {
        "stages": lambda: stage_ms(source, name),
        "one": lambda: build_rate(often, name, 1),
        "two": lambda: build_rate(often, name, 2),
    }
    stages, one, two = in_turn(works, repeats).values()
    parts = {s: statistics.median(run[s] for run in stages) for s in stages[0]}
    ceilings = [2000 / sum(run.values()) for run in stages]
    return {
        "bench": "build",
        "detector": name,
        "images": len(often.entries),
        "n": repeats,
        "stages_ms": {stage: round(ms, 3) for stage, ms in parts.items()},
        "images_per_s_1_job": spread(one),
        "images_per_s_2_jobs": spread(two),
        "share_of_ceiling_2_jobs": ratio(two, ceilings),
        "two_jobs_over_one": ratio(two, one),
    }


def measure_all(where: str) -> list[dict[str, Any]]:
    """A row per detector, printed."""
    source = open_source(where)
    rows: list[dict[str, Any]] = []
    memory = [peak_megabytes(source, copies) for copies in (1, 10)]
    peaks = {"images x1": round(memory[0]), "images x10": round(memory[1])}
    for name, repeats in REPEATS.items():
        rows.append(measure(source, name, repeats) | {"peak_mb": peaks})
        print(table(rows[-1]), flush=True)
    print(f"peak memory of a job: {memory[0]:.0f} MB, over ten times the images {memory[1]:.0f} MB")
    return rows


def table(row: dict[str, Any]) -> str:
    """The row for a terminal."""
    stages = "  ".join(f"{stage} {ms:.2f}" for stage, ms in row["stages_ms"].items())
    one, two = row["images_per_s_1_job"], row["images_per_s_2_jobs"]
    share, scaling = row["share_of_ceiling_2_jobs"], row["two_jobs_over_one"]
    return (
        f"{row['detector']}: ms per image alone: {stages}\n"
        f"  1 job {one['median']:.0f} img/s, 2 jobs {two['median']:.0f} img/s; "
        f"2 jobs / 1 job {scaling['median']:.2f} ({scaling['min']:.2f} to {scaling['max']:.2f}); "
        f"share of 2 cores / sum of stages {share['median']:.2f} ({share['min']:.2f} to "
        f"{share['max']:.2f}), n = {row['n']}"
    )


if __name__ == "__main__":
    keep("build", measure_all)
