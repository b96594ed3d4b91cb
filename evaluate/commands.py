"""The commands of evaluation: `kamim probe`, `analyse` and `export-hf`.

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


@app.command()
def probe(
    encoder: What,
    train: Annotated[Path, typer.Argument(help="Shards to learn the head on.")],
    val: Annotated[Path, typer.Argument(help="Shards to test it on.")],
    block: Annotated[
        int, typer.Option(min=0, help="Features after this block; 0: 8 of 12, a Swin's last stage.")
    ] = 0,
    pool: Annotated[
        Literal["mean", "cls"], typer.Option(help="Mean of the patch tokens, or the class token.")
    ] = "mean",
    seeds: Annotated[int, typer.Option(min=1, help="Heads trained, each with its own seed.")] = 3,
    neighbours: Annotated[int, typer.Option(min=1, help="k of the nearest neighbours.")] = 20,
    epochs: Annotated[int, typer.Option(min=1, help="Of the head.")] = 30,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Folder for features and probe.json.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Linear probe and nearest neighbours of frozen features, in minutes.

    Features are computed once and kept; learning rates are swept on a tenth of the training set.
    Killed, the same command goes on from the features that are finished.
    """
    from evaluate.encoder import load_encoder
    from evaluate.features import cached, check_labels
    from evaluate.probe import linear_probe, nearest_neighbours
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
    folder = out or Path("probes") / Path(encoder.replace(":", "-")).stem
    known = cached(folder, model, learn, chosen, pool, where)
    asked = cached(folder, model, test, chosen, pool, where)
    scores = [
        linear_probe(known, asked, classes, seed, epochs, device=where) for seed in range(seeds)
    ]
    row: dict[str, Any] = {
        "encoder": encoder, "block": chosen, "blocks": model.blocks, "pool": pool,
        "train": str(train), "val": str(val), "samples": [len(learn), len(test)],
        "top1": [round(s.top1, 4) for s in scores], "top5": [round(s.top5, 4) for s in scores],
        "rates": [s.rate for s in scores],
        "knn": round(nearest_neighbours(known, asked, classes, neighbours), 4),
    }  # fmt: skip
    (folder / "probe.json").write_text(json.dumps(row, indent=2) + "\n")
    if json_output:
        print(json.dumps(row))
        return
    spread = f" +- {statistics.stdev(row['top1']):.2%}" if seeds > 1 else ""
    print(
        f"{encoder}, block {chosen} of {model.blocks}, {pool}: top-1 "
        f"{statistics.mean(row['top1']):.2%}{spread}, top-5 {statistics.mean(row['top5']):.2%}, "
        f"{neighbours}-NN {row['knn']:.2%} of {len(test):,}, {seeds} seeds"
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
    from safetensors.torch import save_file

    from evaluate.encoder import load_encoder
    from evaluate.huggingface import from_timm

    if target.exists():
        raise ValueError(f"{target} exists; name another file or remove it")
    model = load_encoder(encoder, torch.device("cpu")).model
    if not hasattr(model, "blocks"):
        raise ValueError(f"{encoder} is no ViT; its tensors have no names in Hugging Face's ViT")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    save_file(from_timm(model.state_dict()), temporary, {"format": "pt"})
    temporary.replace(target)
    print(target)
