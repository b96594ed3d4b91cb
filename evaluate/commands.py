"""The commands of evaluation: `kamim probe`, `finetune`, `analyse`, `export-hf`.

In: what a user typed. Out: a table, a JSON file. torch is imported only when one of them runs.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

app = typer.Typer()

What = Annotated[
    str,
    typer.Argument(
        help="A run, checkpoint, exported or Hugging Face file, timm:NAME or random:NAME."
    ),
]


Train = Annotated[Path, typer.Argument(help="Shards to learn on.")]
Val = Annotated[Path, typer.Argument(help="Shards to test on.")]
Block = Annotated[
    int, typer.Option(min=0, help="Features after this block; 0: 8 of 12, a Swin's last stage.")
]
Pooling = Annotated[
    Literal["mean", "cls"], typer.Option(help="Mean of the patch tokens, or the class token.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Out = Annotated[Path | None, typer.Option(help="Folder for what is kept and the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def probe(
    encoder: What,
    train: Train,
    val: Val,
    protocol: Annotated[
        Literal["fast", "paper"],
        typer.Option(help="Cached features and swept rates, or the published augmented recipe."),
    ] = "fast",
    block: Block = 0,
    pool: Pooling = "mean",
    seeds: Annotated[int, typer.Option(min=1, help="Heads trained, each with its own seed.")] = 3,
    neighbours: Annotated[int, typer.Option(min=1, help="k of the nearest neighbours.")] = 20,
    epochs: Annotated[float, typer.Option(min=0, help="Of the head; 0: 30 fast, 100 paper.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Of the paper's protocol.")] = 2048,
    device: Device = "auto",
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Linear probe of frozen features, and their nearest neighbours.

    fast: features are computed once and kept, learning rates are swept on a tenth of the training
    set, no augmentation. paper: AdamW 5e-3 at batch 2048, TrivialAugmentWide, erasing, MixUp or
    CutMix. Killed, the same command goes on from what is finished.
    """
    from evaluate.features import cached
    from evaluate.probe import linear_probe, nearest_neighbours

    learn, test, classes, model, chosen, where = _opened(encoder, train, val, block, device)
    folder = out or Path("probes") / Path(encoder.replace(":", "-")).stem
    known = cached(folder, model, learn, chosen, pool, where)
    asked = cached(folder, model, test, chosen, pool, where)
    row: dict[str, Any] = {
        "encoder": encoder, "protocol": protocol, "block": chosen, "blocks": model.blocks,
        "pool": pool, "train": str(train), "val": str(val), "samples": [len(learn), len(test)],
        "knn": round(nearest_neighbours(known, asked, classes, neighbours), 4),
    }  # fmt: skip
    if protocol == "fast":
        scores = [linear_probe(known, asked, classes, seed, round(epochs) or 30, device=where)
                  for seed in range(seeds)]  # fmt: skip
        row |= {"top1": [round(s.top1, 4) for s in scores]}
        row |= {"top5": [round(s.top5, 4) for s in scores], "rates": [s.rate for s in scores]}
    else:
        changes: dict[str, Any] = {"batch": batch} | ({"epochs": epochs} if epochs else {})
        row |= _supervised("paper-probe", changes, row, model, chosen, pool, learn, test, folder,
                           range(seeds), where)  # fmt: skip
    _report(row, folder / "probe.json", json_output, f", {neighbours}-NN {row['knn']:.2%}")


@app.command()
def finetune(
    encoder: What,
    train: Train,
    val: Val,
    recipe: Annotated[
        Literal["kamim", "simmim"], typer.Option(help="KAMIM's, or SimMIM's with layer decay.")
    ] = "simmim",
    epochs: Annotated[float, typer.Option(min=0, help="0: the recipe's 100.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Decides order and augmentation.")] = 0,
    device: Device = "auto",
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Train all of an encoder with labels, and test it.

    Killed, the same command goes on from the last finished epoch, to the same numbers.
    """
    learn, test, _, model, _, where = _opened(encoder, train, val, 0, device)
    folder = out or Path("finetuned") / Path(encoder.replace(":", "-")).stem
    row: dict[str, Any] = {"encoder": encoder, "recipe": recipe, "blocks": model.blocks,
                           "block": model.blocks, "pool": "mean", "train": str(train),
                           "val": str(val), "samples": [len(learn), len(test)]}  # fmt: skip
    changes: dict[str, Any] = {"batch": batch} | ({"epochs": epochs} if epochs else {})
    row |= _supervised(recipe, changes, row, model, model.blocks, "mean", learn, test, folder,
                       range(seed, seed + 1), where)  # fmt: skip
    _report(row, folder / "finetune.json", json_output, "")


def _opened(encoder: str, train: Path, val: Path, block: int, device: str) -> tuple[Any, ...]:
    """(training set, test set, classes, encoder, block, device), checked before any work."""
    from evaluate.encoder import load_encoder
    from evaluate.features import check_labels
    from shards import ShardSet
    from train.setup import find_device

    learn, test = ShardSet(train), ShardSet(val)
    classes = check_labels(learn, test)
    check_labels(test)
    where = find_device(device)
    model = load_encoder(encoder, where)
    chosen = block or model.default_block
    if chosen > model.blocks:
        raise ValueError(f"--block {chosen}: {encoder} has {model.blocks}")
    return learn, test, classes, model, chosen, where


def _supervised(
    name: str,
    changes: dict[str, Any],
    facts: dict[str, Any],
    model: Any,
    block: int,
    pool: Literal["mean", "cls"],
    learn: Any,
    test: Any,
    folder: Path,
    seeds: range,
    where: Any,
) -> dict[str, list[float]]:
    """Top-1 and top-5 of each seed's run, each in a folder of its own."""
    from copy import deepcopy
    from dataclasses import replace

    import torch

    from evaluate.supervised import RECIPES, Classifier, train_supervised

    recipe = replace(RECIPES[name], **changes)
    same = {key: facts[key] for key in ("encoder", "block", "pool")}
    found: dict[str, list[float]] = {"top1": [], "top5": []}
    for seed in seeds:
        torch.manual_seed(seed)
        classes = len(learn.manifest.classes)
        classifier = Classifier(deepcopy(model), block, pool, classes, recipe.frozen).to(where)
        run = folder / f"{name}-seed-{seed}"
        scores = train_supervised(classifier, recipe, learn, test, run, seed, where, same)
        for key, values in found.items():
            values.append(scores[key])
    return found


def _report(row: dict[str, Any], path: Path, json_output: bool, more: str) -> None:
    path.write_text(json.dumps(row, indent=2) + "\n")
    if json_output:
        print(json.dumps(row))
        return
    count = len(row["top1"])
    spread = f" +- {statistics.stdev(row['top1']):.2%}" if count > 1 else ""
    print(
        f"{row['encoder']}, block {row['block']} of {row['blocks']}, {row['pool']}: top-1 "
        f"{statistics.mean(row['top1']):.2%}{spread}, top-5 {statistics.mean(row['top5']):.2%}"
        f"{more} of {row['samples'][1]:,}, {count} seeds"
    )


@app.command()
def analyse(
    encoders: Annotated[
        list[str], typer.Argument(help="Encoders as for probe, then the folder of the shards.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path(
        "analysis"
    ),
    images: Annotated[int, typer.Option(min=2, help="Frames to look at.")] = 32,
) -> None:
    """Attention, frequencies, tokens and reconstructions of several encoders on one page.

    Attention distance stands beside that of uniform attention, and a warning where attention has
    collapsed.
    """
    import torch

    from evaluate.analyse import analyse
    from evaluate.encoder import load_encoder
    from shards import ShardSet
    from train.checkpoint import newest

    *names, folder = encoders
    if not names:
        raise ValueError("name at least one encoder, then the folder of the shards")
    records = ShardSet(folder)
    loaded = {name: load_encoder(name, torch.device("cpu")) for name in names}
    ours = {name: newest(Path(name) / "checkpoints") or Path(name) for name in names
            if Path(name).is_dir() or Path(name).suffix == ".pt"}  # fmt: skip
    for warning in analyse(loaded, ours, records, out, images):
        print(f"warning: {warning}", file=sys.stderr)
    print(out / "analysis.html")


@app.command()
def export_hf(
    encoder: What,
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
) -> None:
    """Write a ViT's encoder by Hugging Face's names, for ViTModel with layer_norm_eps 1e-6."""
    import torch

    from evaluate.encoder import load_encoder
    from evaluate.huggingface import from_timm
    from train.export import write_tensors

    if target.exists():
        raise ValueError(f"{target} exists; name another file or remove it")
    model = load_encoder(encoder, torch.device("cpu")).model
    if not hasattr(model, "blocks"):
        raise ValueError(f"{encoder} is no ViT; its tensors have no names in Hugging Face's ViT")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(from_timm(model.state_dict()), target, {"format": "pt"})
    print(target)
