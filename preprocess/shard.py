"""One shard, the unit of work: a slice of the inputs in, a published tar and its row out.

The row (a JSON file, written last) is the commit marker: a shard without one is done again.
"""

import json
import multiprocessing
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess.decode import Rejected, decode_image
from preprocess.densities import density_maps
from preprocess.sources import Entry, read
from shards import Record, Settings, ShardWriter, decode_frame, encode_frame
from shards.manifest import write_atomically
from shards.record import key_of
from shards.webdataset import shard_name


class BuildError(Exception):
    """A build that stopped or ended short of what was asked; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every task of a build shares: settings, where to read, where to write."""

    settings: Settings
    kind: str
    root: Path
    out: Path
    work: Path
    fail: bool  # stop at the first input that is rejected


def row_path(work: Path, number: int) -> Path:
    """Where the row of shard `number` lies while the build is unfinished."""
    return work / f"{number:06d}.json"


def write_shard(job: Job, number: int, entries: Sequence[Entry]) -> int:
    """Build shard `number` of `entries` and publish it, then its row. Returns the inputs seen.

    Raises BuildError on the first rejected input if the job says so.
    """
    cv2.setNumThreads(1)  # jobs are the parallelism; nested threads only fight
    if multiprocessing.current_process().name != "MainProcess":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    first = number * job.settings.shard_size
    rejected = []
    with ShardWriter(job.out / shard_name(number)) as writer:
        for index, entry in enumerate(entries, start=first):
            try:
                rgb = decode_image(read(job.kind, job.root, entry))
            except Rejected as error:
                if job.fail:
                    raise BuildError(
                        f"{entry.name!r} was rejected ({error.reason}: {error.detail}); repair or "
                        "remove it, or go on without it by --on-error quarantine"
                    ) from None
                facts = {"key": key_of(index), "source": entry.name}
                facts |= {"reason": error.reason, "detail": error.detail}
                rejected.append(facts)
                continue
            frame, maps = describe(rgb, job.settings)
            height, width = rgb.shape[:2]
            writer.add(Record(key_of(index), frame, entry.label, height, width, entry.name, maps))
    row = {"file": asdict(writer.file), "index": writer.index.tolist(), "rejected": rejected}
    # A row that a power cut damages or loses only means that its shard is built again.
    write_atomically(row_path(job.work, number), json.dumps(row).encode("ascii"), durable=False)
    return len(entries)


def read_row(work: Path, out: Path, number: int) -> dict[str, Any] | None:
    """The row of shard `number` if that shard was published whole, else None."""
    try:
        row: dict[str, Any] = json.loads(row_path(work, number).read_bytes())
        whole = (out / shard_name(number)).stat().st_size == row["file"]["bytes"]
    except (FileNotFoundError, ValueError):
        return None
    return row if whole else None


def describe(rgb: NDArray[np.uint8], settings: Settings) -> tuple[bytes, NDArray[np.uint8]]:
    """The encoded frame and the maps (uint8 [D, G, G]) of one image, uint8 RGB [H, W, 3]."""
    frame = encode_frame(squeeze(rgb, settings.frame), settings.quality)
    seen = decode_frame(frame) if settings.detect_on == "frame" else rgb
    maps = density_maps(seen, settings.detectors, settings.scales, settings.grid, settings.mark)
    return frame, maps


def squeeze(rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """`rgb` as a square of `side` px: shrunk by area average, enlarged by linear interpolation."""
    height, width = rgb.shape[:2]
    if height > side or width > side:
        smaller = (min(width, side), min(height, side))
        rgb = cv2.resize(rgb, smaller, interpolation=cv2.INTER_AREA)
    if rgb.shape[:2] != (side, side):
        enlarged = cv2.resize(rgb, (side, side), interpolation=cv2.INTER_LINEAR)
        rgb = enlarged
    return np.ascontiguousarray(rgb)
