"""Before the first step: do shards, recipe and what was asked for fit together?

In: a Run, a manifest. Out: the detector to weigh by and the maps to read, or one clear ValueError.
"""

import math
import socket
from pathlib import Path

from shards import Manifest, Settings
from shards.bank import BANK_CELL
from shards.order import FLIPS
from shards.remote.storage import is_url
from shards.spec import Detector
from shards.verify import damaged_files
from train.distributed import Place
from train.masking import guide_maps
from train.models import CELL
from train.progress import busy, say
from train.recipes import Recipe
from train.setup import Run


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
        raise ValueError(f"{where}{damage[0]}")
    return detector


def choose_detector(run: Run, manifest: Manifest) -> Detector | None:
    """The detector whose maps the recipe weighs by; ValueError if none of them can serve."""
    recipe, settings = run.recipe, manifest.settings
    if recipe.temperature is None:
        return None
    names = manifest.detectors
    usual = [each.name for each in settings.detectors if each.has_keypoints]
    if run.detector is None and len(usual) != 1:
        raise ValueError(f"the shards have maps of {', '.join(names)}; choose one by --detector")
    name = run.detector or usual[0]
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


def check_guides(run: Run, manifest: Manifest) -> None:
    """ValueError unless the shards have the maps that the recipe draws its cells by."""
    wanted, names = guide_maps(run.recipe), manifest.detectors
    for name in wanted:
        if name not in names:
            raise ValueError(
                f"the recipe draws cells by {name!r}, and {run.shards} has maps of "
                f"{', '.join(names)} only; build it with --detector "
                f"{','.join([*names, name])}, and --reuse {run.shards} saves what is there"
            )
    if wanted and run.bank:
        raise ValueError(f"--bank loads no maps, and the recipe draws cells by {wanted[0]!r}")
    if run.recipe.refresh_epochs <= 0 or run.recipe.random_epochs < 0:
        raise ValueError("refresh_epochs must be above 0, and random_epochs at least 0")


def wanted_maps(recipe: Recipe, detector: Detector | None) -> list[str]:
    """Names of the maps that a step reads: the weights' first, if there are any."""
    weighing = [detector.name] if detector else []
    return weighing + [name for name in guide_maps(recipe) if name not in weighing]


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
