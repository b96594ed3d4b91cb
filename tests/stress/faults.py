"""A machine that fails around build, convert, pretrain and probe; then the same command again.

A fault survives if the command ends by itself, in one line and with a status that is 0 only if all
was done, and goes on to the undisturbed result.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stress import places
from stress.cases import Case
from stress.forked import Process, behind, call, fresh, kamim, spawn
from stress.kills import LIMIT, Job, finish, jobs, start, warm_up


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case a fault, of all commands."""
    warm_up()
    known = [(job, *calm(job, arena)) for job in jobs(arena, seed) if job.ranks == 1]
    times = max(1, round(5 * scale))
    shares = [random.Random(f"shares {seed}").uniform(0.02, 0.98) for _ in range(times)]
    if places.allowed():
        yield disks(arena, known, shares)
        yield locked(arena, known)
        yield memory(arena, known)
    else:
        for name in ("disk full", "read-only output", "/dev/shm full"):
            yield Case("faults", name, note="not run: mounts of one's own take root")
    for name, place, values in (
        ("files may not grow", places.short_files, [int(s * 150_000) for s in shares]),
        ("file descriptors run out", places.few_descriptors, [8, 12, 16, 24, 40][:times]),
    ):
        case = Case("faults", name)
        for job, wanted, _ in known:
            for value in values:
                case.trial(_through(job, arena, wanted, f"{value}", behind, partial(place, value)))
        yield case
    yield clock(arena, known, times, seed)
    yield twice(arena, known, times, seed)
    yield worker(arena, known, 4 * times, seed)


def calm(job: Job, arena: Path) -> tuple[dict[str, Any], float]:
    """What `job` gives when left in peace, and how long it takes."""
    out, began = arena / f"calm-{job.name.replace(' ', '-').replace(',', '')}", time.monotonic()
    flaw = finish(start(job, out, arena))
    assert not flaw, f"{job.name}: {flaw}"
    lasts = time.monotonic() - began
    return call(job.digest, str(out), log=arena / "digest.log"), lasts


def one_line(process: Process, status: int | None) -> str:
    """What is wrong with how a command ended that could not do all, or nothing."""
    text = process.text()
    said = [line for line in text.splitlines() if line.startswith("kamim: ")]
    if status is None:
        return f"it hung for {LIMIT} s: {text[-300:]}"
    if status not in (1, 2) or len(said) != 1 or "Traceback" in text:
        return f"status {status}: {text[-600:]}"
    return ""


def _through(job: Job, arena: Path, wanted: Any, what: str, *how: Any) -> str:
    """`job` once through the function and first arguments `how`, once without; what was wrong."""
    out = arena / "out"
    shutil.rmtree(out, ignore_errors=True)
    process = spawn(*how, *job.arguments(out), log=arena / "fault.log")
    status = process.wait(LIMIT)
    flaw = "" if status == 0 else one_line(process, status)
    if not flaw:
        flaw = again(job, out, arena, wanted)
    return f"{job.name}, {what}: {flaw}" if flaw else ""


def again(job: Job, out: Path, arena: Path, wanted: Any) -> str:
    """The same command without a fault; what is wrong with its result."""
    flaw = finish(start(job, out, arena))
    if not flaw and call(job.digest, str(out), log=arena / "digest.log") != wanted:
        return "the result differs"
    return f"once more: {flaw}" if flaw else ""


def disks(arena: Path, known: list[Any], shares: list[float]) -> Case:
    """A disk that fills when so much of a result is written, and has room again afterwards."""
    case = Case("faults", "disk full")
    for job, wanted, _ in known:
        name = job.name.replace(" ", "-").replace(",", "")
        size = sum(p.stat().st_blocks * 512 for p in (arena / f"calm-{name}").rglob("*"))
        for share in shares:
            flaw = call(_full, job, arena, wanted, int(size * share), log=arena / "disk.log")
            case.trial(f"{job.name}, {share:.0%}: {flaw}" if flaw else "")
    return case


def _full(job: Job, arena: Path, wanted: Any, size: int) -> str:
    places.own_mounts()
    disk = arena / "disk"
    disk.mkdir(exist_ok=True)
    places.small_disk(disk, max(4096, size))
    process = spawn(kamim, *job.arguments(disk / "out"), log=arena / "fault.log")
    status = process.wait(LIMIT)
    flaw = "" if status == 0 else one_line(process, status)
    places.small_disk(disk, 1 << 30, again=True)
    return flaw or again(job, disk / "out", arena, wanted)


def locked(arena: Path, known: list[Any]) -> Case:
    """A folder that cannot be written to, before the command and in the middle of it."""
    case = Case("faults", "read-only output")
    for job, wanted, lasts in known:
        for moment in (0.0, 0.5):
            flaw = call(_locked, job, arena, wanted, lasts * moment, log=arena / "locked.log")
            case.trial(f"{job.name}, {moment:.0%}: {flaw}" if flaw else "")
    return case


def _locked(job: Job, arena: Path, wanted: Any, moment: float) -> str:
    places.own_mounts()
    out = arena / "out"
    shutil.rmtree(out, ignore_errors=True)
    if moment:
        early = start(job, out, arena)
        time.sleep(moment)
        early[0].kill()
    out.mkdir(exist_ok=True)
    places.read_only(out)
    process = spawn(kamim, *job.arguments(out), log=arena / "fault.log")
    status = process.wait(LIMIT)
    flaw = "" if status == 0 and moment else one_line(process, status)
    places.read_only(out, off=True)
    if not flaw:
        copy = arena / "copy"  # a mount cannot be removed by the command
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        return again(job, copy, arena, wanted)
    return flaw


def memory(arena: Path, known: list[Any]) -> Case:
    """/dev/shm without room, where semaphores of worker processes are made."""
    case = Case("faults", "/dev/shm full")
    for job, wanted, _ in known:
        # A fresh interpreter, which alone makes semaphores anew, does not know the smallest recipe.
        usual = replace(job, name=f"{job.name}, usual recipe", arguments=partial(_usual, job))
        if usual.arguments(arena) != job.arguments(arena):
            job, (wanted, _) = usual, calm(usual, arena)
        case.trial(_through(job, arena, wanted, "", _without_memory))
    return case


def _usual(job: Job, out: Path) -> list[object]:
    """The arguments with the recipe `small` in place of `tiny`."""
    tiny = {"tiny", "tiny_amt", "random:tiny"}
    return [
        each.replace("tiny", "small") if isinstance(each, str) and each in tiny else each
        for each in job.arguments(out)
    ]


def _without_memory(*arguments: object) -> None:
    places.own_mounts()
    places.full_memory()
    fresh(*arguments)


def clock(arena: Path, known: list[Any], times: int, seed: int) -> Case:
    """Killed midway, its files dated into the future, and gone on with forty years earlier."""
    case, rng = Case("faults", "clock set back"), random.Random(f"clock {seed}")
    for job, wanted, lasts in known * times:
        out = arena / "out"
        shutil.rmtree(out, ignore_errors=True)
        early = start(job, out, arena)
        time.sleep(rng.uniform(0.2, 0.8) * lasts)
        early[0].kill()
        for path in out.rglob("*"):
            os.utime(path, (4e9, 4e9))
        process = spawn(behind, places.early_clock, *job.arguments(out), log=arena / "fault.log")
        status = process.wait(LIMIT)
        flaw = one_line(process, status) if status else again(job, out, arena, wanted)
        case.trial(f"{job.name}: {flaw}" if flaw else "")
    return case


def twice(arena: Path, known: list[Any], times: int, seed: int) -> Case:
    """The same command twice at once: one does it, the other says so or finds it done."""
    case, rng = Case("faults", "two at once into one folder"), random.Random(f"twice {seed}")
    refused = 0
    for job, wanted, lasts in known * times:
        out = arena / "out"
        shutil.rmtree(out, ignore_errors=True)
        first = spawn(kamim, *job.arguments(out), log=arena / "first.log")
        time.sleep(rng.uniform(0, lasts) * rng.choice([0, 1]))
        second = spawn(kamim, *job.arguments(out), log=arena / "second.log")
        flaws = []
        statuses = [process.wait(LIMIT) for process in (first, second)]
        for process, status in zip((first, second), statuses, strict=True):
            flaws.append("" if status == 0 else one_line(process, status))
        refused += sum(status != 0 for status in statuses)
        flaw = "; ".join(filter(None, flaws))
        if 0 not in statuses:
            flaw = f"neither did it: {first.text()[-200:]} {second.text()[-200:]}"
        flaw = flaw or again(job, out, arena, wanted)
        case.trial(f"{job.name}: {flaw}" if flaw else "")
    case.note = f"the other was refused {refused} times, else it found all done"
    return case


def worker(arena: Path, known: list[Any], times: int, seed: int) -> Case:
    """SIGKILL to a worker process, as when memory runs out."""
    case = Case("faults", "a worker killed as for want of memory")
    rng = random.Random(f"oom {seed}")
    job, wanted, lasts = next(each for each in known if each[0].workers)
    struck = 0
    while struck < times and case.tried < 4 * times:
        out = arena / "out"
        shutil.rmtree(out, ignore_errors=True)
        process = spawn(kamim, *job.arguments(out), log=arena / "fault.log")
        until = time.monotonic() + rng.uniform(0.2, 1) * lasts
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.01)
        found = _workers(process.pid)
        if found:
            os.kill(rng.choice(found), signal.SIGKILL)
        status = process.wait(LIMIT)
        struck += bool(found)
        flaw = "" if status == 0 else one_line(process, status)
        case.trial(flaw or again(job, out, arena, wanted))
    case.note = f"{struck} of them while workers ran"
    return case


def _workers(pid: int) -> list[int]:
    """The worker processes below `pid`."""
    with suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        lines = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        return [child for child, line in lines.items() if b"popen_loky" in line]
    return []
