"""Before the first step: opens device and shards, and checks that they fit the recipe."""

import itertools
import math
import os
import socket
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import joblib
import timm.optim
import torch
from torch import nn

import shards
import shards.device
from shards import Plan, WeightedCrops
from shards.crops import FLIPS
from shards.decoding import check_decoding
from shards.errors import UserError, nearest
from shards.progress import counted
from shards.records import Records
from shards.verification import damaged_files
from train.controls import check_source, control_weights
from train.cuda import make_deterministic, warn_of_what_is_missing
from train.distributed import Process, together
from train.masking import guide_maps, wanted_maps
from train.models import MEAN, STD
from train.progress import say
from train.recipes import Recipe
from train.request import Run, check_device
from train.selection import FIXED, Selection, check_selection

COUNTED = ("size", "batch", "cell", "w_ps", "decoder")  # of a recipe, 1 at least
WINDOW = 64  # shards of a remote set: 64,000 samples, or all of one that has no more


def find_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda (of several processes each its own) or cuda:N.

    Raises UserError if there is none.
    """
    check_device(name)
    found, mine = shards.device.find_device(name), os.environ.get("LOCAL_RANK")
    if found.type == "cpu":
        return found
    if ":" not in name:
        alone = mine is None or torch.cuda.device_count() == 1
        found = shards.device.find_device("cuda:0" if alone else f"cuda:{mine}")
    elif mine is not None:
        raise UserError(f"--device {name}: torchrun gives each process its own; use --device cuda")
    torch.cuda.set_device(found)
    return found


def start_device(run: Run) -> torch.device:
    """The device of a run, set as it asks; says what is missing."""
    device = find_device(run.device)
    if run.deterministic and device.type == "cuda":
        make_deterministic()
    warn_of_what_is_missing(device, run.compile)
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


def open_records(run: Run) -> Records:
    """The sets to train on, from folders or through the cache. UserError if they cannot be."""
    return shards.open(
        run.shards if isinstance(run.shards, tuple) else (run.shards,),
        shares=run.shares,
        cache=run.cache,
        cache_limit=run.cache_limit,
        patience=run.patience,
        checksum=run.checksum,
    )


class Data(NamedTuple):
    """What a run trains on. `load` gives the batches of steps of a plan, as ShardSet.loader."""

    records: Records
    crops: WeightedCrops
    maps: list[str]  # those that a step reads
    plan: Plan  # of all records, in one micro-step
    selection: Selection  # of what is trained on
    load: Callable[..., Any]


def open_data(run: Run, process: Process, device: torch.device) -> Data:
    """The data of the run, checked; UserError, on every process, if they cannot serve."""
    recipe = run.recipe
    records = together(process, lambda: open_records(run))
    if run.decode == "gpu":
        together(process, lambda: check_decoding(records, device, run.skip_damaged))
    crops = together(process, lambda: check(run, records, process)).to(device)
    count_micro_steps(recipe, process.ranks, recipe.micro_batch or recipe.batch)  # does it split?
    select = partial(make_selection, run, records, crops.weights)
    selection = together(process, select)
    if selection.steps(recipe.epochs) < 1:
        raise UserError(
            f"{counted(recipe.epochs, 'epoch')} of {selection.epoch} records make no batch of "
            f"{recipe.batch}; give more --epochs or a smaller --batch"
        )
    load = partial(
        records.loader,
        bank=run.bank,
        decode=run.decode,
        processes=run.processes,
        workers=run.workers or max(1, joblib.cpu_count() // process.local_ranks),
        skip=run.skip_damaged,
        device=str(device),
    )
    maps = wanted_maps(recipe, crops.weights)
    return Data(records, crops, maps, selection.whole, selection, load)


def make_selection(run: Run, records: Records, detector: str | None) -> Selection:
    """What the run trains on, in what order; UserError if the cache cannot hold its windows."""
    recipe = run.recipe
    remote = any(one.copies for one in records.sets)
    window = run.window or (WINDOW if remote else 0)
    for one in records.sets:
        if one.copies:
            one.copies.check(min(window, len(one.shards)))
    crops: dict[str, Any] = {"area": recipe.area, "vertical": recipe.vertical}
    order = partial(records.plan, recipe.batch, run.seed, window=window, **crops)
    if recipe.select < 1 and recipe.select_by == FIXED:
        detector = detector or find_detector(run, records)
    return Selection(recipe, run.seed, records, order, detector)


def weighted_crops(
    recipe: Recipe, records: Records, detector: str | None, bank: bool = False
) -> WeightedCrops:
    """The recipe's crops of a batch, normalised, with the weights of `detector`, if any."""
    rule, degree = None, 1.0 if recipe.temperature is None else recipe.temperature
    if recipe.weights != "detector":
        rule = partial(
            control_weights,
            source=recipe.weights,
            temperature=degree,
            normalise=recipe.normalise,
        )
    return WeightedCrops(
        records,
        detector,
        size=recipe.size,
        w_ps=recipe.w_ps,
        temperature=degree,
        normalise=recipe.normalise,
        bank=bank,
        rule=rule,
        correct=recipe.correct,
        mean=MEAN,
        std=STD,
    )


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's: AdamW, fused on CUDA; any other by timm's factory, with what it has by default.

    Raises UserError for one that timm does not know, or that cannot be made.
    """
    name, groups = recipe.optimizer, parameter_groups(model, recipe)
    factory: Any = timm.optim  # which exports its names at run time only
    known: list[str] = [
        each
        for each in factory.list_optimizers()
        if not factory.get_optimizer_info(each).second_order
    ]
    if name not in known:
        near = nearest(name, known) or "; it has sgd, lion, muon ..."
        raise UserError(f"timm has no optimizer {name!r}{near}")
    for option, field in (("lr", "peak"), ("weight_decay", "weight_decay")):
        if option in recipe.optimizer_options:
            raise UserError(f"optimizer_options.{option} would not count; set {field} instead")
    try:
        if name == "adamw":
            own: dict[str, Any] = {"betas": (0.9, recipe.beta2), "fused": device.type == "cuda"}
            return torch.optim.AdamW(groups, **own | recipe.optimizer_options)
        rates = {"lr": recipe.peak, "weight_decay": recipe.weight_decay}
        by_kind = apart(groups, model)
        made: torch.optim.Optimizer = factory.create_optimizer_v2(
            by_kind, opt=name, **rates | recipe.optimizer_options
        )
        return made
    except (AssertionError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).split("\n")[0].rpartition("__init__() ")[2]
        raise UserError(f"the optimizer {name!r} cannot be made: {reason}") from None


def apart(groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """`groups` with positions and tokens in groups of their own, which are no matrices: a Muon has
    AdamW for them.
    """
    ends = ("pos_embed", "_token")
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = []
    for group in groups:
        for kind in (False, True):
            mine = [each for each in group["params"] if names[each].endswith(ends) is kind]
            found += [group | {"params": mine, "use_fallback": kind}] if mine else []
    return found


def clipped(model: nn.Module, recipe: Recipe) -> torch.Tensor:
    """The norm of the model's gradient, which is cut to what the recipe allows."""
    return nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or math.inf)


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameters by their weight decay: all of them as published, or SimMIM's exclusions."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    swin = getattr(model, "is_swin", False)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # MAE's positions
            continue
        falls = recipe.decay_all or decays(name, parameter, swin)
        (decayed if falls else free).append(parameter)
    decay = recipe.weight_decay
    groups = [{"params": decayed, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def decays(name: str, parameter: nn.Parameter, swin: bool = False) -> bool:
    """Whether SimMIM lets the weight of `parameter` decay: no vector, position or token of the
    encoder; a ViT's mask token, not that of a `swin`, nor what Swin V2 scales attention by.
    """
    if name.endswith("mask_token"):  # no vector in SimMIM's code
        return not swin
    kept = ("pos_embed", "cls_token", "reg_token", "dist_token", "bias_table", "logit_scale")
    return parameter.ndim > 1 and "cpb_mlp" not in name and not name.endswith(kept)


def check(run: Run, records: Records, process: Process) -> WeightedCrops:
    """The crops to train on, once it is sure that the shards can serve the recipe.

    The processes of a machine hash all shards between them: it may have a copy of its own, and
    where all machines share one, each reads it once, as every epoch does. Raises UserError if the
    shards cannot serve the recipe, or are damaged.
    """
    recipe, settings = run.recipe, records.sets[0].manifest.settings
    check_numbers(run)
    if recipe.size % recipe.cell:
        raise UserError(
            f"crop size {recipe.size} is no multiple of the mask cell, {recipe.cell} px; "
            f"use {recipe.size // recipe.cell * recipe.cell or recipe.cell}"
        )
    check_source(recipe.weights)
    check_temperature(recipe)
    check_selection(recipe, run.bank)
    if recipe.ema >= 1:
        raise UserError(f"ema {recipe.ema} is out of range; give a decay as 0.9999, or 0 for none")
    if run.skip_damaged and [one.manifest.container for one in records.sets] == ["ffcv"]:
        raise UserError("FFCV decodes damaged frames without an error: --on-error skip needs tars")
    if run.bank:
        check_bank(run, records)
    check_guides(run, records)
    crops = weighted_crops(recipe, records, choose_detector(run, records), run.bank)
    smallest = settings.frame * math.sqrt(recipe.area[0] * 3 / 4)
    if 0 < smallest < 0.8 * recipe.size and process.rank == 0:
        better = math.ceil(recipe.size / math.sqrt(recipe.area[0]) / 8) * 8
        say(
            f"warning: frames of {settings.frame} px are enlarged for crops of {recipe.size} px "
            f"(the smallest box has {smallest:.0f} px); sources that have more deserve shards "
            f"built with --frame {better}"
        )
    # Of a remote set every shard is hashed when it arrives, or is found in the cache.
    for one in records.sets:
        if not run.checksum or one.copies:
            continue
        part = process.local_rank, process.local_ranks
        damage = damaged_files(one.folder, one.manifest, *part)
        if damage:
            where = "" if process.ranks == 1 else f"on {socket.gethostname()}: "
            raise UserError(f"{where}{damage[0]}")
    return crops


def choose_detector(run: Run, records: Records) -> str | None:
    """The detector whose maps the recipe weighs by; UserError if it is not clear which."""
    return None if run.recipe.temperature is None else find_detector(run, records)


def find_detector(run: Run, records: Records) -> str:
    """The detector of the run, or the only one of keypoints; UserError if it is not clear which."""
    first, *others = (one.manifest for one in records.sets)
    common = [
        each
        for each in first.settings.detectors
        if all(each.name in other.detectors for other in others)
    ]
    usual = [each.name for each in common if each.has_keypoints]
    if run.detector is None and not common:
        raise UserError("the sets have no maps of one detector in common; build again with it")
    if run.detector is None and len(usual) != 1:
        names = ", ".join(each.name for each in common)
        raise UserError(f"the shards have maps of {names}; choose one by --detector")
    return run.detector or usual[0]


def check_numbers(run: Run) -> None:
    """UserError for a number that no run can have, whatever it is for."""
    for name, value in {"seed": run.seed, **asdict(run.recipe)}.items():
        least = 1 if name in COUNTED else 0
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, int | float) and not least <= each < 2**64:
                rule = f"give {least} or more, below 2**64"
                raise UserError(f"{name} {each:g} is out of range; {rule}")


def check_temperature(recipe: Recipe) -> None:
    """UserError unless the recipe's temperature can go to its end."""
    last = recipe.temperature_end
    if last is not None and recipe.temperature is None:
        raise UserError(
            f"temperature_end is {last}, and the recipe has no weights; set temperature"
        )
    if last == 0:
        raise UserError(f"temperature_end {last} is out of range; give a number above 0")


def check_guides(run: Run, records: Records) -> None:
    """UserError unless the shards have the maps that the recipe draws its cells by."""
    wanted = guide_maps(run.recipe)
    for one, name in itertools.product(records.sets, wanted):
        names, folder = one.manifest.detectors, one.folder
        if name not in names:
            raise UserError(
                f"the recipe draws cells by {name!r}, and {folder} has maps of "
                f"{', '.join(names)} only; build it with --detector "
                f"{','.join([*names, name])}, and --reuse {folder} saves what is there"
            )
    if wanted and run.bank:
        raise UserError(f"--bank loads no maps, and the recipe draws cells by {wanted[0]!r}")
    if run.recipe.refresh_epochs <= 0:
        raise UserError("refresh_epochs must be above 0")


def check_bank(run: Run, records: Records) -> None:
    """UserError unless the set has a bank, of the crops of the recipe."""
    records.find_maps([], bank=True)
    for one in records.sets:
        settings = one.manifest.settings
        stored = {"size": settings.crop, "area": tuple(settings.area), "vertical": FLIPS[1]}
        for name, value in stored.items():
            if getattr(run.recipe, name) != value:
                raise UserError(
                    f"the bank's crops have {name} {value}, the recipe's "
                    f"{getattr(run.recipe, name)}; build a bank for it (--crop, --area), or train "
                    "on the maps"
                )
