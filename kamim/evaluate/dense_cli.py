"""`kamim dense`: segmentation from an encoder's patch tokens."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from kamim.evaluate.checks import check_kept, folder_for, result_for
from kamim.evaluate.cli import Block, Device, Json, Out, What, app
from shards.errors import UserError
from train.request import check_encoders


@app.command(short_help="Segment images by frozen patch tokens (mIoU).")
def dense(
    encoder: What,
    train: Annotated[Path, typer.Argument(help="Folder with images/ and masks/ to train on.")],
    val: Annotated[Path, typer.Argument(help="Folder with images/ and masks/ to test on.")],
    by: Annotated[
        Literal["knn", "linear"],
        typer.Option(help="Classify patches by nearest patches, or by a linear head."),
    ] = "knn",
    neighbours: Annotated[int, typer.Option(min=1, help="k of the nearest patches.")] = 20,
    block: Block = 0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Decides the patches that are kept, and the head."),
    ] = 0,
    device: Device = "auto",
    out: Out = None,
    json_output: Json = False,
) -> None:
    """Segmentation from frozen patch tokens: mean intersection over union (mIoU) on masks.

    The mask of images/a/b.jpg is masks/a/b.png: the class number of each pixel, 255 for none.
    Images and masks are squeezed to the encoder's size; mIoU is over pixels of that size.

    The result is dense.json; by a linear head or of another seed, it is dense-linear-seed-1.json. A
    result of another encoder, set or option is not overwritten.
    """
    from shards.files import alone, write_atomically
    from shards.progress import waiting
    from train.request import check_device

    check_encoders([encoder])
    check_device(device)
    with waiting(f"loading PyTorch and {encoder}"):
        from kamim.evaluate import dense as work
        from kamim.evaluate.encoder import load_encoder
        from kamim.evaluate.features import hash_of
        from train.probe import votes_of_nearest
        from train.setup import find_device

        known, asked = work.list_pairs(train), work.list_pairs(val)
        where = find_device(device)
        model = load_encoder(encoder, where)
    if block > model.blocks:
        raise UserError(f"--block {block}: {encoder} has {model.blocks}")
    block, folder = block or model.default_block, out or folder_for("dense", encoder)
    path = result_for(folder, "dense", by="" if by == "knn" else by, seed=seed)
    row = {"encoder": encoder, "weights": hash_of(model), "block": block, "by": by, "seed": seed}
    row |= {"train": str(train), "val": str(val), "images": [len(known), len(asked)]}
    row |= {"sets": [work.fingerprint(pairs) for pairs in (known, asked)]}
    row |= {"neighbours": neighbours} if by == "knn" else {}
    with alone(folder):
        check_kept(path, row)
        tokens, labels = work.collect(model, known, block, seed, where)
        classes = int(labels.max()) + 1
        if by == "knn":
            guess = votes_of_nearest(tokens, labels, classes, neighbours)
        else:
            guess = work.by_head(tokens, labels, classes, seed)
        counts = work.segment(model, asked, block, guess, where)
        ious = work.intersections_over_unions(counts)
        if not ious:
            raise UserError(f"no pixel of {val} has a class; are all its masks {work.NONE}?")
        mean = sum(ious.values()) / len(ious)
        right = (counts.diagonal().sum() / counts.sum()).item()
        row |= {"patches": len(labels)}
        row |= {"miou": round(mean, 4), "pixels_right": round(right, 4), "iou": ious}
        write_atomically(path, (json.dumps(row, indent=2) + "\n").encode("ascii"))
    line = f"{encoder}, block {block} of {model.blocks}, {by}: mIoU {mean:.2%} of {len(ious)} "
    print(json.dumps(row) if json_output else f"{line}classes, {right:.2%} of pixels right")
