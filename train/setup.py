"""Before the first step: does what was asked fit together, and where did the run leave off?

In: a Run. Out: the detector, the device, the parts of a step, the restored state, or one clear
ValueError.
"""

import json
import math
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from shards import Manifest, Settings, ShardSet
from shards.bank import BANK_CELL
from shards.manifest import Detector
from shards.plan import FLIPS
from shards.verify import damaged_files
from train import checkpoint
from train.log import say
from train.model import CELL
from train.processes import Place
from train.recipes import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where and how to train; what decides the numbers is in the recipe and the seed."""

    shards: Path
    out: Path
    recipe: Recipe
    seed: int = 0
    detector: str | None = None  # None: the only one in the shards
    bank: bool = False  # stored crops with their exact counts, not new crops read off maps
    device: str = "auto"
    workers: int = 0
    resume: bool = False
    steps: int = 0  # 0: the recipe's epochs; less: stop there, on the same schedule
    save_every: int = 500
    log_every: int = 20
    skip_damaged: bool = False
    checksum: bool = True  # of every shard before the first step: seconds, and it warms the cache
    compile: bool = True  # on CUDA
    wandb: str = ""


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: torch sees no CUDA device; use --device cpu")
        torch.set_float32_matmul_precision("high")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device(name)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def count_micro_steps(recipe: Recipe, ranks: int) -> int:
    """The fewest parts of a step whose forward passes fit `micro_batch`, all of equal size."""
    mine, rest = divmod(recipe.batch, ranks)
    if rest:
        raise ValueError(
            f"a batch of {recipe.batch} does not split over {ranks} processes; use a multiple"
        )
    fewest = math.ceil(mine / recipe.micro_batch)
    return next(n for n in range(fewest, mine + 1) if mine % n == 0)


def check(run: Run, manifest: Manifest, place: Place) -> Detector | None:
    """The detector to weigh by, or None for plain SimMIM.

    The processes of a machine hash all shards between them: it may have a copy of its own, and
    where all machines share one, each reads it once, as every epoch does. Raises ValueError if the
    shards cannot serve the recipe, or are damaged.
    """
    recipe, settings = run.recipe, manifest.settings
    if recipe.size % CELL:
        raise ValueError(
            f"crop size {recipe.size} is no multiple of the mask cell, {CELL} px; "
            f"use {recipe.size // CELL * CELL or CELL}"
        )
    if run.skip_damaged and manifest.container == "ffcv":
        raise ValueError("FFCV decodes damage in silence: --on-error skip needs WebDataset shards")
    if run.bank:
        check_bank(run, settings)
    detector = choose_detector(run, manifest)
    smallest = settings.frame * math.sqrt(recipe.area[0] * 3 / 4)
    if smallest < 0.8 * recipe.size and place.rank == 0:
        better = math.ceil(recipe.size / math.sqrt(recipe.area[0]) / 8) * 8
        say(
            f"warning: frames of {settings.frame} px are enlarged for crops of {recipe.size} px "
            f"(the smallest box has {smallest:.0f} px); sources that have more deserve shards "
            f"built with --frame {better}"
        )
    part = place.local_rank, place.local_ranks
    damage = damaged_files(run.shards, manifest, *part) if run.checksum else []
    if damage:
        raise ValueError(
            damage[0] if place.ranks == 1 else f"on {socket.gethostname()}: {damage[0]}"
        )
    return detector


def choose_detector(run: Run, manifest: Manifest) -> Detector | None:
    """The detector whose maps the recipe weighs by; ValueError if none of them can serve."""
    recipe, settings = run.recipe, manifest.settings
    if recipe.temperature is None:
        return None
    names = manifest.detectors
    if run.detector is None and len(names) > 1:
        raise ValueError(f"the shards have maps of {', '.join(names)}; choose one by --detector")
    name = run.detector or names[0]
    if name not in names:
        raise ValueError(
            f"{run.shards} has no maps of {name!r}, only of {', '.join(names)}; "
            f"build it with --detector {name}"
        )
    cells, rest = divmod(recipe.size, recipe.w_ps)
    if rest:
        raise ValueError(f"w_ps {recipe.w_ps} does not divide the crop size {recipe.size}")
    if settings.grid < cells and not run.bank:
        raise ValueError(
            f"maps of {settings.grid} cells a side cannot serve {cells} weight cells (crop "
            f"{recipe.size}, w_ps {recipe.w_ps}); build with --grid {2 * cells} or raise w_ps"
        )
    return settings.detectors[names.index(name)]


def check_bank(run: Run, settings: Settings) -> None:
    """ValueError unless the bank's crops are those of the recipe."""
    recipe = run.recipe
    if not settings.bank:
        raise ValueError(
            f"{run.shards} has no bank; add one by `kamim shards build SOURCE NEW --bank 4 --reuse "
            f"{run.shards}`, or train on the maps"
        )
    stored = {"size": settings.crop, "area": tuple(settings.area), "vertical": FLIPS[1]}
    for name, value in stored.items():
        if getattr(recipe, name) != value:
            raise ValueError(
                f"the bank's crops have {name} {value}, the recipe's {getattr(recipe, name)}; "
                "build a bank for it (--crop, --area), or train on the maps"
            )
    if recipe.w_ps % BANK_CELL:
        raise ValueError(f"w_ps {recipe.w_ps} is no multiple of the bank's {BANK_CELL} px")


def run_facts(run: Run, manifest: Manifest, detector: Detector | None) -> dict[str, Any]:
    """What a checkpoint belongs to: a run goes on only where all of it is equal."""
    recipe = asdict(run.recipe) | {"area": list(run.recipe.area)}
    name = detector.name if detector else ""
    return {
        "recipe": recipe,
        "seed": run.seed,
        "detector": name,
        "bank": run.bank,
        "shards": manifest.fingerprint,
    }


def describe(
    run: Run,
    records: ShardSet,
    facts: dict[str, Any],
    model: nn.Module,
    total: int,
    micro_steps: int,
    ranks: int,
    device: torch.device,
) -> None:
    """Say, and write into run.json, what is about to happen, with the sums a reader can check."""
    recipe, name = run.recipe, facts["detector"]
    parameters = sum(p.numel() for p in model.parameters())
    source = "stored crops" if run.bank else "maps"
    weights = (
        f"{name} weights from {source} at T = {recipe.temperature}"
        if name
        else "no weights (SimMIM)"
    )
    crop = records.manifest.settings.crop
    if name and crop != recipe.size:
        say(f"note: the maps are for crops of {crop} px, the recipe's have {recipe.size}; "
            f"shards built with --crop {recipe.size} are nearer to detection on them")  # fmt: skip
    say(
        f"{recipe.model}, {parameters / 1e6:.1f} M parameters, {weights}\n"
        f"{len(records):,} records x {recipe.epochs:g} epochs / batch {recipe.batch} = {total:,} "
        f"steps; batch = {ranks} processes x {micro_steps} micro-steps x "
        f"{recipe.batch // ranks // micro_steps}, on {device_name(device) or device.type}"
    )
    run.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    text = json.dumps(facts | {"shards_folder": str(run.shards), "versions": versions}, indent=2)
    (run.out / "run.json").write_text(text + "\n")


def restore(
    run: Run, facts: dict[str, Any], model: nn.Module, optimizer: Any, device: torch.device
) -> int:
    """Load the newest checkpoint if asked to; returns the first step to do."""
    path = checkpoint.newest(run.out / "checkpoints")
    if path is None:
        return 0
    if not run.resume:
        raise ValueError(
            f"{run.out} holds a run already (to step {int(path.stem[5:])}); go on with it by "
            "--resume auto, or name another --out"
        )
    state = checkpoint.load(path, device)
    then = {**state["run"], **{f"recipe.{k}": v for k, v in state["run"]["recipe"].items()}}
    now = {**facts, **{f"recipe.{k}": v for k, v in facts["recipe"].items()}}
    changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in now
               if k not in ("recipe", "recipe.micro_batch") and then.get(k) != now[k]]  # fmt: skip
    if changed:
        raise ValueError(f"{path} is of another run: {'; '.join(changed[:3])}; use the same, "
                         "or name another --out")  # fmt: skip
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by their weight decay: all of them as published, or SimMIM's exclusions."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim <= 1 or name.endswith(("pos_embed", "cls_token", "bias_table"))
        (free if plain and not recipe.decay_all else decayed).append(parameter)
    decay = recipe.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
