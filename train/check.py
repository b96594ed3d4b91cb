"""Before the first step: do shards, recipe and what was asked for fit together?

In: a Run, a manifest. Out: the detector to weigh by and the maps to read, or one clear UserError.
"""

import math
import socket
from pathlib import Path

from shards import Manifest, Settings
from shards.crops import FLIPS
from shards.errors import UserError
from shards.remote.storage import is_url
from shards.verification import damaged_files
from shards.weighting import check_cells
from train.distributed import Place
from train.masking import guide_maps
from train.models import CELL
from train.progress import busy, say
from train.recipes import Recipe
from train.setup import Run


def check(run: Run, manifest: Manifest, place: Place) -> str | None:
    """The detector to weigh by, or None for plain SimMIM.

    The processes of a machine hash all shards between them: it may have a copy of its own, and
    where all machines share one, each reads it once, as every epoch does. Raises UserError if the
    shards cannot serve the recipe, or are damaged.
    """
    recipe, settings = run.recipe, manifest.settings
    if recipe.size % CELL:
        raise UserError(
            f"crop size {recipe.size} is no multiple of the mask cell, {CELL} px; "
            f"use {recipe.size // CELL * CELL or CELL}"
        )
    if run.skip_damaged and manifest.container == "ffcv":
        raise UserError("FFCV decodes damage in silence: --on-error skip needs WebDataset shards")
    if run.bank:
        check_bank(run, settings)
    check_guides(run, manifest)
    detector = choose_detector(run, manifest)
    smallest = settings.frame * math.sqrt(recipe.area[0] * 3 / 4)
    if smallest < 0.8 * recipe.size and place.rank == 0:
        better = math.ceil(recipe.size / math.sqrt(recipe.area[0]) / 8) * 8
        say(
            f"warning: frames of {settings.frame} px are enlarged for crops of {recipe.size} px "
            f"(the smallest box has {smallest:.0f} px); sources that have more deserve shards "
            f"built with --frame {better}"
        )
    # Of a remote set every shard is hashed when it arrives, or is found in the cache.
    local = run.checksum and not is_url(run.shards)
    part = place.local_rank, place.local_ranks
    damage = []
    if local:
        with busy(f"hashing {len(manifest.shards):,} shards", place.rank == 0):
            damage = damaged_files(Path(run.shards), manifest, *part)
    if damage:
        where = "" if place.ranks == 1 else f"on {socket.gethostname()}: "
        raise UserError(f"{where}{damage[0]}")
    return detector


def choose_detector(run: Run, manifest: Manifest) -> str | None:
    """The detector whose maps the recipe weighs by; UserError if none of them can serve."""
    recipe, settings = run.recipe, manifest.settings
    if recipe.temperature is None:
        return None
    names = manifest.detectors
    usual = [each.name for each in settings.detectors if each.has_keypoints]
    if run.detector is None and len(usual) != 1:
        raise UserError(f"the shards have maps of {', '.join(names)}; choose one by --detector")
    name = run.detector or usual[0]
    if name not in names:
        both = ",".join([*names, name])
        raise UserError(
            f"{run.shards} has no maps of {name!r}, only of {', '.join(names)}; add them: "
            f"kamim shards build SOURCE NEW --detector {both} --reuse {run.shards}"
        )
    check_cells(settings, recipe.size, recipe.w_ps, run.bank)
    return name


def check_guides(run: Run, manifest: Manifest) -> None:
    """UserError unless the shards have the maps that the recipe draws its cells by."""
    wanted, names = guide_maps(run.recipe), manifest.detectors
    for name in wanted:
        if name not in names:
            raise UserError(
                f"the recipe draws cells by {name!r}, and {run.shards} has maps of "
                f"{', '.join(names)} only; build it with --detector "
                f"{','.join([*names, name])}, and --reuse {run.shards} saves what is there"
            )
    if wanted and run.bank:
        raise UserError(f"--bank loads no maps, and the recipe draws cells by {wanted[0]!r}")
    if run.recipe.refresh_epochs <= 0 or run.recipe.random_epochs < 0:
        raise UserError("refresh_epochs must be above 0, and random_epochs at least 0")


def wanted_maps(recipe: Recipe, detector: str | None) -> list[str]:
    """Names of the maps that a step reads: the weights' first, if there are any."""
    weighing = [detector] if detector else []
    return weighing + [name for name in guide_maps(recipe) if name not in weighing]


def check_bank(run: Run, settings: Settings) -> None:
    """UserError unless the bank's crops are those of the recipe."""
    recipe = run.recipe
    if not settings.bank:
        raise UserError(
            f"{run.shards} has no bank; add one by `kamim shards build SOURCE NEW --bank 4 --reuse "
            f"{run.shards}`, or train on the maps"
        )
    stored = {"size": settings.crop, "area": tuple(settings.area), "vertical": FLIPS[1]}
    for name, value in stored.items():
        if getattr(recipe, name) != value:
            raise UserError(
                f"the bank's crops have {name} {value}, the recipe's {getattr(recipe, name)}; "
                "build a bank for it (--crop, --area), or train on the maps"
            )
