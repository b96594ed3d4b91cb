"""Determinism on the GPU: what it costs, and whether a run that is killed goes on as it would have.

Runs are `kamim pretrain` in processes of their own, one of them ended by SIGKILL.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from kamim.bench.gpu import Bench, Case
from train.checkpoint import newest
from train.metrics import read_metrics
from train.recipes import find_recipe

MICRO_BATCH = 256
HERE = Path(__file__).parents[2]


def killed(bench: Bench) -> Iterator[Case]:
    """Killed and resumed against unbroken, as it comes and --deterministic."""
    for flags in ([], ["--deterministic"]):
        title = " ".join([bench.killed, *flags])
        yield Case("deterministic", f"{title}, killed", partial(_measure, bench, flags))


def _measure(bench: Bench, flags: list[str]) -> dict[str, Any]:
    """One row: the losses of two runs side by side, of which one is killed."""
    folder, steps = Path(mkdtemp(dir=bench.folder)), bench.steps
    whole, broken = folder / "whole", folder / "broken"
    alike, killed = (_begin(bench, out, flags) for out in (whole, broken))
    processes = [alike, killed]
    try:
        while not newest(broken / "checkpoints"):
            if killed.poll() is not None:
                raise RuntimeError(f"a run ended before its first checkpoint: {_last(broken)}")
            time.sleep(0.01)
        killed.kill()
        killed.wait()
        after = len(_losses(broken))
        processes.append(_begin(bench, broken, [*flags, "--resume"]))
        for process, out in ((alike, whole), (processes[-1], broken)):
            if process.wait():
                raise RuntimeError(f"a run failed: {_last(out)}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    one, two = _losses(whole), _losses(broken)
    if len(one) != steps or len(two) != steps or after >= steps:
        raise RuntimeError(f"{len(one)} and {len(two)} losses of {steps}; killed after {after}")
    apart = [abs(a - b) / abs(a) for a, b in zip(one, two, strict=True)]
    return {
        "n": 1,
        "batch": batch_of(bench),
        "steps": steps,
        "losses_when_killed": after,
        "equal": one == two,
        "largest_relative_difference": max(apart),
        "first_step_that_differs": next((n + 1 for n, d in enumerate(apart) if d), None),
        "last_loss": one[-1],
    }


def batch_of(bench: Bench) -> int:
    """Images per step of the runs: two micro-steps of a large recipe."""
    return min(find_recipe(bench.killed).batch, 2 * MICRO_BATCH)


def _begin(bench: Bench, out: Path, flags: list[str]) -> subprocess.Popen[str]:
    """`kamim pretrain` into `out`, in a process of its own; what it says goes into out.log."""
    batch, steps = batch_of(bench), bench.steps
    numbers = {
        "recipe": bench.killed,
        "batch": batch,
        "micro-batch": MICRO_BATCH,
        "steps": steps,
        "epochs": 2 * steps * batch / len(bench.records),
        "save-every": max(1, steps // 4),
        "log-every": 1,
        "detector": bench.records.manifest.detectors[0],
        "device": bench.device.type,
        "check": "size",
        "out": out,
    }
    words = [f"--{name}={value}" for name, value in numbers.items()]
    command = [sys.executable, "-m", "kamim", "pretrain", str(bench.records.folder), *words, *flags]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("a") as log:
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True)


def _losses(out: Path) -> list[float]:
    """The losses of a run so far, by step."""
    return [row["loss"] for row in read_metrics(out)]


def _last(out: Path) -> str:
    """The last line that a run said."""
    return (out.with_suffix(".log").read_text().strip().splitlines() or [""])[-1]
