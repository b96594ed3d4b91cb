"""python -m kamim.experiment pack | check | run | page: see docs/results/keypoints/PLAN.md."""

import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.errors import UserError

app = typer.Typer(add_completion=False, help=__doc__)
RESULTS = Path("docs/results/keypoints")
CHECK = "check.json"
Data = Annotated[Path, typer.Option(help="Folder of photos.npz and cifar.npz.")]
Out = Annotated[Path, typer.Option(help="Folder of runs.jsonl, results.json and the page.")]
Steps = Annotated[
    int, typer.Option(min=0, help="Of a main run; 0: as check.json says, or as planned.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="A minute on a CPU, to see that it runs.")]
Plain = Annotated[bool, typer.Option("--plain", help="On CUDA, no compiling and no graphs.")]


@app.command()
def pack(
    photos: Annotated[Path, typer.Argument(help="Shards of the photos, with all maps.")],
    cifar: Annotated[Path, typer.Argument(help="Folder of CIFAR-10's train.tar and test.tar.")],
    out: Annotated[Path, typer.Argument()],
    train: Annotated[int, typer.Option(min=1, help="Training images a class.")] = 1500,
    test: Annotated[int, typer.Option(min=1, help="Test images a class.")] = 1000,
) -> None:
    """Write what the runs read into two files."""
    from kamim.experiment.data import pack as write

    for path in write(photos, cifar, out, train, test):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@app.command()
def check(
    data: Data = Path("data/keypoints"),
    out: Out = RESULTS,
    budget: Annotated[float, typer.Option(min=1, help="Seconds for tuning and main runs.")] = 400,
    device: Device = "auto",
    tiny: Tiny = False,
    plain: Plain = False,
) -> None:
    """Try every model for a few steps, and choose the steps of a run: check.json says them."""
    from kamim.experiment.keypoints import checked

    if tiny and out.resolve() == RESULTS.resolve():
        raise UserError(
            f"--tiny would replace {out / CHECK}, by which runs choose their steps; add --out of "
            "another folder"
        )
    where = device_of(device)
    found = checked(data, size_of(tiny, 0), where, not plain and where == "cuda", budget)
    out.mkdir(parents=True, exist_ok=True)
    (out / CHECK).write_text(json.dumps(found, indent=2) + "\n")


@app.command()
def run(
    data: Data = Path("data/keypoints"),
    out: Out = RESULTS,
    seconds: Annotated[
        float, typer.Option(min=0, help="Begin no run that ends later; 0: all.")
    ] = 0,
    processes: Annotated[int, typer.Option(min=0, help="That share the device; 0: 3 on CUDA.")] = 0,
    steps: Steps = 0,
    device: Device = "auto",
    tiny: Tiny = False,
    plain: Plain = False,
) -> None:
    """Do all runs that runs.jsonl does not have yet, and write the page."""
    from kamim.experiment.keypoints import check_same, todo, work
    from kamim.experiment.page import write

    began, where = time.time(), device_of(device)
    if not steps and not tiny and (out / CHECK).is_file():
        steps = json.loads((out / CHECK).read_text())["steps"]
    size = size_of(tiny, steps)
    out.mkdir(parents=True, exist_ok=True)
    check_same(size, out)
    count = processes or (3 if where == "cuda" else 1)
    threads = str(max(1, len(os.sched_getaffinity(0)) // count))
    os.environ |= {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    with tempfile.TemporaryDirectory() as claims:
        end = began + seconds if seconds else float("inf")
        given = data, out, Path(claims), size, where, not plain, end
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=work, args=given) for _ in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    write(out)
    left = len(list(todo(size, out)))
    print(f"{out}/runs.jsonl: {left} runs are left; {time.time() - began:.0f} s")
    raise typer.Exit(1 if left or any(worker.exitcode for worker in workers) else 0)


@app.command()
def page(out: Out = RESULTS) -> None:
    """Write results.json, the figures and the tables of README.md from runs.jsonl."""
    from kamim.experiment.page import write

    for path in write(out):
        print(path)


def size_of(tiny: bool, steps: int) -> Any:
    from kamim.experiment.keypoints import FULL, TINY

    size = TINY if tiny else FULL
    return replace(size, steps=steps or size.steps)


def device_of(name: str) -> str:
    from shards.device import find_device

    return find_device(name).type


if __name__ == "__main__":
    try:
        app(standalone_mode=True)
    except UserError as error:
        raise SystemExit(str(error)) from None
