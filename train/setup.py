"""Before the first step: what a run is, where it runs, and where it left off.

In: a Run. Out: the device, the parts of a step, the restored state, or one clear UserError.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from shards import Manifest, ShardSet
from shards.errors import UserError
from shards.remote.retry import PATIENCE
from train import checkpoint
from train.progress import say
from train.recipes import Recipe
from train.schedule import learning_rate
from train.words import check_device

# What --epochs decides: the length, and the phases of sampling that are shares of it.
LENGTHS = ("recipe.epochs", "recipe.random_epochs", "recipe.refresh_epochs")

Rates = tuple[int, int, float, float, float]  # steps, warm-up, peak, floor, start


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where and how to train; what decides the numbers is in the recipe and the seed."""

    shards: Path | str  # a folder, or the URL of one
    out: Path
    recipe: Recipe
    seed: int = 0
    detector: str | None = None  # None: the only one of keypoints in the shards
    bank: bool = False  # stored crops with their exact counts, not new crops read off maps
    device: str = "auto"
    workers: int = 0
    resume: bool = False
    extend: bool = False  # resume with more epochs than the run had
    steps: int = 0  # 0: the recipe's epochs; less: stop there, on the same schedule
    save_every: int = 500
    log_every: int = 20
    skip_damaged: bool = False
    checksum: bool = True  # of every shard before the first step: seconds, and it warms the cache
    compile: bool = True  # on CUDA
    wandb: str = ""
    window: int = 0  # shards that are shuffled together; 0: all, 64 if they are remote
    cache: Path | None = None  # local folder for remote shards
    cache_limit: int = 0  # bytes; 0: no limit
    patience: float = PATIENCE  # seconds to wait for a store that does not answer


def find_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda (of several processes each its own) or cuda:N.

    Raises UserError if there is none.
    """
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch sees no CUDA device; use --device cpu")
    mine = os.environ.get("LOCAL_RANK")
    if mine is not None and ":" in name:
        raise UserError(f"--device {name}: torchrun gives each process its own; use --device cuda")
    number, count = int(name.partition(":")[2] or mine or 0), torch.cuda.device_count()
    if number >= count:
        raise UserError(f"--device {name}: torch sees {count} CUDA devices, from cuda:0 on")
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def count_micro_steps(recipe: Recipe, ranks: int, most: int) -> int:
    """The fewest parts of a step, all of equal size, of `most` images each at most."""
    mine, rest = divmod(recipe.batch, ranks)
    if rest:
        raise UserError(
            f"a batch of {recipe.batch} does not split over {ranks} processes; use a multiple"
        )
    fewest = math.ceil(mine / most)
    return next(n for n in range(fewest, mine + 1) if mine % n == 0)


def run_facts(run: Run, manifest: Manifest, detector: str | None, window: int) -> dict[str, Any]:
    """What a checkpoint belongs to: a run goes on only where all of it is equal."""
    plain = asdict(run.recipe)
    recipe = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
    return {
        "recipe": recipe,
        "seed": run.seed,
        "detector": detector or "",
        "bank": run.bank,
        "shards": manifest.fingerprint,
        "window": window,
    }


def describe(
    run: Run,
    records: ShardSet,
    facts: dict[str, Any],
    model: nn.Module,
    hiding: str,
    total: int,
    micro_steps: int,
    ranks: int,
    device: torch.device,
) -> None:
    """Say, and write into run.json, what is about to happen, with the sums a reader can check."""
    recipe, name = run.recipe, facts["detector"]
    parameters = sum(p.numel() for p in model.parameters())
    source = "stored crops" if run.bank else "maps"
    weights = f"{name} weights from {source} at T = {recipe.temperature}" if name else "no weights"
    crop = records.manifest.settings.crop
    if name and crop != recipe.size:
        say(f"note: the maps are for crops of {crop} px, the recipe's have {recipe.size}; "
            f"shards built with --crop {recipe.size} are nearer to detection on them")  # fmt: skip
    say(
        f"{recipe.model}, {parameters / 1e6:.1f} M parameters, {weights}\n"
        f"{hiding}\n"
        f"{len(records):,} records x {recipe.epochs:g} epochs / batch {recipe.batch} = {total:,} "
        f"steps; batch = {ranks} processes x {micro_steps} micro-steps x "
        f"{recipe.batch // ranks // micro_steps}, on {device_name(device) or device.type}"
    )
    if records.copies:
        say(f"{run.shards} by way of {records.folder}, {facts['window'] or len(records.shards)} of "
            f"{len(records.shards):,} shards at a time")  # fmt: skip
    run.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    text = json.dumps(facts | {"shards_folder": str(run.shards), "versions": versions}, indent=2)
    (run.out / "run.json").write_text(text + "\n")


def restore(
    run: Run, facts: dict[str, Any], model: nn.Module, optimizer: Any, device: torch.device
) -> tuple[int, float, float]:
    """Load the newest checkpoint if asked to; returns the first step to do, the seconds of
    training that those before took, and the epochs the run was to have.

    `facts` is given what the run was extended by: `extended`, [step, epochs before] each time.
    """
    path = checkpoint.newest(run.out / "checkpoints")
    if path is None:
        if run.extend:
            raise UserError(f"{run.out} holds no run to extend; leave --extend out, or name its "
                             "--out")  # fmt: skip
        return 0, 0.0, run.recipe.epochs
    if not run.resume:
        raise UserError(
            f"{run.out} holds a run already (to step {int(path.stem[5:])}); go on with it by "
            "--resume, or name another --out"
        )
    state = checkpoint.load(path, device)
    # What an older checkpoint's recipe does not have was as the defaults are.
    known = {each.name: each.default for each in fields(Recipe)} | state["run"]["recipe"]
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
    then = {"window": 0, **state["run"], **{f"recipe.{k}": v for k, v in known.items()}}
    now = {**facts, **{f"recipe.{k}": v for k, v in facts["recipe"].items()}}
    longer = then["recipe.epochs"] != now["recipe.epochs"]
    apart = ("recipe", "recipe.micro_batch", *(LENGTHS if longer else ()))
    changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in now
               if k not in apart and then.get(k) != now[k]]  # fmt: skip
    if changed:
        raise UserError(f"{path} is of another run: {'; '.join(changed[:3])}; use the same, "
                         "or name another --out")  # fmt: skip
    epochs, step = float(then["recipe.epochs"]), int(state["step"])
    if longer:
        check_length(run, then, now)
    extended = state["run"].get("extended", []) + ([[step, epochs]] if longer else [])
    if extended:
        facts["extended"] = extended
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return step, float(state.get("seconds", 0.0)), epochs


def check_length(run: Run, then: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError unless a run that had other epochs `then` can be extended, and shall be."""
    before, epochs = then["recipe.epochs"], now["recipe.epochs"]
    phases = [k for k in LENGTHS[1:] if then[k] != now[k]]
    what = f"{run.out} is a run of {before:g} epochs, not of {epochs:g}"
    if before > epochs:
        raise UserError(f"{what}; go on with it by --resume --epochs {before:g}")
    if phases:
        name = phases[0].removeprefix("recipe.")
        raise UserError(
            f"{what}, and its {name} of {then[phases[0]]:g} would have been {now[phases[0]]:g}: "
            f"it cannot be extended; train anew with --epochs {epochs:g} and another --out"
        )
    if not run.extend:
        raise UserError(f"{what}; add --extend to train it longer, or name another --out")


def say_where(
    run: Run, first: int, last: int, before: int, steps_an_epoch: float, rates: Rates
) -> None:
    """Say where a run goes on, after step `first`; that it is finished; what an extension does to
    its learning rate, whose schedule, now of `rates`, had `before` steps.
    """
    total, warmup, *levels = rates
    if first and before != total:
        was = min(round(run.recipe.warmup * steps_an_epoch), before - 1)
        then = learning_rate(first - 1, before, was, *levels)
        now = learning_rate(min(first, total - 1), total, warmup, *levels)
        say(f"extended from {before:,} to {total:,} steps: the learning rate's cosine is laid anew "
            f"over all of them, so it goes from {then:.2e} to {now:.2e}, and from here as in a run "
            "of that length")  # fmt: skip
    if first >= total:
        say(f"{run.out} is finished, {first:,} of {total:,} steps; try it: kamim probe {run.out} "
            f"TRAIN VAL; keep its encoder: kamim export {run.out} FILE; train it longer: --resume "
            "--extend --epochs with more")  # fmt: skip
    elif first >= last:
        say(f"{run.out} has done the {last:,} steps of --steps; without, it goes on to {total:,}")
    elif first:
        say(f"going on after step {first}")


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by their weight decay: all of them as published, or SimMIM's exclusions."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # MAE's positions
            continue
        plain = parameter.ndim <= 1 or name.endswith(("pos_embed", "cls_token", "bias_table"))
        (free if plain and not recipe.decay_all else decayed).append(parameter)
    decay = recipe.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
