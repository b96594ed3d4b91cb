"""SIGKILL at random moments of each command that takes long; then the same command again.

Survived means that what was killed and went on ended with the bytes, losses and tensors of what was
left in peace.
"""

import importlib
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stress.cases import Case
from stress.forked import Process, call, kamim, spawn
from stress.material import SMALL, files, make_source, run_digest, tuned_digest

LIMIT = 180  # seconds for any one command: a second's work on a quiet machine
STOPPED = 10  # seconds that a rank may outlive another's death; torchrun stops it sooner
INPUTS = 96


@dataclass(frozen=True, slots=True)
class Job:
    """A command that is killed: the arguments that write into a folder, and what tells its result.

    `done` is the file whose presence means complete, `ranks` are processes, `share` its kills.
    """

    name: str
    arguments: Callable[[Path], list[object]]
    digest: Callable[[str], dict[str, Any]]
    done: str
    share: int
    ranks: int = 1
    workers: bool = False  # it has worker processes: half of the kills spare them


def start(job: Job, out: Path, arena: Path) -> list[Process]:
    """The command's processes, one a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        spawn(_ranked, job, out, rank, port, log=arena / f"rank{rank}.log")
        for rank in range(job.ranks)
    ]


def _ranked(job: Job, out: Path, rank: int, port: int) -> None:
    if job.ranks > 1:  # what torchrun sets
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    kamim(*job.arguments(out))


def finish(processes: list[Process]) -> str:
    """What went wrong by the time that all ended, or nothing."""
    flaws = []
    for process in processes:
        status = process.wait(LIMIT)
        if status != 0:
            what = f"hung for {LIMIT} s" if status is None else f"exit status {status}"
            flaws.append(f"{what}: {process.text()[-400:]}")
    return "; ".join(flaws)


def warm_up() -> None:
    """Import what takes seconds, once for all forks, and add the smallest recipes, `tiny`..."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}  # before torch: two ranks share
    for slow in (
        "matplotlib.pyplot",
        "torch.utils.tensorboard.writer",
        "sklearn.manifold",
        "skimage.metrics",
        "train.loop",
        "kamim.evaluate.analyse",
        "kamim.evaluate.features",
        "kamim.evaluate.supervised",
        "kamim.__main__",
    ):
        importlib.import_module(slow)
    from train.recipes import BASES

    options = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    BASES["tiny"] = replace(BASES["small"], options=options)


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case a command, of 310 kills in all at scale 1."""
    warm_up()
    for job in jobs(arena, seed):
        yield kill(job, arena, max(1, round(job.share * scale)), seed)


def jobs(arena: Path, seed: int) -> list[Job]:
    """What is killed, and the sets that it works on, made in `arena`."""
    source = make_source(arena / "source", INPUTS, seed)
    other = make_source(arena / "other", 24, seed + 1)
    for words in (
        ["build", source, arena / "set", *SMALL],
        ["build", other, arena / "val", *SMALL],
        ["convert", arena / "set", "--out", arena / "ffcv"],
    ):
        process = spawn(kamim, "shards", *words, log=arena / "setup.log")
        assert process.wait(LIMIT) == 0, process.text()
    sets = [arena / "set", arena / "val"]
    small = ["--batch", 8, "--epochs", 2, "--detector", "fast", "--device", "cpu"]
    small += ["--save-every", 2, "--log-every", 1, "--resume"]

    def build(processes: int) -> Callable[[Path], list[object]]:
        flags = [*SMALL, "--shard-size", 4, "--jobs", processes]
        return lambda out: ["shards", "build", source, out, *flags]

    def maps(out: Path) -> list[object]:
        flags = ["--crop", 96, "--map-crops", 1, "--grid", 16, "--shard-size", 4, "--jobs", 2]
        return ["maps", "build", source, out, *flags]

    def convert(frames: str) -> Callable[[Path], list[object]]:
        return lambda out: ["shards", "convert", arena / "set", "--out", out, "--frames", frames]

    def pretrain(shards: str, recipe: str = "tiny") -> Callable[[Path], list[object]]:
        return lambda out: ["pretrain", arena / shards, "--out", out, "--recipe", recipe, *small]

    def probe(out: Path) -> list[object]:
        return ["probe", "random:tiny", *sets, "--out", out, "--epochs", 4, "--seeds", 2]

    def finetune(out: Path) -> list[object]:
        return ["finetune", "random:tiny", *sets, "--out", out, "--epochs", 4, "--batch", 16]

    def copy(out: Path) -> list[object]:
        return ["shards", "copy", arena / "ffcv", out]

    def bytes_of(folder: str) -> dict[str, Any]:
        return files(Path(folder))

    end, last = "manifest.json", "reconstructions.png"
    return [
        Job("build, 1 process", build(1), bytes_of, end, 35),
        Job("build, 2 processes", build(2), bytes_of, end, 25, workers=True),
        Job("maps build, 2 processes", maps, bytes_of, end, 35, workers=True),
        Job("convert, JPEG frames", convert("jpeg"), bytes_of, end, 20),
        Job("convert, raw frames", convert("raw"), bytes_of, end, 20),
        Job("copy", copy, bytes_of, end, 15),
        Job("pretrain, 1 process", pretrain("set"), run_digest, last, 45),
        Job("pretrain, 2 processes", pretrain("set"), run_digest, last, 25, ranks=2),
        Job("pretrain, AMT", pretrain("set", "tiny_amt"), run_digest, last, 20),
        Job("pretrain from .beton", pretrain("ffcv"), run_digest, last, 20),
        Job("probe", probe, bytes_of, "probe.json", 30),
        Job("finetune", finetune, tuned_digest, "finetune.json", 20),
    ]


def kill(job: Job, arena: Path, kills: int, seed: int) -> Case:
    """`kills` times: begin, SIGKILL at a moment of the calm run's time, go on, compare."""
    case, rng = Case("kills", job.name), random.Random(f"{job.name} {seed}")
    calm, log = arena / "calm", arena / "digest.log"
    shutil.rmtree(calm, ignore_errors=True)
    began = time.monotonic()
    flaw = finish(start(job, calm, arena))
    assert not flaw, f"{job.name}, left in peace: {flaw}"
    lasts = time.monotonic() - began
    wanted = call(job.digest, str(calm), log=log)
    midway = early = 0
    while case.tried < kills and early <= 2 * kills + 10:
        out = arena / "out"
        shutil.rmtree(out, ignore_errors=True)
        processes = start(job, out, arena)
        if rng.random() < 0.5:  # half of the kills fall on the writing, not on what comes before
            while processes[0].poll() is None and not (out.exists() and any(out.iterdir())):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, lasts / 2))
        else:
            time.sleep(rng.uniform(0, lasts))
        alone = (job.workers or job.ranks > 1) and rng.random() < 0.5
        if not strike(processes, alone):
            early += 1  # it was over already: not a kill
            continue
        midway += any(out.iterdir()) and not (out / job.done).exists() if out.exists() else False
        flaw = finish(start(job, out, arena))
        if not flaw and call(job.digest, str(out), log=log) != wanted:
            flaw = f"killed and resumed, its result differs; kept in {keep(out, arena)}"
        case.trial(flaw)
    case.note = f"{midway} midway; {lasts:.1f} s left in peace"
    return case


def strike(processes: list[Process], alone: bool) -> bool:
    """Kill all there is, or the first process `alone`; whether it was alive."""
    alive = processes[0].poll() is None
    if alive:
        if alone:
            os.kill(processes[0].pid, signal.SIGKILL)
        else:
            processes[0].kill()
    for process in processes if not alone else processes[1:]:
        process.wait(0 if not alone else STOPPED)
    if alone:
        while processes[0].poll() is None:
            time.sleep(0.001)
    return alive


def keep(out: Path, arena: Path) -> Path:
    """`out` moved aside, to be looked at."""
    number = len(list(arena.glob("lost-*")))
    return Path(shutil.move(out, arena / f"lost-{number}"))
