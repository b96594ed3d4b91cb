"""Features of every record of a set, computed once and kept in a file.

The file is used again only for the very same set, encoder, block and pooling.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kamim.evaluate.encoder import Encoder, tokens
from shards import Plan, ShardSet, crop_frames, to_device
from shards.errors import UserError
from shards.progress import progress
from train.export import write_tensors
from train.models import normalised

Pool = Literal["mean", "cls"]


def whole_frames(
    records: ShardSet, plan: Plan, first: int, last: int, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """(whole frames float32 [b, 3, size, size] of 0 to 255, labels [b]) of steps first to last - 1.

    Squeezed without antialias, as the published validation does it.
    """
    for batch, tensors in to_device(records.loader(plan, first, last, device=device.type), device):
        count = len(batch.labels)
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device).expand(count, 4)
        flips = torch.zeros(count, 2, dtype=torch.bool, device=device)
        yield crop_frames(tensors["frames"], boxes, flips, size), tensors["labels"]


def extract(
    encoder: Encoder,
    records: ShardSet,
    block: int,
    pool: Pool,
    device: torch.device,
    batch: int = 256,
) -> tuple[Tensor, Tensor]:
    """(features float32 [N, d], labels int64 [N]) in the order of the set, on the CPU.

    Images are the whole frames at the encoder's size, as the published validation has them.
    """
    order = Plan(len(records), batch, in_order=True)
    found, labels = [], []
    bar = progress(f"features of {records.folder.name}", len(records))
    with bar, torch.inference_mode():
        for frames, theirs in whole_frames(records, order, 0, order.steps(), encoder.size, device):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                patches, cls = tokens(encoder, normalised(frames), block)
            found.append((patches.mean(1) if pool == "mean" else cls).float().cpu())
            labels.append(theirs.cpu().clone())
            bar.update(len(frames))
    return torch.cat(found), torch.cat(labels)


def cached(
    folder: Path,
    encoder: Encoder,
    records: ShardSet,
    block: int,
    pool: Pool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """As `extract`, kept in `folder` so that a run that was killed does not do it again."""
    name = hashlib.sha256()
    name.update(f"{records.manifest.fingerprint} {encoder.size} {block} {pool}".encode())
    for key, tensor in encoder.model.state_dict().items():
        name.update(key.encode())
        name.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    path = folder / f"features-{name.hexdigest()[:20]}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        features, labels = extract(encoder, records, block, pool, device)
        write_tensors({"features": features, "labels": labels}, path, {"format": "pt"})
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); remove it, and it is made again") from None
    return tensors["features"], tensors["labels"]
