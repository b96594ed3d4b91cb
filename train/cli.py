"""The commands of pretraining: `kamim pretrain`, `recipes` and `export`.

torch is imported only when one of them runs, and after what was typed is checked.
"""

import json
import re
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shards.errors import UserError, install
from shards.remote.retry import PATIENCE

if TYPE_CHECKING:
    from train.request import Run

app = typer.Typer()

Folders = Annotated[
    list[str],
    typer.Argument(
        metavar="FOLDER[:SHARE]", help="Folder of a finished set of shards, or its URL."
    ),
]


@app.command()
def pretrain(
    folders: Folders,
    recipe: Annotated[
        str,
        typer.Option(
            help="A name of `kamim recipes`, a timm ViT, or a .toml file (`kamim recipes --show`, "
            "or run.toml of a run). Default: demo, on CUDA vit_base."
        ),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/RECIPE by default.")] = None,
    detector: Annotated[
        str | None,
        typer.Option(help="Detector whose map gives the weights. Default: the only one."),
    ] = None,
    bank: Annotated[
        bool, typer.Option("--bank", help="Train on the stored crops, with exact densities.")
    ] = False,
    init: Annotated[
        str,
        typer.Option(
            help="Start the encoder from timm:NAME, a run, or a result of `kamim export`. Default: "
            "random weights."
        ),
    ] = "",
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=2**63 - 1,
            help="Decides order, crops, flips, masks and initial weights. Default: 0.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume", help="Continue from the newest checkpoint, if there is one."
        ),
    ] = False,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Continue a run to more --epochs than it was started with."),
    ] = False,
    epochs: Annotated[
        float,
        typer.Option(
            min=0, help="Epochs. 0: as in the recipe. Phases of AMT and FAMT keep their share."
        ),
    ] = 0,
    batch: Annotated[
        int, typer.Option(min=0, help="Images per step, over all processes. 0: as in the recipe.")
    ] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the recipe: cell=16. Repeatable."),
    ] = None,
    micro_batch: Annotated[
        int,
        typer.Option(
            min=0, help="Most images per forward pass and process. 0: chosen automatically."
        ),
    ] = 0,
    steps: Annotated[
        int, typer.Option(min=0, help="Stop after this many steps; the schedule stays. 0: all.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[
        int, typer.Option(min=0, help="Workers of the loader. 0: one per core.")
    ] = 0,
    processes: Annotated[
        bool, typer.Option("--processes", help="Use processes as loader workers, not threads.")
    ] = False,
    decode: Annotated[
        Literal["cpu", "gpu"] | None,
        typer.Option(help="Where JPEG frames are decoded; gpu: by nvJPEG. Default: cpu."),
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    save_minutes: Annotated[
        float, typer.Option(min=0, help="Most minutes between checkpoints. 0: only by steps.")
    ] = 15,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 20,
    probe_every: Annotated[
        float, typer.Option(min=0, help="Epochs between two probes of the features. 0: none.")
    ] = 0,
    probe_set: Annotated[
        str | None,
        typer.Option(
            help="Labelled shards to probe on. Default: those trained on, a tenth held out."
        ),
    ] = None,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="At a damaged record: stop, or skip and count it."),
    ] = "fail",
    check: Annotated[
        Literal["checksum", "size"], typer.Option(help="How to check the shards at the start.")
    ] = "checksum",
    compiles: Annotated[
        bool, typer.Option("--compile/--no-compile", help="On CUDA: compile a step into one graph.")
    ] = True,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="On CUDA: the same bits each time, but slower."),
    ] = False,
    wandb: Annotated[str, typer.Option(help="Weights & Biases project to log to.")] = "",
    window: Annotated[
        int, typer.Option(min=0, help="Shards that are shuffled together. 0: all; 64 for a URL.")
    ] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Local folder for copies of shards at a URL.")
    ] = None,
    cache_limit: Annotated[
        str, typer.Option(help="Most bytes in --cache: 200GB, 1TiB. 0: no limit.")
    ] = "0",
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a store that does not answer.")
    ] = PATIENCE,
) -> None:
    """Pretrain on the shards in FOLDER. With torchrun, several processes share the same batches.

    FOLDER may be an s3://, gs://, hf:// or https:// URL. Shards are then fetched into --cache ahead
    of time, and shuffled in windows of --window shards.

    Several FOLDERs are mixed evenly. Without shares, each image is shown once per epoch. With
    shares, as A:0.7 B:0.3, an epoch has as many images as all sets together, 0.7 of them from A.

    OUT/run.toml holds what a run used. As --recipe it repeats the run, with the same losses.

    Recipes ending in _amt draw masked and thrown cells by the model's own attention. Those ending
    in _famt also use the shards' frequency map (our own formula: FAMT's is not known). Cells are
    random for the first random_epochs (41 of 100; a tenth of a shorter run). One pass over the
    shards computes the attention, every refresh_epochs.

    --set select=0.5 trains on half of the samples. They are drawn by density or by loss
    (select_by), again every select_epochs. This selection is our own design.

    --probe-every 10 probes the features every 10 epochs: linear probe and 20 nearest neighbours on
    a held-out tenth of the images, effective rank, and attention beside uniform attention. It warns
    if attention is still uniform after a tenth of the run. The encoder trains on all of FOLDER,
    without labels. --probe-set names shards that it does not train on.

    SIGTERM or Ctrl-C saves and stops (exit status 143 or 130); a second one ends at once. --resume
    continues a stopped or killed run, with the losses of an uninterrupted one. --extend --epochs 20
    continues a run of fewer epochs, on the learning rates of the longer schedule.
    """
    from shards.remote.storage import is_url
    from train.progress import busy, say
    from train.recipe_file import default_out, read_recipe
    from train.recipes import changed
    from train.request import (
        Run,
        check_device,
        check_encoders,
        check_folder,
        check_once,
        check_wandb,
        kept_shares,
        take_shares,
    )

    folders, resume = take_word(folders, resume)
    folders, shares = take_shares(folders)
    limit = parse_bytes(cache_limit)
    if recipe:
        changed(read_recipe(recipe)[0], set_ or ())
    check_once(set_ or (), {"epochs": epochs, "batch": batch, "micro_batch": micro_batch})
    if extend and not epochs:
        raise UserError("--extend needs --epochs, more than the run was started with")
    check_device(device)
    check_wandb(wandb)
    for folder in folders:
        check_folder(folder)
    if init.startswith("random:"):
        raise UserError(f"--init {init}: without --init an encoder starts from random weights")
    check_encoders([init] if init else [])
    if probe_set and not probe_every:
        raise UserError("--probe-set needs --probe-every, the epochs between two looks at it")
    if probe_set:
        check_folder(probe_set)
    places = tuple(folder if is_url(folder) else Path(folder) for folder in folders)
    with busy("loading torch"):
        import_module("train.loop")  # which asks for torch before it asks for timm
        from train.setup import find_device

    if not recipe:
        kind = find_device(device).type
        recipe = "vit_base" if kind == "cuda" else "demo"
        say(f"no --recipe: {recipe}, as this runs on {kind}; others: kamim recipes")
    written, kept = read_recipe(recipe)
    chosen = changed(written, set_ or ())
    shares = shares or kept_shares(recipe, kept.get("shares"), len(folders))
    changes: dict[str, Any] = {"epochs": epochs} if epochs else {}
    if epochs and chosen.epochs and chosen.sample_by != "none":
        changes["random_epochs"] = chosen.random_epochs * epochs / chosen.epochs
        changes["refresh_epochs"] = chosen.refresh_epochs * epochs / chosen.epochs
    changes |= {"batch": batch} if batch else {}
    changes |= {"micro_batch": micro_batch} if micro_batch else {}
    run = Run(
        shards=places if len(places) > 1 else places[0],
        shares=shares if len(places) > 1 else None,
        out=out or default_out(recipe),
        recipe=replace(chosen, **changes),
        init=init or kept.get("init", ""),
        seed=kept.get("seed", 0) if seed is None else seed,
        detector=detector or kept.get("detector") or None,
        bank=bank or kept.get("bank", False),
        device=device,
        workers=workers,
        decode=decode or kept.get("decode", "cpu"),
        processes=processes,
        resume=resume or extend,
        extend=extend,
        steps=steps,
        save_every=save_every,
        save_minutes=save_minutes,
        log_every=log_every,
        probe_every=probe_every,
        probe_set=probe_set,
        compile=compiles,
        deterministic=deterministic or kept.get("deterministic", False),
        skip_damaged=on_error == "skip",
        checksum=check == "checksum",
        wandb=wandb,
        window=window or kept.get("window", 0),
        cache=cache,
        cache_limit=limit,
        patience=patience,
    )
    carry_out(run)


def carry_out(run: "Run") -> None:
    """Train as `run` says; at the end the first process prints its folder, which others may not
    see.
    """
    from train.distributed import Stopped, this_process
    from train.log import Diverged
    from train.loop import pretrain
    from train.request import checkpoints_in

    first = this_process().rank == 0
    try:
        pretrain(run)
    except Stopped as stopped:
        raise SystemExit(128 + stopped.args[0]) from None
    except Diverged as error:
        saved = checkpoints_in(run.out / "checkpoints")[-1:]
        left = f"{saved[0]} is sound" if saved else "no checkpoint was saved before that"
        raise UserError(f"{error}; {left}" if first else str(error)) from None
    if first:
        print(run.out)


def take_word(words: list[str], resume: bool) -> tuple[list[str], bool]:
    """(folders, whether to resume), where --resume may still have its value of old, auto or no.

    Click gives that to the folders: to the first or the last.
    """
    for place in (0, -1) if resume and len(words) > 1 else ():
        if words[place] in ("auto", "no"):
            word = words.pop(place)
            return words, word == "auto"
    return words, resume


def parse_bytes(text: str) -> int:
    """Bytes of a size as a user types it: 200GB is 200 * 10**9, 200GiB is 200 * 2**30."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)b?", text.strip().lower())
    if not found or (found[3] and not found[2]):
        raise UserError(f"--cache-limit {text!r} is no size; use one as 200GB, 1.5TiB, or bytes")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".find(found[2] or " "))


@app.command()
def recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print all settings as JSON.")] = False,
    name: Annotated[
        str, typer.Option("--show", help="Print this recipe, or this .toml, as TOML.")
    ] = "",
) -> None:
    """List the recipes of `kamim pretrain` and their main settings."""
    from train.recipe_file import show
    from train.recipes import find_recipe, recipe_names

    if name:
        print(show(name), end="")
        return
    made = {name: find_recipe(name) for name in recipe_names()}
    if as_json:
        print(json.dumps({name: asdict(recipe) for name, recipe in made.items()}, indent=2))
        return
    for name, recipe in made.items():
        weights = "no weights"
        if recipe.temperature is not None:
            of = {"min": "least weight 1", "mean": "mean weight 1", "batch": "mean of the batch 1"}
            weights = f"T {recipe.temperature:g}, {of[recipe.normalise]}"
        cells = f"{recipe.method} masks {recipe.mask_ratio:g}"
        if recipe.sample_by != "none":
            cells += f", throws {recipe.throw_ratio:g}, by {recipe.sample_by}"
        print(
            f"{name:28s} {recipe.model} at {recipe.size} px, {recipe.epochs:g} epochs, "
            f"batch {recipe.batch}, {weights}, {cells}"
        )


@app.command(short_help="Write the encoder of a checkpoint for timm or transformers.")
def export(
    run: Annotated[Path, typer.Argument(help="A run, or one of its checkpoints.")],
    target: Annotated[
        Path,
        typer.Argument(help="What to write: a .safetensors file; with --to timm or hf a folder."),
    ],
    to: Annotated[
        Literal["safetensors", "timm", "hf"],
        typer.Option(help="One file, a folder for timm, or a folder for transformers (ViT only)."),
    ] = "safetensors",
    ema: Annotated[
        bool, typer.Option("--ema", help="Export the moving average of the weights.")
    ] = False,
) -> None:
    """Write the encoder of a checkpoint in a form that timm or transformers loads unchanged.

    A folder has config.json, model.safetensors and a model card (README.md) with the run's data,
    recipe and numbers. You fill in the licence.
    """
    from train.checkpoint import chosen

    if to == "hf" and find_spec("transformers") is None:
        raise UserError(f"--to hf needs transformers; {install('transformers')}")
    from train.export import export

    print(f"{target}: load it into {export(chosen(run), target, to, ema)}")
