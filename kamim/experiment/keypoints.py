"""Do keypoint weights help? The runs of docs/results/keypoints/PLAN.md, as it orders them.

Every run is a line in runs.jsonl, written when it has ended; what has a line is not run again. A
few processes share the device, each with the runs of a method and a seed, which share their crops.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kamim.bench.provenance import provenance
from kamim.experiment.data import Labelled, few, load_cifar, load_photos
from kamim.experiment.measure import measure
from kamim.experiment.steps import Arm, Order, Trainer, make_order
from shards.errors import UserError
from shards.files import locked
from train.recipes import Recipe, find_recipe

ARMS = {
    "uniform": Arm("uniform"),
    "fast": Arm(),
    "contrast": Arm("contrast"),
    "shuffled": Arm("shuffled"),
    "inverse": Arm("inverse"),
    "orb": Arm(detector="orb"),
    "sift": Arm(detector="sift"),
    "times26": Arm("constant:26"),
    "kamim": Arm(normalise="min"),
}
METHODS = ("simmim", "mae")
STAGES = ("tune", "main", "collapse", "more", "rate")
RATES = (5e-4, 1e-3, 2e-3)  # tried, on uniform weights
TUNING, SEEDS = 99, (0, 1, 2, 3, 4)
MAIN, MORE = ("uniform", "fast", "contrast", "shuffled", "inverse"), ("orb", "sift")
CHECKED = ("fast", "contrast")
UNTIMED = 0.06  # seconds per step of a model that no run has timed yet
SAME, ALIKE = 20, 0.02  # steps in which losses of graphs and of plain steps must be as near
LEAST, MOST = 1000, 4000  # steps of a main run, whatever fits
# Does attention collapse? The published 8e-4 by the root of 256 / 2048.
COLLAPSE = ("uniform", "times26", "kamim")
CLAIMED = ExitStack()
LARGE: Any = {"model": "vit_base_patch16_224", "steps": 1000, "batch": 256, "rate": 2.8e-4}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is run. model: timm's, with `options`; looks: at which shares of a run."""

    model: str
    options: dict[str, int]
    decoder: tuple[int, int, int]
    steps: int
    batch: int
    seeds: tuple[int, ...] = SEEDS
    looks: tuple[float, ...] = (0.25, 0.5, 1.0)
    rates: tuple[float, ...] = RATES
    arms: tuple[str, ...] = MAIN
    methods: tuple[str, ...] = METHODS
    cifar: int = 0  # images of each of its sets; 0: all
    beside: bool = True  # the runs beside the main ones


FULL = Size("vit_tiny_patch16_224", {}, (128, 4, 4), 2000, 512)
TINY = Size(
    "vit_tiny_patch16_224",
    {"embed_dim": 32, "depth": 3, "num_heads": 2},
    (32, 1, 2),
    12,
    8,
    (0,),
    (1.0,),
    (1e-3,),
    ("uniform", "fast"),
    METHODS,
    40,
    False,
)


@dataclass(frozen=True, slots=True)
class Task:
    """One run, and what names it in runs.jsonl."""

    stage: str  # of STAGES
    method: str
    arm: str
    seed: int
    rate: float
    steps: int
    batch: int
    model: str

    @property
    def group(self) -> str:
        """Of tasks that one process does one after the other, on the same crops."""
        name = f"{self.stage}-{self.method}-{self.seed}"
        return f"{name}-{self.rate:g}" if self.stage == "tune" else name


def tune(size: Size) -> list[Task]:
    """Half as long as the others: uniform weights at each rate."""
    steps = max(4, size.steps // 2)
    return [
        Task("tune", method, "uniform", TUNING, rate, steps, size.batch, size.model)
        for rate in size.rates
        for method in size.methods
    ]


def tasks(size: Size, rates: dict[str, float]) -> list[Task]:
    """All runs after the tuning, in the order in which they are worth having."""
    plain = [
        Task("main", method, arm, seed, rates[method], size.steps, size.batch, size.model)
        for seed in size.seeds
        for method in size.methods
        for arm in size.arms
    ]
    if not size.beside:
        return plain
    few = [task for task in plain if task.seed in size.seeds[:3]]
    first = [task for task in few if task.arm == "uniform"]
    large = replace(first[0], stage="collapse", method="simmim", **LARGE)
    pair = [task for task in few if task.arm in ("uniform", "fast")]
    return [
        *plain,
        *(replace(large, arm=arm) for arm in COLLAPSE),
        *(replace(task, stage="more", arm=arm) for task in first for arm in MORE),
        # Is the answer one of the learning rate? Twice it, for the two arms of the question.
        *(replace(task, stage="rate", rate=2 * task.rate) for task in pair),
    ]


def chosen(rows: Iterable[dict[str, Any]], size: Size) -> dict[str, float]:
    """By method the best rate, of methods of which all have been tried by runs of this size."""
    wanted = {key(asdict(task)) for task in tune(size)}
    found: dict[str, dict[float, float]] = {method: {} for method in size.methods}
    for row in rows:
        if key(row) in wanted:
            found[row["method"]][row["rate"]] = row["looks"][-1]["chosen_on"]
    return {
        method: max(scores, key=lambda rate: scores[rate])
        for method, scores in found.items()
        if len(scores) == len(size.rates)
    }


def recipe_of(task: Task, size: Size) -> Recipe:
    """The recipe of a run: the project's, with crops of 96 px and mask cells of 16."""
    base = find_recipe("vit_tiny_mae" if task.method == "mae" else "vit_tiny_simmim")
    options = size.options if task.model == size.model else {}
    crops: dict[str, Any] = {"size": 96, "cell": 16, "area": (0.08, 0.3), "vertical": 0.0}
    return replace(
        base,
        model=task.model,
        options=options,
        batch=task.batch,
        **crops,
        temperature=0.25,
        decoder=size.decoder,
        norm_pix=False,
        clip=1.0,
    )


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a run is known by."""
    return tuple(row[name] for name in Task.__dataclass_fields__)


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of runs.jsonl; a last one that a kill cut short is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def write(path: Path, row: dict[str, Any]) -> None:
    """Append a run, whole, after what other processes appended."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # a killed process's half line
                text = path.read_bytes()
                file.truncate(text.rfind(b"\n") + 1)
        file.write(json.dumps(row, sort_keys=True).encode() + b"\n")


class Bench:
    """One process: the data on its device, and the trainer of the last group."""

    def __init__(self, data: Path, device: torch.device, size: Size, fast: bool) -> None:
        self.device, self.size, self.fast = device, size, fast
        photos = load_photos(data, 96, 12, device)
        self.photos, self.held = photos.split()
        cifar = load_cifar(data, device)
        self.cifar: tuple[Labelled, Labelled] = (
            few(cifar[0], size.cifar),
            few(cifar[1], size.cifar),
        )
        self.order: tuple[str, Order | None] = ("", None)
        self.trainer: tuple[Any, Trainer | None] = (None, None)

    def make(self, task: Task) -> tuple[Trainer, Order]:
        """The trainer and the order of a task, those of the last one where they are the same."""
        recipe = recipe_of(task, self.size)
        if self.trainer[0] != recipe:
            self.trainer = (None, None)
            self.trainer = (recipe, Trainer(recipe, self.photos, task.seed, self.fast))
        if self.order[0] != task.group:
            self.order = ("", None)
            made = make_order(self.photos, recipe, task.seed, task.steps)
            self.order = (task.group, made)
        trainer, order = self.trainer[1], self.order[1]
        assert trainer is not None
        assert order is not None
        trainer.start_from(task.seed)
        return trainer, order

    def run(self, task: Task) -> dict[str, Any]:
        """One run: its row for runs.jsonl."""
        began = time.perf_counter()
        trainer, order = self.make(task)
        depth = len(trainer.plain.encoder.blocks)
        block = depth if task.method == "mae" else max(1, round(depth * 2 / 3))
        looks: list[dict[str, Any]] = []

        def look(step: int) -> None:
            looks.append({"step": step, **measure(trainer, self.cifar, self.held, block)})

        if task.arm == "uniform" and task.stage == "main":  # what no training gives
            trainer.plain.load_state_dict(trainer.first)
            look(0)
        at = sorted({max(1, round(share * task.steps)) for share in self.size.looks})
        if task.stage in ("tune", "collapse"):
            at = at[-1:]
        spent = trainer.train(order, ARMS[task.arm], task.rate, {n: partial(look, n) for n in at})
        log = trainer.log.cpu()
        return asdict(task) | {
            "looks": looks,
            "finite": bool(torch.isfinite(log[:, :2]).all()),
            "losses": means(log[:, 0]),
            "clipped": round(float((log[:, 1] > trainer.recipe.clip).float().mean()), 4),
            "share": round(float(log[:, 2].mean()), 4),
            "images_per_s": round(task.steps * task.batch / spent, 1),
            "seconds": round(time.perf_counter() - began, 2),
            "train_seconds": round(spent, 2),
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            **provenance(),
        }


def means(values: torch.Tensor, parts: int = 20) -> list[float]:
    """The means of `parts` equal stretches."""
    return [round(float(part.mean()), 6) for part in values.tensor_split(min(parts, len(values)))]


def planned(rows: Iterable[dict[str, Any]], size: Size) -> list[Task]:
    """All runs as it stands now: tuning first, then all else, of methods tuned."""
    rates = chosen(rows, size)
    ready = replace(size, methods=tuple(rates))
    return [*tune(size), *(tasks(ready, rates) if rates else [])]


def todo(size: Size, out: Path) -> Iterator[Task]:
    """What is left to do, as it stands now."""
    rows = read(out / "runs.jsonl")
    done = {key(row) for row in rows}
    yield from (task for task in planned(rows, size) if key(asdict(task)) not in done)


def work(
    data: Path, out: Path, claims: Path, size: Size, device: str, fast: bool, end: float
) -> None:
    """Do group after group until none is left that nobody does, or that would not end in time."""
    bench: Bench | None = None
    took: dict[tuple[str, str], float] = {}  # seconds per step, by model and method
    method = ""
    while True:
        left = list(todo(size, out))
        # In the plan's order; within a stage its own method first: what is compiled serves again.
        order = sorted(left, key=lambda task: (STAGES.index(task.stage), task.method != method))
        groups = dict.fromkeys(task.group for task in order)
        group = next((each for each in groups if claimed(claims, each)), None)
        if group is None:
            tuned = len(chosen(read(out / "runs.jsonl"), size)) == len(size.methods)
            if tuned or time.time() > end or not left:
                return
            time.sleep(0.5)  # others still tune
            continue
        for task in [each for each in todo(size, out) if each.group == group]:
            if time.time() + 1.1 * task.steps * took.get((task.model, task.method), UNTIMED) > end:
                return
            bench = bench or Bench(data, torch.device(device), size, fast)
            row = bench.run(task)
            took[task.model, task.method] = row["seconds"] / task.steps
            method = task.method
            write(out / "runs.jsonl", row)
            last = row["looks"][-1]
            print(
                f"{time.strftime('%H:%M:%S')} {task.stage} {task.method} {task.arm}"
                f" seed {task.seed} rate {task.rate:g}: top-1 {100 * last['top1']:.2f} %, 20-NN"
                f" {100 * last['knn']:.2f} %, {row['images_per_s']:,.0f} img/s,"
                f" {row['seconds']:.1f} s in all",
                flush=True,
            )


def claimed(claims: Path, group: str) -> bool:
    """Whether this process, and no other that lives, does `group` from now on."""
    try:
        CLAIMED.enter_context(locked(claims / group, group))
    except UserError:
        return False
    return True


def check_same(size: Size, out: Path) -> None:
    """UserError if runs of another size or rate are in `out`: they would be mixed."""
    rows = read(out / "runs.jsonl")
    wanted = {key(asdict(task)) for task in planned(rows, size)}
    if other := next((row for row in rows if key(row) not in wanted), None):
        run = "{stage} {method} {arm} {seed}, {steps} steps of {batch} at a rate of {rate:g}"
        raise UserError(
            f"{out} has a run of another plan: {run.format_map(other)}; give another --out, or "
            "the same --steps"
        )


def checked(data: Path, size: Size, device: str, fast: bool, budget: float) -> dict[str, Any]:
    """A few steps of every model: are graphs right, how fast is it, how many steps fit `budget`?

    Raises RuntimeError if compiled steps in a graph and plain ones disagree.
    """
    bench = Bench(data, torch.device(device), size, fast)
    rates = dict.fromkeys(size.methods, 1e-3)
    every = [*tune(size), *tasks(size, rates)]
    found: dict[str, Any] = {}
    speeds: dict[tuple[str, str], float] = {}
    for task in [task for task in every if task.seed == 0 and task.arm in CHECKED]:
        name = f"{task.model} {task.method} {task.arm}"
        if name in found:
            continue
        began = time.perf_counter()
        short = replace(task, stage=f"check {task.model}", steps=100 if fast else 4)
        trainer, order = bench.make(short)
        spent = trainer.train(order, ARMS[task.arm], task.rate, {})
        speeds[task.model, task.method] = speed = len(order) * task.batch / spent
        losses = trainer.log[:, 0].clone()
        row = {
            "images_per_s": round(speed, 1),
            "first": float(losses[0]),
            "last": float(losses[-1]),
        }
        if trainer.fast and task.arm != "contrast":
            row["differs"] = apart(trainer, bench, order, task, losses)
        found[name] = row | {"seconds": round(time.perf_counter() - began, 1)}
        print(f"{name}: {found[name]}", flush=True)
        if row.get("differs", 0) > ALIKE:
            raise RuntimeError(f"{name}: compiled steps differ from plain ones by {row['differs']}")
        if task.model == size.model and "look" not in found:
            found["look"] = look_seconds(trainer, bench)
    main = [task for task in every if task.stage in ("tune", "main")]
    seconds = sum(task.steps * task.batch / speeds[task.model, task.method] for task in main)
    looks = sum(1 if task.stage == "tune" else len(size.looks) for task in main)
    spare = budget - looks * found["look"] / 2  # of which half passes while others train
    fits = int(spare / seconds * size.steps) // 250 * 250
    steps = min(MOST, max(LEAST, fits))
    print(f"{len(main)} runs of {size.steps} steps: {seconds:.0f} s; a look: {found['look']} s;")
    print(f"{budget:.0f} s fit {fits} steps: {steps}", flush=True)
    return found | {"main_seconds": round(seconds, 1), "budget": budget, "steps": steps}


def apart(trainer: Trainer, bench: Bench, order: Order, task: Task, losses: torch.Tensor) -> float:
    """How far the first losses are from those of steps without compiling, without a graph."""
    plain = Trainer(trainer.recipe, bench.photos, task.seed, False)
    plain.prepare(task.rate, len(order))
    plain.reset()
    for _ in range(SAME):
        plain.step(order, ARMS[task.arm])
    return round(float((plain.log[:SAME, 0] / losses[:SAME] - 1).abs().max()), 6)


def look_seconds(trainer: Trainer, bench: Bench) -> float:
    """What measuring an encoder takes, the second time."""
    for _ in range(2):
        began = time.perf_counter()
        measure(trainer, bench.cifar, bench.held, 1)
    return round(time.perf_counter() - began, 2)
