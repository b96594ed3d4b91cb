"""The commands of pretraining: `kamim pretrain`, `recipes` and `export`.

In: what a user typed. Out: a run, a list, a file. torch is imported only when one of them runs.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shards.remote import is_url
from shards.retry import PATIENCE

app = typer.Typer()

Folder = Annotated[str, typer.Argument(help="Folder of a finished set of shards, or its URL.")]


@app.command()
def pretrain(
    folder: Folder,
    recipe: Annotated[str, typer.Option(help="See `kamim recipes`; or any timm ViT.")] = "vit_base",
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/RECIPE by default.")] = None,
    detector: Annotated[
        str | None, typer.Option(help="The map to weigh by; the only one of keypoints.")
    ] = None,
    bank: Annotated[
        bool, typer.Option("--bank", help="Train on the stored crops, with exact densities.")
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Decides order, crops, flips, masks, weights.")
    ] = 0,
    resume: Annotated[
        Literal["no", "auto"], typer.Option(help="auto: go on from the newest checkpoint, if any.")
    ] = "no",
    epochs: Annotated[
        float, typer.Option(min=0, help="0: the recipe's; phases of sampling keep their share.")
    ] = 0,
    batch: Annotated[
        int, typer.Option(min=0, help="Samples a step, over all processes; 0: recipe's.")
    ] = 0,
    steps: Annotated[
        int, typer.Option(min=0, help="Stop after so many, on the same schedule.")
    ] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(min=0, help="Loader threads; 0: one a core.")] = 0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 20,
    on_error: Annotated[
        Literal["fail", "skip"], typer.Option(help="A damaged record: stop, or skip and count.")
    ] = "fail",
    check: Annotated[
        Literal["checksum", "size"], typer.Option(help="How to check the shards at the start.")
    ] = "checksum",
    wandb: Annotated[str, typer.Option(help="Weights & Biases project to log to.")] = "",
    window: Annotated[
        int, typer.Option(min=0, help="Shards shuffled together; 0: all, 64 of a URL's.")
    ] = 0,
    cache: Annotated[
        Path | None, typer.Option(help="Local folder for copies of shards at a URL.")
    ] = None,
    cache_limit: Annotated[
        str, typer.Option(help="Most it may take, as 200GB or 1TiB; 0: no limit.")
    ] = "0",
    patience: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for a store that does not answer.")
    ] = PATIENCE,
) -> None:
    """Pretrain on the shards in FOLDER; several processes by torchrun, with the same batches.

    FOLDER may be an s3://, gs://, hf:// or https:// URL: shards are then fetched into --cache,
    ahead of need, and read in windows of --window shards.

    Recipes ending in _amt and _famt draw the masked, thrown and visible cells by the model's own
    attention, and _famt also by the shards' frequency map, whose formula is our own (FAMT's is not
    known). Cells are random for the first random_epochs (40 of 100, a tenth of a shorter run), and
    attention is looked at anew every refresh_epochs, in one pass over the shards.

    SIGTERM or Ctrl-C saves and stops (exit status 143 or 130). Killed or stopped, --resume auto
    goes on with the same losses as a run that was not.
    """
    from train.loop import pretrain
    from train.recipes import find_recipe
    from train.setup import Run
    from train.stopping import Stopped

    chosen = find_recipe(recipe)
    changes: dict[str, Any] = {"epochs": epochs} if epochs else {}
    if epochs and chosen.sample_by != "none":
        changes["random_epochs"] = chosen.random_epochs * epochs / chosen.epochs
        changes["refresh_epochs"] = chosen.refresh_epochs * epochs / chosen.epochs
    changes |= {"batch": batch} if batch else {}
    run = Run(
        shards=folder if is_url(folder) else Path(folder),
        out=out or Path("runs") / recipe,
        recipe=replace(chosen, **changes),
        seed=seed,
        detector=detector,
        bank=bank,
        device=device,
        workers=workers,
        resume=resume == "auto",
        steps=steps,
        save_every=save_every,
        log_every=log_every,
        skip_damaged=on_error == "skip",
        checksum=check == "checksum",
        wandb=wandb,
        window=window,
        cache=cache,
        cache_limit=parse_bytes(cache_limit),
        patience=patience,
    )
    try:
        pretrain(run)
    except Stopped as stopped:
        raise SystemExit(128 + stopped.args[0]) from None
    print(run.out)


def parse_bytes(text: str) -> int:
    """Bytes of a size as a user types it: 200GB is 200 * 10**9, 200GiB is 200 * 2**30."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([kmgt]?)(i?)b?", text.strip().lower())
    if not found or (found[3] and not found[2]):
        raise ValueError(f"--cache-limit {text!r} is no size; use one as 200GB, 1.5TiB, or bytes")
    return round(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".find(found[2] or " "))


@app.command()
def recipes() -> None:
    """List the recipes of `kamim pretrain` with what they set."""
    from train.recipes import RECIPES

    for name, make in RECIPES.items():
        recipe = make()
        weights = "no weights" if recipe.temperature is None else f"T {recipe.temperature:g}"
        cells = f"{recipe.method} masks {recipe.mask_ratio:g}"
        if recipe.sample_by != "none":
            cells += f", throws {recipe.throw_ratio:g}, by {recipe.sample_by}"
        print(f"{name:28s} {recipe.model} at {recipe.size} px, {recipe.epochs:g} epochs, "
              f"batch {recipe.batch}, {weights}, {cells}")  # fmt: skip


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a run for its newest.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write the encoder of a checkpoint as safetensors that timm loads unchanged."""
    from train.checkpoint import chosen
    from train.export import export

    print(f"{target}: load it into {export(chosen(checkpoint), target)}")
