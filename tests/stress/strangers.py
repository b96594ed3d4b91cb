"""Test images of another project, broken and odd ones among them, by all detectors.

They are those of Pillow's source distribution, which the package index has; not run without it.
"""

import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stress.cases import Case
from stress.forked import call
from stress.inputs import build

PEAK = 1500  # MB of one process
SECONDS = 10  # of one input, by all detectors


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case of the ledger, one of what is printed, one of time."""
    case = Case("strangers", "Pillow's test images")
    images = unpacked(arena)
    if images is None:
        case.note = "not run: the package index does not give Pillow's sources"
        yield case
        return
    names = call(detectors, log=arena / "detectors.log")
    yield build(case, images / "any", False, "--detector", ",".join(names), peak=PEAK)
    case.note += f"; {', '.join(names)}"
    printed = Case("strangers", "lines of C libraries that do not name their input")
    for line in (images.parent / f"out-{images.name}.log").read_text(errors="replace").splitlines():
        if any(word in line.lower() for word in ("tiff", "jpeg", "samples per pixel", "webp")):
            printed.trial("" if ": " in line and (images / line.split(": ")[0]).is_file() else line)
    yield printed
    took = call(times, str(images), names, log=arena / "times.log", limit=3600)
    slow = Case("strangers", f"time per input, at most {SECONDS} s")
    for name, seconds in took.items():
        slow.trial(f"{name} took {seconds:.1f} s" if seconds > SECONDS else "")
    slow.note = f"the slowest took {max(took.values()):.1f} s"
    yield slow


def unpacked(arena: Path) -> Path | None:
    """The folder of images, from the newest source distribution that pip finds."""
    line = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "pillow"]
    subprocess.run([*line, "--dest", arena, "pillow"], capture_output=True, check=False)
    for path in arena.glob("pillow-*.tar.gz"):
        with tarfile.open(path) as tar:
            inside = [m for m in tar.getmembers() if "/Tests/images/" in m.name]
            tar.extractall(arena, members=inside, filter="data")
        return next(arena.glob("pillow-*/Tests/images"))
    return None


def detectors() -> list[str]:
    """Names of all keypoint detectors that this OpenCV has."""
    from preprocess import detector_settings
    from preprocess.detectors import DEFAULTS
    from shards import UserError

    found = []
    for name in DEFAULTS:
        try:
            found.append(detector_settings(name).name)
        except UserError:
            continue
    return found


def times(root: str, names: list[str]) -> dict[str, float]:
    """Seconds of each input: reading, decoding, frame and maps, as the build's own default is."""
    from preprocess import Rejected, decode_image, detector_settings, open_source
    from preprocess.shard import make_record
    from shards import Settings

    source, settings = open_source(root), Settings(detectors=tuple(map(detector_settings, names)))
    took = {}
    for index, entry in enumerate(source.entries):
        begin = time.perf_counter()
        with suppress(Rejected):
            make_record(decode_image(source.read(entry)), index, entry, settings)
        took[entry.name] = time.perf_counter() - begin
    return took
