"""One shard, the unit of work: a slice of the inputs in, a published tar and its row out.

The row (a JSON file, written last) is the commit marker: a shard without one is done again.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import cv2
import numpy as np
import PIL
import simplejpeg
from numpy.typing import NDArray

from preprocess import BuildError, isolation
from preprocess.decode import Rejected, decode_image, naming
from preprocess.densities import bank_of, maps_of, weights_of
from preprocess.files import of_each, version_of
from preprocess.source import Entry, Source
from shards import Record, Settings, ShardSet, ShardWriter, encode_frame
from shards.files import MANIFEST
from shards.maps import MapsWriter
from shards.record import key_of
from shards.remote.place import Place
from shards.spec import FORMAT_VERSION, fingerprint
from shards.tar import shard_name

FACTS = "facts.json"  # in the work folder: settings, source and versions of the build under way
UNREAD = ("vanished", "unreadable", "changed")  # reasons that another machine may not share
ROWS = 256  # held in memory at a time
PATIENCE_SECONDS = 60  # for which a network file system may not yet show what another wrote


@dataclass(frozen=True, slots=True)
class Job:
    """What every task of a build shares: settings, where to read, where to write."""

    settings: Settings
    source: Source  # without its entries
    out: Place
    work: Place
    scratch: Path  # on the driver's machine, for what goes to a store
    fingerprint: str  # of the FACTS in `work`: who does not see them works elsewhere
    reuse: Path | None = None  # a finished set of the same source, to copy frames and maps from
    fail: bool = False  # stop at the first input that is rejected
    modules: tuple[str, ...] = ()  # folders where the driver finds plug-ins
    seconds: float = isolation.SECONDS  # that a plug-in may look at an image


class Written(NamedTuple):
    """What a task says of its shard: number, inputs seen, bytes, the machine that wrote it, and
    the first of its inputs that could not be read there, -1 if all could.
    """

    number: int
    inputs: int
    bytes: int
    host: str
    unread: int


def library_versions(settings: Settings) -> dict[str, str]:
    """Versions of the libraries that decide the bytes of a record."""
    known = [("opencv", cv2), ("pillow", PIL), ("simplejpeg", simplejpeg)]
    if settings.weights or not all(d.has_keypoints and not d.plugin for d in settings.detectors):
        # Its FFT decides the frequency map, its exp the weights; a plug-in uses who knows what.
        known.append(("numpy", np))
    return {name: library.__version__ for name, library in known}


def row_name(number: int) -> str:
    """What the row of shard `number` is called while the build is unfinished."""
    return f"{number:06d}.json"


def write_shard(job: Job, number: int, entries: Sequence[Entry]) -> Written:
    """Build shard `number` of `entries` and publish it, then its row.

    Raises BuildError on the first rejected input if the job says so, and where this machine does
    not see the driver's folders or has other libraries.
    """
    _check_here(job)
    sys.path.extend(folder for folder in job.modules if folder not in sys.path)
    isolation.allow(job.seconds)
    cv2.setNumThreads(1)  # jobs are the parallelism; nested threads only fight
    in_main_thread = threading.current_thread() is threading.main_thread()
    if multiprocessing.current_process().name != "MainProcess" and in_main_thread:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    first = number * job.settings.shard_size
    rejected, names, unread = list[dict[str, str]](), list[str](), -1
    with (
        _publishing(job, shard_name(number, job.settings)) as path,
        ShardWriter(path) if job.settings.frame else MapsWriter(path, job.settings) as writer,
    ):
        for index, (entry, read) in enumerate(job.source.read_in_order(entries), start=first):
            try:
                data = read()
                with naming(entry.name):
                    rgb = decode_image(data)
                old = _old_record(job.reuse, index) if job.reuse else None
                record = make_record(rgb, index, entry, job.settings, old)
            except Rejected as error:
                if job.fail:
                    raise BuildError(
                        f"{entry.name!r} was rejected ({error.reason}: {error.detail}); repair or "
                        "remove it, or go on without it by --on-error quarantine"
                    ) from None
                rejected.append(rejected_line(index, entry, error))
                if unread < 0 and error.reason in UNREAD:
                    unread = index - first
                continue
            writer.add(record)
            names += [] if job.settings.frame else [entry.name]
    row = {"file": asdict(writer.file), "index": writer.index.tolist(), "rejected": rejected}
    row |= {"names": names, "fingerprint": job.fingerprint}
    # A row that a power cut damages or loses only means that its shard is built again.
    job.work.write(row_name(number), json.dumps(row).encode("ascii"), durable=False)
    return Written(number, len(entries), writer.file.bytes, socket.gethostname(), unread)


@contextmanager
def _publishing(job: Job, name: str) -> Iterator[Path]:
    """Where to write the shard `name`, which is in its place when the block ends."""
    if not job.out.is_url:
        yield job.out.folder / name
        return
    near = job.scratch if job.scratch.is_dir() else None  # this may be another machine
    with TemporaryDirectory(dir=near) as folder:
        yield Path(folder) / name
        _check_here(job)  # or a killed build's orphan writes into what another has finished
        job.out.put(name, Path(folder) / name)


def rejected_line(index: int, entry: Entry, error: Rejected) -> dict[str, str]:
    """What rejected.jsonl says of input number `index`."""
    facts = {"key": key_of(index), "source": entry.name}
    return {**facts, "reason": error.reason, "detail": error.detail}


def _check_here(job: Job) -> None:
    """BuildError unless this machine sees the driver's work folder and has its libraries."""
    host, data = socket.gethostname(), job.work.read(FACTS)
    try:
        facts = json.loads(data or b"{}")
    except ValueError:
        facts = {}
    if fingerprint(facts) != job.fingerprint:
        if job.out.is_url:
            raise BuildError(
                f"{job.work}/{FACTS} is not that of this build: another one has finished there, or "
                "taken the place, or this machine sees another store; run the same command again"
            )
        raise BuildError(
            f"the worker on {host} does not see the folder {job.out} of this build; source and "
            "shards must be on a file system that all machines see, under the same path"
        )
    then = {**facts["versions"], "format": facts["format_version"]}
    for name, version in {**library_versions(job.settings), "format": FORMAT_VERSION}.items():
        if then[name] != version:
            raise BuildError(
                f"the worker on {host} has {name} {version}, this build began with "
                f"{then[name]}: the bytes would differ; install the same there"
            )


def confirm(job: Job, written: Written, entries: Sequence[Entry]) -> None:
    """BuildError unless what another machine says of the shard of `entries` holds here too.

    The shard is there, with its size, and inputs that could not be read there cannot be read here.
    """
    row, begin = row_name(written.number), time.monotonic()
    # What was put into a store was looked at there.
    path = job.out.folder / shard_name(written.number, job.settings)
    while not job.out.is_url and (
        (size := _size(path)) != written.bytes or _size(job.work.folder / row) is None
    ):
        if time.monotonic() - begin > PATIENCE_SECONDS:
            raise BuildError(
                f"the worker on {written.host} wrote {path} with {written.bytes} bytes, here it "
                f"has {size}; shards must be on a file system that all machines see"
            )
        os.listdir(job.out.folder)  # has NFS look again
        time.sleep(0.1)
    if written.unread < 0:
        return
    entry = entries[written.unread]
    try:
        job.source.read(entry)
    except Rejected:
        return
    job.work.remove(row)  # the next build does it again
    raise BuildError(
        f"the worker on {written.host} could not read {entry.name!r} below "
        f"{job.source.root}, this machine can; the source must be on a file system that all see, "
        "under the same path"
    )


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def read_rows(
    work: Place, out: Place, mark: str, numbers: Iterable[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, row) of those shards of `numbers` that a build of the fingerprint `mark` published
    whole, in order.
    """
    sizes, there = out.sizes(), work.sizes()
    known = [number for number in sorted(numbers) if row_name(number) in there]
    for at in range(0, len(known), ROWS):  # a store is asked for many at a time
        some = known[at : at + ROWS]
        for number, data in zip(
            some, of_each(work.where, work.read, map(row_name, some)), strict=True
        ):
            try:
                row = json.loads(data or b"")
                file = row["file"]
            except (ValueError, KeyError, TypeError):
                continue
            if row.get("fingerprint") == mark and sizes.get(file["name"]) == file["bytes"]:
                yield number, row


def make_record(
    rgb: NDArray[np.uint8],
    index: int,
    entry: Entry,
    settings: Settings,
    old: tuple[Record, Settings] | None = None,
) -> Record:
    """The record of input number `index`, `entry`, with pixels `rgb` (uint8 RGB [H, W, 3]).

    Frame and maps of the `old` record are taken over where its settings give the same. Raises
    Rejected if a plug-in fails on the image.
    """
    height, width = rgb.shape[:2]
    frame = old[0].frame if old and settings.frame else b""
    if settings.frame and not old:
        frame = encode_frame(make_frame(rgb, settings.frame), settings.quality)
    known = _known_maps(old, settings) if old else {}
    missing = tuple(d for d in settings.detectors if d.name not in known)
    if missing:
        wanted = replace(settings, detectors=missing)
        known |= maps_of(rgb, frame, index, wanted, (height, width))
    maps = {detector.name: known[detector.name] for detector in settings.detectors}
    bank = bank_of(rgb, index, settings) if settings.bank else None
    weights = weights_of(maps, bank, settings)
    return Record(key_of(index), frame, entry.label, height, width, entry.name, maps, bank, weights)


def _known_maps(old: tuple[Record, Settings], settings: Settings) -> dict[str, NDArray[np.uint8]]:
    """The maps of `old`, by detector, that a build with `settings` would make again."""
    record, before = old
    same = ["crop", "area", "map_crops", "grid", "mark", "detect_on", "levels"]
    same += ["frame", "quality"] if settings.detect_on == "frame" else []
    if any(getattr(before, name) != getattr(settings, name) for name in same):
        return {}
    return {d.name: record.maps[d.name] for d in before.detectors if d in settings.detectors}


def _old_record(folder: Path, index: int) -> tuple[Record, Settings] | None:
    """Record number `index` of the finished set in `folder` with its settings, if it is there."""
    records = _open(folder)
    keys = records.index["key"]
    number = int(np.searchsorted(keys, index))
    if number == len(keys) or keys[number] != index:
        return None
    return records[number], records.manifest.settings


def _open(folder: Path) -> ShardSet:
    return _kept_open(folder, version_of(str(folder / MANIFEST)))


@lru_cache(maxsize=1)
def _kept_open(folder: Path, version: tuple[int, ...]) -> ShardSet:
    """Opened once a worker, which may outlive the set as it was: its index is hashed then."""
    return ShardSet(folder)


def make_frame(rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """`rgb` as a square of `side` px: shrunk by area average, enlarged by linear interpolation."""
    height, width = rgb.shape[:2]
    if height > side or width > side:
        smaller = (min(width, side), min(height, side))
        rgb = cv2.resize(rgb, smaller, interpolation=cv2.INTER_AREA)
    if rgb.shape[:2] != (side, side):
        enlarged = cv2.resize(rgb, (side, side), interpolation=cv2.INTER_LINEAR)
        rgb = enlarged
    return np.ascontiguousarray(rgb)
