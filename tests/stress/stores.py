"""Stores that fail while a set is written into them; then the same commands again.

Survived means that a command that could not do all said so in one line, and that with the store
well again the same commands ended with the bytes of a build on a disk, whose ledger balances.
"""

import hashlib
import importlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import failing
from stores import BUCKET, S3Store

from shards.remote import place, retry
from stress.cases import Case
from stress.faults import one_line
from stress.forked import call, kamim, spawn
from stress.kills import LIMIT
from stress.material import SMALL, files, make_source

INPUTS, SHARD = 24, 4
REQUESTS = 150  # of a build of so many, about
SHARES = (0.02, 0.1, 0.3, 0.9)  # of requests that fail
DIED = 99  # the status of a process that ended at a request
Commands = Callable[[object, int], list[list[object]]]  # that build into a place, in so many parts


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case a way to fail, and a way to build."""
    for slow in ("kamim.__main__", "preprocess.parts", "preprocess.repair", "s3fs", "tqdm"):
        importlib.import_module(slow)  # once for all forks
    source = make_source(arena / "source", INPUTS, seed)
    (source / "class1" / "damaged.jpg").write_bytes(b"no image")
    flags = [*SMALL, "--shard-size", SHARD, "--jobs", 1, "--max-rejected", 1]
    disk = spawn(kamim, "shards", "build", source, arena / "disk", *flags, log=arena / "disk.log")
    assert disk.wait(LIMIT) == 0, disk.text()
    wanted = files(arena / "disk")

    def commands(out: object, parts: int) -> list[list[object]]:
        build = ["shards", "build", source, out, *flags]
        if not parts:
            return [build]
        each = [[*build, "--part", f"{n}/{parts}"] for n in range(1, parts + 1)]
        return [*each, ["shards", "join", out, "--max-rejected", 1]]

    times = max(1, round(20 * scale))
    for name, parts in (("build", 0), ("2 parts and join", 2), ("3 parts and join", 3)):
        for how in ("requests fail", "the process dies at a request"):
            case = Case("stores", f"{name}: {how}")
            rng, short = random.Random(f"{case.name} {seed}"), 0
            while case.tried < times:
                out = arena / "out"
                shutil.rmtree(out, ignore_errors=True)
                share, last = rng.choice(SHARES), REQUESTS * 9
                if "dies" in how:
                    share, last = rng.choice([0, 0.05]), rng.randrange(REQUESTS)
                mind = rng.random(), share, last, rng.random() < 0.5
                flaw, ended = _through(commands(f"failing://{out}", parts), mind, arena)
                short += not ended
                flaw = flaw or _again(commands(f"failing://{out}", parts), arena)
                if not flaw and files(out) != wanted:
                    flaw = f"the bytes differ: {sorted(files(out).items() ^ wanted.items())[:4]}"
                case.trial(f"{mind}: {flaw}" if flaw else "")
            case.note = f"{short} ended short, the rest by trying again"
            yield case
    yield killed(arena, commands, wanted, max(2, round(10 * scale)), seed)


def _through(lines: list[list[object]], mind: tuple[object, ...], arena: Path) -> tuple[str, bool]:
    """The commands against a store of this `mind`: what was wrong, and whether all was done."""
    ended = True
    for number, line in enumerate(lines):
        process = spawn(_minded, number, *mind, *line, log=arena / "fault.log")
        status = process.wait(LIMIT)
        ended = ended and status == 0
        if status not in (0, DIED) and (flaw := one_line(process, status)):
            return f"{line[1]}: {flaw}", False
    return "", ended


def _minded(number: int, mind: float, share: float, last: int, whole: bool, *line: object) -> None:
    """A command where this `share` of requests fails; it dies at request `last`, all at once."""
    rng, made = random.Random(f"{mind} {number}"), 0

    def fault(request: str, path: str) -> str:
        nonlocal made
        made += 1
        if made > last:
            os._exit(DIED)
        return rng.choice(failing.FAULTS) if rng.random() < share else ""

    failing.Failing.fault = staticmethod(fault)
    retry.PATIENCE, retry.FIRST_WAIT = 0.05, 0.001
    if whole:
        place.WHOLE.add("failing")
    kamim(*line)


def _again(lines: list[list[object]], arena: Path) -> str:
    """The commands where nothing fails; what was wrong."""
    for line in lines:
        process = spawn(kamim, *line, log=arena / "again.log")
        status = process.wait(LIMIT)
        if status != 0:
            return f"once more, {line[1]}: status {status}: {process.text()[-400:]}"
    return ""


def killed(arena: Path, commands: Commands, wanted: dict[str, str], times: int, seed: int) -> Case:
    """SIGKILL to builds and parts into S3 at random moments; then the same commands again."""
    case, rng = (
        Case("stores", "build into S3, and in 2 parts: SIGKILL"),
        random.Random(f"S3 {seed}"),
    )
    (arena / "empty").mkdir()
    server = S3Store(arena / "empty", arena / "server.log")
    os.environ |= server.environment
    lasts, midway = 0.0, 0
    try:
        while case.tried < times:
            out, began = f"s3://{BUCKET}/{case.tried}", time.monotonic()
            lines = commands(out, rng.choice([0, 2]))
            for line in lines[
                : len(lines) if lasts else 0
            ]:  # the first is left in peace, and timed
                process = spawn(kamim, *line, log=arena / "killed.log")
                until = time.monotonic() + rng.uniform(0.1, 1) * lasts
                while process.poll() is None and time.monotonic() < until:
                    time.sleep(0.002)
                midway += process.poll() is None
                process.kill()
            flaw = _again(lines, arena)
            lasts = lasts or time.monotonic() - began
            if not flaw and call(_stored, out, log=arena / "digest.log") != wanted:
                flaw = "the bytes differ"
            case.trial(flaw)
    finally:
        server.kill()
    case.note = f"{midway} commands killed midway"
    return case


def _stored(url: str) -> dict[str, str]:
    """As `files`, of a store."""
    import fsspec

    client, root = fsspec.core.url_to_fs(url)
    return {
        name[len(root) + 1 :]: hashlib.sha256(client.cat_file(name)).hexdigest()
        for name in client.find(root)
    }
