"""The first ten minutes on a GPU in one command, `kamim bench --gpu`: what it can do, what we use.

Photographs or finished shards give a JSON line per case in docs/results/bench/gpu.jsonl, written as
soon as it is measured. Cases that are there already, of the same GPU, are left out, so that
the command goes on where it was cut off. docs/gpu.md is rendered from the lines.
"""

import gc
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch

from kamim.bench.gpu_page import rows_of
from kamim.bench.provenance import RESULTS, provenance
from preprocess import build_shards, detector_settings, open_source
from shards import Settings, ShardSet
from shards.errors import UserError
from shards.files import MANIFEST

# Seconds that a part may take; what is not done by then is left for the next call.
BUDGETS = {
    "ceilings": 10.0,
    "attention": 20.0,
    "step": 190.0,
    "kernels": 10.0,
    "end to end": 55.0,
    "weights": 30.0,
    "decode": 20.0,
    "loader": 40.0,
    "methods": 75.0,
    "deterministic": 75.0,
}
PARTS = tuple(BUDGETS)
ON_CUDA = {"ceilings", "attention", "kernels", "decode"}
DETECTORS = ("fast", "frequency")


class Case(NamedTuple):
    """One line of results: `work` gives its figures."""

    part: str
    name: str
    work: Callable[[], dict[str, Any]]


@dataclass
class Bench:
    """What the parts measure on. seconds: about what one timing takes; repeats: of each."""

    where: str
    folder: Path  # for what is built
    device: torch.device
    seconds: float = 0.5
    repeats: int = 5
    micro_batch: int = 0  # 0: what the trainer chooses
    recipes: tuple[str, ...] = ("vit_base", "vit_small", "vit_tiny", "swin_tiny", "swin_base")
    methods: tuple[str, ...] = ("vit_base_bf16", "vit_base_mae", "vit_base_famt")
    killed: str = "vit_small"  # the recipe of a run that is killed and goes on
    steps: int = 40  # of that run

    @cached_property
    def records(self) -> ShardSet:
        """The finished set at `where`, or one built of the photographs there."""
        if (Path(self.where) / MANIFEST).exists():
            return ShardSet(self.where)
        return self.build(self.where, "set", DETECTORS)

    def build(self, where: str, name: str, detectors: Iterable[str], **changes: Any) -> ShardSet:
        """A set of the images at `where` in the folder `name`."""
        source = open_source(where, partial=True)
        chosen = tuple(detector_settings(each) for each in detectors)
        settings = Settings(detectors=chosen, **changes)
        build_shards(source, self.folder / name, settings, max_rejected=1)
        return ShardSet(self.folder / name)

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What each line says of its circumstances."""
        cuda = self.device.type == "cuda"
        gpu = torch.cuda.get_device_name(self.device) if cuda else ""
        return {
            "gpu": gpu,
            "driver": driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **provenance(),
        }


def driver() -> str:
    """The version of NVIDIA's driver, or nothing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.split("\n")[0].strip()


def cases(bench: Bench) -> Iterator[Case]:
    """All there is to measure, in order."""
    from kamim.bench import gpu_device, gpu_loader, gpu_resume, gpu_steps

    yield from gpu_device.ceilings(bench)
    yield from gpu_device.attention(bench)
    yield from gpu_steps.training(bench)
    yield from gpu_device.decode(bench)
    yield from gpu_loader.loader(bench)
    yield from gpu_steps.methods(bench)
    yield from gpu_steps.deterministic(bench)
    yield from gpu_resume.killed(bench)


def run(bench: Bench, out: Path, parts: Iterable[str] = PARTS, again: bool = False) -> int:
    """Measure what `out` does not have, and append it. Returns how many cases were not measured."""
    gpu, wanted, missing = bench.origin["gpu"], set(parts), 0
    found = {(row["part"], row["case"]) for row in rows_of(out) if row["gpu"] == gpu and not again}
    if bench.device.type != "cuda":
        for part in sorted(wanted & ON_CUDA):
            say(f"{part}: needs a CUDA device")
            missing += 1
        wanted -= ON_CUDA
    spent = dict.fromkeys(BUDGETS, 0.0)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        if file.read() not in (b"", b"\n"):  # of a line that a kill cut short
            file.write(b"\n")
    for case in cases(bench):
        if case.part not in wanted or (case.part, case.name) in found:
            continue
        begin, title = time.perf_counter(), f"{case.part}, {case.name}"
        try:
            with no_later(BUDGETS[case.part] - spent[case.part]):
                row = case.work()
        except Exception as error:  # the others are measured all the same
            missing += 1
            reason = (str(error).strip().splitlines() or [""])[0]
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            say(f"{title}: {kind}{reason}"[:300])
        else:
            took = round(time.perf_counter() - begin, 1)
            row = {"bench": "gpu", "part": case.part, "case": case.name, **row, "took_s": took}
            with out.open("a") as file:
                file.write(json.dumps(row | bench.origin, sort_keys=True) + "\n")
            say(f"{title}: {plain(row)}")
        spent[case.part] += time.perf_counter() - begin
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return missing


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def plain(row: dict[str, Any]) -> str:
    """A row's figures for a person to follow: medians alone."""
    shown = {k: v for k, v in row.items() if k not in {"bench", "part", "case", "n", "kernels"}}
    middle = {
        k: v["median"] if isinstance(v, dict) and "median" in v else v for k, v in shown.items()
    }
    return "  ".join(f"{key} {value}" for key, value in middle.items())


@contextmanager
def no_later(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer than `seconds`; at once if there are none."""

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError("the part's time is spent; the same command goes on with it")

    if seconds <= 0:
        late(0, None)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(where: str, out: Path | None, only: str, again: bool, micro_batch: int = 0) -> int:
    """`kamim bench --gpu`; returns how many cases failed. Raises UserError without a GPU."""
    parts = only.split(",") if only else list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: with --gpu there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise UserError("--gpu: torch sees no CUDA device; `kamim doctor` says why")
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(where, Path(folder), device, micro_batch=micro_batch)
        return run(bench, out or RESULTS / "gpu.jsonl", parts, again)
