"""What a larger frame costs and keeps: run by `make bench-frames`, a row per frame size.

Costs: bytes per image, processor time of the build and of the loader. Kept: the gradient energy,
the pixels and FAST's keypoints of a crop, beside the published crop of the source itself.

`python -m kamim.bench.frames PHOTOS WORK` keeps what is finished in WORK: killed, it goes on, at
the same commit and with the same PHOTOS.
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import joblib
import numpy as np
import torch
from numpy.typing import NDArray

from kamim.bench.measuring import in_turn, keep, once
from kamim.bench.provenance import ratio, spread
from preprocess import build_shards, detector_settings, open_source, storage
from preprocess.fidelity import looked_up, trial_crop
from preprocess.source import Source
from shards import Plan, Record, Settings, ShardSet, crop_frames, decode_frame
from shards.crops import unit_boxes
from shards.loader import Loader
from shards.progress import progress

SIZES = (256, 320, 384, 448)
BATCH, REPEATS, PASSES = 100, 5, 3
Pixels = NDArray[np.uint8]


def gradient_energy(pixels: Pixels) -> float:
    """Mean square of the differences of neighbouring grey pixels, along both axes."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY).astype(np.float64)
    return float((np.diff(grey, axis=0) ** 2).mean() + (np.diff(grey, axis=1) ** 2).mean())


def looks(pixels: Pixels) -> tuple[float, int]:
    """(gradient energy, keypoints that FAST finds)."""
    return gradient_energy(pixels), len(cv2.FastFeatureDetector_create().detect(pixels))


def crop_of(record: Record, rgb: Pixels, settings: Settings) -> list[float]:
    """[energy and keypoints of the frame's crop, and of the published one, their PSNR in dB]."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    crop = trial_crop(record, settings, rgb, seed=0)
    size = np.array([record.height]), np.array([record.width])
    box = torch.from_numpy(unit_boxes(np.array([crop.box]), *size))
    frame = torch.from_numpy(decode_frame(record.frame))[None]
    ours = crop_frames(frame, box, torch.tensor([crop.flips]), settings.crop)[0]
    pixels = np.ascontiguousarray(ours.round().byte().permute(1, 2, 0).numpy())
    error = float(((pixels.astype(np.float64) - crop.pixels) ** 2).mean())
    return [*looks(pixels), *looks(crop.pixels), 10 * np.log10(255**2 / max(error, 1e-3))]


def pixels_of(records: ShardSet, source: Source) -> dict[str, float]:
    """Means over a random crop of each photo; energy and keypoints as shares of the published."""
    settings, work = records.manifest.settings, joblib.delayed(crop_of)
    tasks = (work(*looked_up(records, source, n), settings) for n in range(len(records)))
    found = joblib.Parallel(n_jobs=joblib.cpu_count(), return_as="generator")(tasks)
    rows = np.array(list(progress(f"frames of {settings.frame}", len(records), found)))
    energy, keypoints, true_energy, true_keypoints, psnr = rows.mean(0)
    return {
        "energy": round(energy / true_energy, 3),
        "energy_median": round(float(np.median(rows[:, 0] / rows[:, 2])), 3),
        "keypoints": round(keypoints, 1),
        "published_keypoints": round(true_keypoints, 1),
        "psnr": round(psnr, 2),
    }


def build_ms(source: Source, frame: int) -> float:
    """Milliseconds of processor time per image of a whole build by one process."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        build_shards(source, Path(folder) / "out", _settings(frame), 1, max_rejected=1)
        return 1000 * (time.process_time() - begin) / len(source.entries)


def loader_ms(records: ShardSet) -> float:
    """Milliseconds of processor time per image of batches with their maps."""
    steps = PASSES * len(records) // BATCH
    loader = Loader(records, Plan(len(records), BATCH), 0, steps, maps=["fast"])
    begin = time.process_time()
    for _ in loader:
        pass
    return 1000 * (time.process_time() - begin) / (steps * BATCH)


def _settings(frame: int) -> Settings:
    return Settings(detectors=(detector_settings("fast"),), shard_size=100, frame=frame)


def measure(where: str, folder: Path) -> list[dict[str, Any]]:
    """A row per size of frames, printed."""
    source, sets = open_source(where), {}
    folder.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        build_shards(source, folder / str(size), _settings(size), max_rejected=1)
        sets[size] = ShardSet(folder / str(size))
    builds = {str(size): lambda size=size: build_ms(source, size) for size in SIZES}
    loads = {str(size): lambda size=size: loader_ms(sets[size]) for size in SIZES}
    build = once(folder / "build.json", lambda: in_turn(builds, 3))
    load = once(folder / "loader.json", lambda: in_turn(loads, REPEATS, warm=1))
    rows, least = [], str(SIZES[0])
    for size in SIZES:
        pixels = once(folder / f"pixels-{size}.json", partial(pixels_of, sets[size], source))
        row = {"bench": "frames", "frame": size, "images": len(source.entries), **pixels}
        row |= storage(sets[size]) | {"build_ms": spread(build[str(size)])}
        row |= {"loader_ms": spread(load[str(size)])}
        row |= {"build / 256": ratio(build[str(size)], build[least])}
        row |= {"loader / 256": ratio(load[str(size)], load[least])}
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


if __name__ == "__main__":
    keep("frames", measure, needs_folder=True)
