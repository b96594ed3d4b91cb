"""An hour of everything at once, and what is left of it: memory, descriptors, files, processes.

One process builds, verifies and reads sets again and again, as a long job would. Beside it
commands are killed, or meet files that may not grow or too few descriptors, and go on. In the end
nothing may have grown, and nothing be left but what a killed worker pool leaves to the system: its
semaphores, and, if its main process alone is killed while workers start, those workers, idle.
"""

import gc
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stress import places
from stress.cases import Case
from stress.faults import _through, again, calm
from stress.forked import behind, call, spawn
from stress.inputs import resident
from stress.kills import Job, jobs, keep, start, strike, warm_up

MINUTES = 60
GROWTH = 24  # MB that the long process may have at its end beyond what it had after two rounds
ENDING = 20  # seconds in which what a killed pool left behind may notice it
SHARED = Path("/dev/shm")


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case of commands, one of the long process, one of what is left."""
    (arena / "tmp").mkdir()
    os.environ["TMPDIR"] = tempfile.tempdir = str(arena / "tmp")
    warm_up()
    known = [(job, *calm(job, arena)) for job in jobs(arena, seed) if job.ranks == 1]
    shared, temporary = files_in(SHARED), files_in(arena / "tmp")
    until = time.monotonic() + 60 * MINUTES * scale
    long = spawn(long_process, arena, until, log=arena / "long.log")
    case, rng = Case("soak", "commands killed or let down, and begun again"), random.Random(seed)
    while time.monotonic() < until:
        case.trial(one(*rng.choice(known), arena, rng))
    yield case
    yield grown(long, arena)
    yield left(arena, shared, temporary)


def one(job: Job, wanted: Any, lasts: float, arena: Path, rng: random.Random) -> str:
    """One command with one mishap, then without; what was wrong."""
    what = rng.choice(("kill", "kill", "files", "descriptors"))
    if what == "files":
        return _through(
            job, arena, wanted, what, behind, partial(places.short_files, rng.randint(1, 150_000))
        )
    if what == "descriptors":
        return _through(
            job, arena, wanted, what, behind, partial(places.few_descriptors, rng.randint(8, 40))
        )
    out = arena / "out"
    shutil.rmtree(out, ignore_errors=True)
    processes = start(job, out, arena)
    time.sleep(rng.uniform(0, lasts))
    strike(processes, job.workers and rng.random() < 0.5)
    flaw = again(job, out, arena, wanted)
    return f"{job.name}, killed: {flaw}; kept in {keep(out, arena)}" if flaw else ""


def long_process(arena: Path, until: float) -> None:
    """Rounds of building, checking and reading; memory and descriptors after each."""
    import shards

    sizes = []
    while time.monotonic() < until or len(sizes) < 3:
        out = arena / "long"
        shards.build(
            str(arena / "source"), out, frame=120, crop=96, map_crops=1, grid=16, bank=2, jobs=2
        )
        assert not shards.verify(out, "decode")
        records = shards.open(out)
        for batch in records.batches(size=96, batch=16, epochs=2, weights="fast"):
            assert len(batch.images) == 16
        del records, batch
        shutil.rmtree(out)
        gc.collect()
        sizes.append((resident(), len(os.listdir("/proc/self/fd"))))
        (arena / "sizes.json").write_text(json.dumps(sizes))


def grown(long: Any, arena: Path) -> Case:
    """What the long process has at its end beyond what it had after two rounds."""
    case = Case("soak", "one process that builds, verifies and reads all the time")
    status = long.wait(600)
    if status != 0:
        case.trial(f"it ended with {status}: {long.text()[-400:]}")
        return case
    sizes = json.loads((arena / "sizes.json").read_text())
    memory, descriptors = sizes[-1][0] - sizes[1][0], sizes[-1][1] - sizes[1][1]
    case.trial(f"it grew by {memory:.1f} MB" if memory > GROWTH else "")
    case.trial(f"it kept {descriptors} more descriptors" if descriptors > 0 else "")
    case.note = (
        f"{len(sizes)} rounds; {memory:+.1f} MB of {sizes[-1][0]:.0f}, {descriptors:+d} descriptors"
    )
    return case


def left(arena: Path, shared: set[str], temporary: set[str]) -> Case:
    """What lies around after it: in shared memory, temporary folders and outputs."""
    case = Case("soak", "left in /dev/shm, temporary folders and outputs")
    there = files_in(SHARED) - shared
    # The system's own, while it makes one, begin with sem. and have no name yet.
    semaphores = {name for name in there if "loky-" in name or name.startswith("sem.")}
    case.trial(f"shared memory: {sorted(there - semaphores)}" if there - semaphores else "")
    found = files_in(arena / "tmp") - temporary
    case.trial(f"temporary: {sorted(found)[:5]}" if found else "")
    halves = [str(path) for path in (arena / "out").rglob("*.tmp")]
    case.trial(f"half-written: {halves}" if halves else "")
    until = time.monotonic() + ENDING
    while alive := call(living, str(arena), log=arena / "living.log"):
        if time.monotonic() > until:
            break
        time.sleep(1)
    pools = [words for words in alive if "loky" in words or "resource_tracker" in words]
    others = [words for words in alive if words not in pools]
    case.trial(f"still running: {others}" if others else "")
    case.note = (
        f"of killed worker pools: {len(semaphores)} semaphores of 32 bytes, {len(pools)} processes"
    )
    return case


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def living(arena: str) -> list[str]:
    """Command lines of processes that work in `arena`, but for this one and those it came from."""
    mine, parent = set(), os.getpid()
    while parent > 1:
        mine.add(parent)
        parent = int(Path(f"/proc/{parent}/stat").read_text().rsplit(") ", 1)[1].split()[1])
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if int(folder.name) not in mine and (
            arena in words or f"TMPDIR={arena}" in str(environment)
        ):
            found.append(words[:200])
    return found
