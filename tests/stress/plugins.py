"""Detectors of a person's own that now and then raise, hang, return nonsense or end their process.

Survived means that just those images are rejected, with the reason, that the ledger balances, and
that all others have the densities of a build in which it behaved.
"""

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from shards import ShardSet, load
from stress.cases import Case
from stress.forked import kamim, spawn
from stress.kills import LIMIT, warm_up
from stress.material import make_source

IMAGES, BUILDS = 12, 20  # of each way to go wrong, at scale 1
SECONDS = 5  # that it may look at an image: a hundred times what it takes
DARK = 8  # a picture without a brighter pixel: there it goes wrong

WAYS = {
    "raises": ("raise KeyError('dark')", "detector-failed"),
    "leaves by sys.exit": ("sys.exit(3)", "detector-failed"),
    "runs out of stack": ("return bad_{n}(rgb)", "detector-failed"),
    "asks for too much memory": ("np.empty(1 << 60, np.uint8)", "detector-failed"),
    "hangs asleep": ("time.sleep(9999)", "detector-hung"),
    "hangs at work": ("while True: pass", "detector-hung"),
    "stops its process": ("os.kill(os.getpid(), signal.SIGSTOP)", "detector-hung"),
    "kills its process": ("os.kill(os.getpid(), signal.SIGKILL)", "detector-died"),
    "ends its process": ("os._exit(0)", "detector-died"),
    "reads where no memory is": ("ctypes.string_at(0)", "detector-died"),
    "closes all files": ("os.closerange(0, 4096)", "detector-died"),
    "returns nothing": ("return None", "detector-output"),
    "returns a list": ("return [[1.0, 2.0]]", "detector-output"),
    "returns a function": ("return lambda: rgb", "detector-output"),
    "returns NaN": ("return good(rgb) * np.nan", "detector-output"),
    "returns a negative map": ("return good(rgb) - 1", "detector-output"),
    "returns objects": ("return np.array([[object()]])", "detector-output"),
    "returns whole numbers": ("return np.ones((4, 4), int)", "detector-output"),
    "returns points outside": ("return np.full((1, 2), 1e9, np.float32)", "detector-output"),
}
MODULE = """
import ctypes, os, signal, sys, time
import numpy as np

def good(rgb):
    return rgb[::8, ::8, 0].astype(np.float32) / 255
"""


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case a way, each of some builds with dark images at random places."""
    warm_up()
    folder = arena / "own"
    folder.mkdir()
    text = MODULE
    for number, (body, _) in enumerate(WAYS.values()):
        text += f"\ndef bad_{number}(rgb):\n    if rgb.max() < {DARK}:\n"
        text += f"        {body.format(n=number)}\n    return good(rgb)\n"
    (folder / "strange.py").write_text(text)
    for number, (name, (_, reason)) in enumerate(WAYS.items()):
        case, chosen = Case("plugins", name), random.Random(f"{name} {seed}")
        for build in range(max(1, round(BUILDS * scale))):
            case.trial(_flaw(arena, number, reason, chosen, build + seed))
        case.note = f"rejected as {reason}"
        yield case


def _flaw(arena: Path, number: int, reason: str, chosen: random.Random, seed: int) -> str:
    """What is wrong with a build in which the plug-in goes wrong on some images, or nothing."""
    source, out, calm = arena / "source", arena / "out", arena / "calm"
    for old in (source, out, calm):
        shutil.rmtree(old, ignore_errors=True)
    make_source(source, IMAGES, seed)
    paths = sorted(source.rglob("*.jpg"))
    bad = chosen.sample(range(1, IMAGES), 2)
    for place in bad:
        cv2.imwrite(str(paths[place]), np.zeros((120, 160, 3), np.uint8))
    flags = ["--grid", 16, "--map-crops", 1, "--shard-size", 6, "--max-rejected", 1, "--jobs", 2]
    flags += ["--detector-seconds", SECONDS]
    for each, call in ((out, f"bad_{number}"), (calm, "good")):
        words = ["maps", "build", source, each, "--detector", f"own=strange:{call}", *flags]
        process = spawn(_in, arena / "own", *words, log=arena / "build.log")
        if process.wait(LIMIT) != 0:
            return f"the build ended otherwise: {process.text()[-400:]}"
    ledger = load(out).ledger
    if not ledger.balanced or ledger.rejected != {reason: len(bad)}:
        return f"the ledger is {ledger}"
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    if {line["source"] for line in lines} != {str(paths[n].relative_to(source)) for n in bad}:
        return f"others were rejected: {lines}"
    ours, theirs = ShardSet(out), ShardSet(calm)
    for path in (path for place, path in enumerate(paths) if place not in bad):
        name = str(path.relative_to(source))
        if not np.array_equal(ours.density(name, "own"), theirs.density(name, "own")):
            return f"{name} has another density"
    return ""


def _in(folder: Path, *words: object) -> None:
    """The command, typed in `folder`."""
    os.chdir(folder)
    kamim(*words)
