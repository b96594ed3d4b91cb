"""A coverage-guided fuzz run on every parser of ours, from seeds that are real files.

A run is lost if anything but ValueError or Rejected came out of a parser, if it took longer than
LIMIT seconds or more than MEMORY MB.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stress.cases import REPOSITORY, Case
from stress.material import SMALL, make_source

SECONDS = 60  # a target, at scale 1
LIMIT, MEMORY = 10, 2048
TAKEN = (0, 77)  # statuses of the fuzzer: done, or a finding


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case a target. Inputs are counted; a finding is a loss and kept in the arena."""
    from stress.targets import FUZZER, TARGETS, seeds

    if not FUZZER:
        raise SystemExit("the fuzzer is not installed; type: pip install '.[abuse]'")
    make_source(arena / "source", 6, seed, classes=2)
    subprocess.run(["tar", "cf", arena / "source.tar", "-C", arena, "source"], check=True)
    line = [sys.executable, "-m", "kamim", "shards", "build", f"{arena}/source", f"{arena}/built"]
    line += [*map(str, SMALL), "--shard-size", "3", "--jobs", "1"]
    subprocess.run(line, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    memory = Path("/dev/shm")  # some MB; on a disk, a set's syncs would take most of the time
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else arena) as fast:
        for name in TARGETS:
            corpus, scratch = arena / f"corpus-{name}", Path(fast) / name.replace(" ", "-")
            for folder in (corpus, scratch):
                folder.mkdir()
            for number, data in enumerate(seeds(name, arena / "built", arena / f"seed-{name}")):
                (corpus / f"seed{number}").write_bytes(data)
            yield fuzz(name, arena, corpus, scratch, max(5, round(SECONDS * scale)), seed)


def fuzz(name: str, arena: Path, corpus: Path, scratch: Path, seconds: int, seed: int) -> Case:
    """One target for so many seconds."""
    case = Case("fuzz", name)
    findings = arena / f"finding-{name}-"
    line = [sys.executable, "-m", "stress.targets", name, str(arena / "built"), str(scratch)]
    line += [str(corpus), f"-max_total_time={seconds}", f"-timeout={LIMIT}", "-max_len=65536"]
    line += [f"-rss_limit_mb={MEMORY}", f"-seed={seed + 1}", f"-artifact_prefix={findings}"]
    line += ["-print_final_stats=1"]
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    quiet = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(scratch), "OPENCV_LOG_LEVEL": "OFF"}
    limit = 2 * seconds + 120
    try:
        done = subprocess.run(line, cwd=REPOSITORY, env=quiet, capture_output=True, timeout=limit)
    except subprocess.TimeoutExpired:
        case.trial(f"the fuzzer itself hung for {limit} s")
        return case
    text = done.stderr.decode(errors="replace")
    runs = re.search(r"number_of_executed_units: *(\d+)", text)
    case.tried = case.survived = int(runs[1]) - 1 if runs else 0
    found = sorted(arena.glob(f"finding-{name}-*"))
    lines = (done.stdout.decode(errors="replace") + text).splitlines()
    named = [
        each for each in lines if re.match(r"\s*([\w.]+(Error|Exception)|AssertionE|==\d+)", each)
    ]
    flaw = f"{' / '.join(named[:3])[:300]}: {', '.join(map(str, found))}" if found else ""
    if done.returncode and not found:
        flaw = f"status {done.returncode}: {' / '.join(lines[-5:])}"
    case.trial(flaw)
    covered = re.findall(r"cov: (\d+)", text)
    case.note = f"{seconds} s, coverage {covered[0]} to {covered[-1]}" if covered else ""
    return case
