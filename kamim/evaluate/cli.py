"""The commands of evaluation: `kamim probe`, `finetune`, `analyse`.

torch is imported only when one of them runs, and after the request is checked.
"""

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kamim.evaluate import checks
from kamim.evaluate.checks import SUPERVISED, check_installed, check_kept, folder_for, result_for
from shards.errors import UserError
from shards.progress import counted
from train.request import check_encoders, file_of

if TYPE_CHECKING:
    import torch

    from kamim.evaluate.supervised import Pooling
    from shards import ShardSet
    from train.features import Encoder

app = typer.Typer()

What = Annotated[
    str,
    typer.Argument(
        help="A run, checkpoint, exported or Hugging Face file or folder, timm:NAME or random:NAME."
    ),
]
Train = Annotated[str, typer.Argument(help="Shards to train on: a folder or a URL.")]
Val = Annotated[str, typer.Argument(help="Shards to test on: a folder or a URL.")]
Cache = Annotated[Path | None, typer.Option(help="Local folder for copies of shards at a URL.")]
Block = Annotated[
    int, typer.Option(min=0, help="Features after this block. 0: 8 of 12; Swin: the last stage.")
]
Pool = Annotated[
    Literal["mean", "cls"],
    typer.Option(help="Use the mean of the patch tokens, or the class token."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder for the result and kept features; runs/COMMAND-ENCODER by default."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command(short_help="Probe frozen features: linear, attentive, neighbours.")
def probe(
    encoder: What,
    train: Train,
    val: Val,
    protocol: Annotated[
        Literal["fast", "paper", "fewshot", "attentive"],
        typer.Option(help="How to probe; described above."),
    ] = "fast",
    block: Block = 0,
    pool: Pool = "mean",
    seeds: Annotated[int, typer.Option(min=1, help="Heads trained, each with its own seed.")] = 3,
    neighbours: Annotated[int, typer.Option(min=1, help="k of the nearest neighbours.")] = 20,
    epochs: Annotated[
        float,
        typer.Option(min=0, help="Epochs of the head. 0: 30 (fast), 110 (paper), 20 (attentive)."),
    ] = 0,
    batch: Annotated[
        int, typer.Option(min=1, help="Images per step, of paper and attentive.")
    ] = checks.BATCH,
    lr: Annotated[
        float,
        typer.Option(
            min=0, help="Peak learning rate. 0: 5e-3 (paper), 1e-3 (attentive); fast tries several."
        ),
    ] = 0,
    every_block: Annotated[
        bool, typer.Option("--every-block", help="Also probe each block by the fast protocol.")
    ] = False,
    device: Device = "auto",
    cache: Cache = None,
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Linear or attentive probe of frozen features, and nearest neighbours.

    --protocol fast: features are computed once and kept; learning rates are tried on a tenth of the
    training set; no augmentation.

    --protocol fewshot: as fast, with the labels of 1 % and 10 % of the training set: equally many
    per class, different for each seed.

    --protocol paper: AdamW 5e-3 at batch 2048, TrivialAugmentWide, erasing, MixUp or CutMix.

    --protocol attentive: a block of attention with a learned query pools the patch tokens before
    the linear layer; random crops and flips, AdamW 1e-3 at batch 2048.

    The result is probe.json; of a protocol other than fast, it is probe-PROTOCOL.json. A result of
    another encoder, set or option is not overwritten. If the command is killed, the same command
    continues from what is finished.
    """
    checks.check_protocol(protocol, lr, batch, epochs, every_block, pool)
    task = _open(encoder, train, val, block, pool, device, cache)
    from kamim.evaluate.features import cached
    from shards.files import alone
    from train.probe import linear_probe, nearest_neighbours

    folder, count = out or folder_for("probe", encoder), max(1, round(epochs)) if epochs else 30

    def features(number: int) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Of block `number`: of the set to learn on, and of that to test on."""
        sets = task.learn, task.test
        return [cached(folder, task.model, s, number, task.pool, task.device) for s in sets]

    def fast(number: int) -> dict[str, Any]:
        """Neighbours and heads of block `number`."""
        known, asked = features(number)
        near = nearest_neighbours(known, asked, task.classes, neighbours, device=task.device)
        heads = range(seeds) if protocol == "fast" or every_block else ()
        scores = [
            linear_probe(known, asked, task.classes, seed, count, device=task.device)
            for seed in heads
        ]
        found: dict[str, Any] = {"knn": round(near, 4)}
        found["top1"] = [round(score.top1, 4) for score in scores]
        found["top5"] = [round(score.top5, 4) for score in scores]
        return found | {"rates": [score.rate for score in scores]}

    path = result_for(folder, "probe", protocol="" if protocol == "fast" else protocol)
    request = task.facts() | {"protocol": protocol, "seeds": seeds, "neighbours": neighbours}
    if protocol in SUPERVISED:
        request |= {"epochs": epochs, "batch": batch, "lr": lr}
    elif protocol == "fast":
        request |= {"epochs": count}
    pooled: Pooling = "attention" if protocol == "attentive" else pool
    request |= {"every_block": every_block, "pool": pooled}
    with alone(folder):
        check_kept(path, request)
        if protocol == "fewshot":
            from kamim.evaluate.fewshot import SHARES, few_shot

            known, asked = features(task.block)
            how = seeds, neighbours, task.device
            few = [few_shot(known, asked, task.classes, share, *how) for share in SHARES]
            _report_few(request | {"few": few}, path, json_output)
            return
        row = request | fast(task.block)
        near = row["knn"]
        if protocol in SUPERVISED:
            del row["rates"]
            name = f"{protocol}-probe"
            row |= _supervised(task, name, epochs, batch, folder, range(seeds), pooled, lr)
        if every_block:
            each = [{"block": n} | fast(n) for n in range(1, task.model.blocks + 1)]
            row["by_block"] = each
        _report(row, path, json_output, f", {neighbours}-NN {near:.2%}")


@app.command()
def finetune(
    encoder: What,
    train: Train,
    val: Val,
    recipe: Annotated[
        Literal["kamim", "simmim"], typer.Option(help="KAMIM's recipe, or SimMIM's.")
    ] = "simmim",
    epochs: Annotated[
        float, typer.Option(min=0, help="Epochs. 0: as in the recipe, 100 (simmim) or 110 (kamim).")
    ] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Images per step.")] = 2048,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Decides order and augmentation.")
    ] = 0,
    device: Device = "auto",
    cache: Cache = None,
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Train the whole encoder with labels, and test it.

    --recipe simmim: learning rate in proportion to the batch (5e-3 at 2048), layer decay,
    RandAugment, drop path 0.1.

    --recipe kamim: AdamW 5e-3, TrivialAugmentWide.

    The result is finetune.json; of another recipe or seed, it is finetune-kamim-seed-1.json. A
    result of another encoder, set or option is not overwritten. If the command is killed, the same
    command continues from the last finished epoch, to the same numbers.
    """
    task = _open(encoder, train, val, 0, "mean", device, cache)
    from shards.files import alone

    task.block = task.model.blocks
    folder = out or folder_for("finetune", encoder)
    path = result_for(folder, "finetune", recipe="" if recipe == "simmim" else recipe, seed=seed)
    request = task.facts() | {"recipe": recipe, "seed": seed, "epochs": epochs, "batch": batch}
    with alone(folder):
        check_kept(path, request)
        seeds = range(seed, seed + 1)
        found = _supervised(task, recipe, epochs, batch, folder, seeds, task.pool)
        _report(request | found, path, json_output, "")


@dataclass(slots=True)
class _Task:
    """An encoder to evaluate, and on what."""

    encoder: str
    model: "Encoder"
    weights: str
    train: str
    val: str
    learn: "ShardSet"
    test: "ShardSet"
    classes: int
    block: int
    pool: Literal["mean", "cls"]
    device: "torch.device"

    def facts(self) -> dict[str, Any]:
        """What a result stands beside."""
        return {
            "encoder": self.encoder,
            "weights": self.weights,
            "block": self.block,
            "blocks": self.model.blocks,
            "pool": self.pool,
            "train": self.train,
            "val": self.val,
            "samples": [len(self.learn), len(self.test)],
            "sets": [each.manifest.fingerprint for each in (self.learn, self.test)],
        }


def _open(
    encoder: str,
    train: str,
    val: str,
    block: int,
    pool: Literal["mean", "cls"],
    device: str,
    cache: Path | None,
) -> _Task:
    """The task of a command, checked before any work."""
    from shards.progress import waiting
    from train.request import check_device, count_classes

    check_encoders([encoder])
    check_device(device)
    learn, test = _open_sets([train, val], cache)
    classes = count_classes({train: learn, val: test})
    with waiting(f"loading PyTorch and {encoder}"):
        from kamim.evaluate.encoder import load_encoder
        from kamim.evaluate.features import hash_of
        from train.setup import find_device

        where = find_device(device)
        model = load_encoder(encoder, where)
    if learn.manifest.source["sha256"] == test.manifest.source["sha256"]:
        same = f"warning: {train} and {val} hold the same images"
        print(f"{same}: scores will be too good; name another VAL", file=sys.stderr)
    if block > model.blocks:
        raise UserError(f"--block {block}: {encoder} has {model.blocks}")
    block, weights = block or model.default_block, hash_of(model)
    return _Task(encoder, model, weights, train, val, learn, test, classes, block, pool, where)


def _open_sets(places: list[str], cache: Path | None) -> "list[ShardSet]":
    """The sets in folders or at URLs. UserError if `cache` is missing, or is for none of them."""
    import shards
    from shards.remote.storage import is_url

    remote = [where for where in places if is_url(where)]
    if remote and cache is None:
        raise UserError(f"{remote[0]} needs --cache: a folder on a fast local disk, for copies")
    if cache is not None and not remote:
        raise UserError(f"--cache {cache} is for shards at a URL; {places[0]} is a folder")
    return [shards.open(where, cache=cache if where in remote else None) for where in places]


def _supervised(
    task: _Task,
    name: str,
    epochs: float,
    batch: int,
    folder: Path,
    seeds: range,
    pool: "Pooling",
    lr: float = 0,
) -> dict[str, list[float]]:
    """Top-1 and top-5 of each seed's run by the recipe `name`, each in a folder of its own."""
    from copy import deepcopy

    import torch

    from kamim.evaluate.supervised import Classifier, recipe_for, train_supervised

    batch = min(batch, len(task.learn))  # rates are those of the batch that there is
    recipe = recipe_for(name, task.model.is_swin, batch, epochs, lr)
    same = {"encoder": task.encoder, "block": task.block, "pool": pool}
    same |= {"weights": task.weights}  # a run that was trained on has others by the same name
    found: dict[str, list[float]] = {"top1": [], "top5": []}
    for seed in seeds:
        torch.manual_seed(seed)
        model = deepcopy(task.model)
        classifier = Classifier(model, task.block, pool, task.classes, recipe)
        classifier.to(task.device)
        run = folder / f"{name}-seed-{seed}"
        scores = train_supervised(
            classifier, recipe, task.learn, task.test, run, seed, task.device, same
        )
        for key, values in found.items():
            values.append(scores[key])
    return found


def _keep(row: dict[str, Any], path: Path, json_output: bool) -> None:
    from shards.files import write_atomically

    write_atomically(path, (json.dumps(row, indent=2) + "\n").encode("ascii"))
    if json_output:
        print(json.dumps(row))


def _report_few(row: dict[str, Any], path: Path, json_output: bool) -> None:
    _keep(row, path, json_output)
    for each in [] if json_output else row["few"]:
        top1, near = (statistics.mean(each[name]) for name in ("top1", "knn"))
        spread = f" +- {statistics.stdev(each['top1']):.2%}" if len(each["top1"]) > 1 else ""
        share = each["images"] / row["samples"][0]  # at least two per class, so it may be more
        print(
            f"{row['encoder']}, labels of {each['images']:,} images ({share:.1%}): top-1 "
            f"{top1:.2%}{spread}, nearest neighbours {near:.2%}, "
            f"{counted(len(each['top1']), 'seed')}"
        )


def _report(row: dict[str, Any], path: Path, json_output: bool, more: str) -> None:
    _keep(row, path, json_output)
    if json_output:
        return
    for each in row.get("by_block", ()):
        print(f"block {each['block']}: top-1 {statistics.mean(each['top1']):.2%}")
    count = len(row["top1"])
    spread = f" +- {statistics.stdev(row['top1']):.2%}" if count > 1 else ""
    print(
        f"{row['encoder']}, block {row['block']} of {row['blocks']}, {row['pool']}: top-1 "
        f"{statistics.mean(row['top1']):.2%}{spread}, top-5 {statistics.mean(row['top5']):.2%}"
        f"{more} of {row['samples'][1]:,}, {counted(count, 'seed')}"
    )


@app.command(short_help="Show attention, frequencies and tokens of encoders.")
def analyse(
    encoders: Annotated[
        list[str],
        typer.Argument(help="Encoders (as for probe), then the shards: a folder or a URL."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the page and the figure.")] = Path(
        "runs/analysis"
    ),
    images: Annotated[int, typer.Option(min=2, help="Frames to analyse.")] = 32,
    cache: Cache = None,
    json_output: Json = False,
) -> None:
    """Attention, frequencies, tokens and reconstructions of several encoders on one page.

    analysis.html has one column per encoder, on the same axes: attention distance beside that of
    uniform attention, tokens coloured by class, and tables. It warns if attention has collapsed.
    analysis.svg has all panels as one figure.
    """
    *names, where = encoders
    if not names:
        raise UserError("name at least one encoder, then the folder of the shards")
    check_encoders(names)
    check_installed("sklearn", "skimage")
    from shards.files import alone
    from shards.progress import waiting

    (records,) = _open_sets([where], cache)
    with waiting("loading PyTorch and the encoders"):
        import torch

        from kamim.evaluate.analyse import analyse
        from kamim.evaluate.encoder import load_encoder

        loaded = {name: load_encoder(name, torch.device("cpu")) for name in names}
    files = {name: file_of(name) for name in names if Path(name).exists()}
    ours = {name: path for name, path in files.items() if path.suffix == ".pt"}
    with alone(out):
        found, warnings = analyse(loaded, ours, records, out, images)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    page = out / "analysis.html"
    result = {"page": str(page), "warnings": warnings, "encoders": found}
    print(json.dumps(result, indent=2) if json_output else page)
