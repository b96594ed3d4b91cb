"""Damaged images through the real build: no crash, no hang, no growth, and a ledger that balances.

An input survives if it is either a record that decodes or a line of rejected.jsonl, once, and its
sound neighbours are as they would be alone.
"""

import gc
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stress.broken import KINDS
from stress.cases import Case
from stress.forked import call, kamim, spawn
from stress.material import photographs

FLAGS = ("--frame", 64, "--crop", 64, "--map-crops", 1, "--grid", 16, "--max-rejected", 1)
SOUND = 4  # photographs among the damaged ones of a kind
LIMIT = 60, 5  # seconds for a build, and more for each input
PEAK = 2500  # MB of one process, for pictures of up to 100 million pixels
GROWTH = 16  # MB that a process may keep after building everything again
ROUNDS = 4


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case a kind of damage, and one of memory."""
    photos = photographs(60, seed)
    sound = dict(zip([f"sound{n}.jpg" for n in range(SOUND)], photos, strict=False))
    everything = arena / "everything"
    for kind, (make, count, valid) in KINDS.items():
        rng = random.Random(f"{kind} {seed}")
        folder = arena / kind.replace(" ", "-").replace(",", "") / "class"
        folder.mkdir(parents=True)
        for name, data in sound.items():
            (folder / name).write_bytes(data)
        for number in range(max(3, round(count * scale))):
            suffix, data = make(rng, photos)
            (folder / f"{number:04d}.{suffix}").write_bytes(data)
        yield build(Case("inputs", kind), folder, valid)
        if kind != "bombs":
            everything.mkdir(exist_ok=True)
            folder.rename(everything / folder.parent.name)
    case = Case("inputs", f"the build's memory, everything {ROUNDS} times over")
    growth, size = call(grow, str(everything), str(arena / "again"), log=arena / "grow.log")
    case.trial(f"it grew by {growth:.1f} MB" if growth > GROWTH else "")
    case.note = f"{growth:+.1f} MB from the second time to the last, of {size:.0f} MB"
    yield case


def build(case: Case, folder: Path, valid: bool, *flags: object, peak: int = PEAK) -> Case:
    """One build by two processes of what lies beside `folder`, and where each input went."""
    root = folder.parent
    out = root.parent / f"out-{root.name}"
    names = set(call(listed, str(root), log=out.with_suffix(".names.log")))
    limit = LIMIT[0] + LIMIT[1] * len(names)
    arguments = ["shards", "build", root, out, *FLAGS, *flags, "--jobs", 2]
    process = spawn(kamim, *arguments, log=out.with_suffix(".log"))
    status = process.wait(limit)
    if status != 0:
        what = f"hung for {limit} s" if status is None else f"exit status {status}"
        case.trial(f"{what}: {process.text()[-400:]}")
        return case
    checked = call(written, str(out), log=out.with_suffix(".check.log"))
    flaws = [*checked["problems"]]
    if process.peak > peak:
        flaws.append(f"{process.peak:.0f} MB were used")
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    places = Counter(checked["sources"]) + Counter(line["source"] for line in rejected)
    if set(places) - names:
        flaws.append(f"inputs out of nothing: {set(places) - names}")
    for name in sorted(names):
        flaw = "" if places[name] == 1 else f"{name} is in the ledger {places[name]} times"
        if name not in checked["sources"] and (valid or "/sound" in name):
            flaw = f"{name} is sound and was rejected"
        case.trial(flaw)
    for flaw in flaws:
        case.trial(flaw)
    case.note = (
        f"{len(checked['sources'])} written, {len(rejected)} rejected, "
        f"at most {process.peak:,.0f} MB a process"
    )
    return case


def listed(root: str) -> list[str]:
    """Names of all inputs of a source."""
    from preprocess import open_source

    return [entry.name for entry in open_source(root).entries]


def written(folder: str) -> dict[str, list[str]]:
    """Sources of all records of a set, and what verify finds."""
    from shards import ShardSet
    from shards.verification import verify_shards

    records = ShardSet(folder)
    problems = verify_shards(folder, "decode")
    if not records.manifest.ledger.balanced:
        problems.append("the ledger does not balance")
    return {"sources": [records[n].source for n in range(len(records))], "problems": problems}


def grow(source: str, out: str) -> tuple[float, float]:
    """MB that this process has more after the last of several equal builds than after the second,
    and what it has then.
    """
    from preprocess import build_shards, detector_settings, open_source
    from shards import Settings

    detectors = (detector_settings("fast"),)
    settings = Settings(frame=64, crop=64, map_crops=1, grid=16, detectors=detectors, shard_size=64)
    sizes = []
    for number in range(ROUNDS):
        build_shards(open_source(source), Path(f"{out}{number}"), settings, 1, max_rejected=1)
        gc.collect()
        sizes.append(resident())
    return sizes[-1] - sizes[1], sizes[-1]


def resident() -> float:
    """MB of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6
