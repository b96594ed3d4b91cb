"""Features of every record of a set, computed once and kept in a file.

The file is used again only for the very same set, encoder, block and pooling.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

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


def frames_of(
    records: ShardSet,
    plan: Plan,
    first: int,
    last: int,
    size: int,
    device: torch.device,
    cropped: bool = False,
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """(frames float32 [b, 3, size, size] of 0 to 255, the batch's tensors) of steps first to
    last - 1.

    Whole frames, squeezed without antialias as the published validation does it, or `cropped`:
    the plan's crops.
    """
    for batch, tensors in to_device(records.loader(plan, first, last, device=device.type), device):
        boxes, flips = tensors["boxes"], tensors["flips"]
        if not cropped:
            boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device).expand(len(batch.labels), 4)
            flips = torch.zeros_like(flips)
        yield crop_frames(tensors["frames"], boxes, flips, size), tensors


def extract(
    encoder: Encoder,
    records: ShardSet,
    block: int,
    pool: Pool,
    device: torch.device,
    batch: int = 256,
) -> tuple[Tensor, Tensor]:
    """(features float32 [N, d], labels int64 [N]) in the order of the set, on the CPU.

    Images are the whole frames at the encoder's size, as the published validation has them; a
    Swin's features are those before its final norm, as in the published probe.
    """
    order = Plan(len(records), batch, in_order=True)
    found, labels = [], []
    bar = progress(f"features of {records.folder.name}", len(records))
    with bar, torch.inference_mode():
        for frames, rest in frames_of(records, order, 0, order.steps(), encoder.size, device):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                patches, cls = tokens(encoder, normalised(frames), block, not encoder.is_swin)
            found.append((patches.mean(1) if pool == "mean" else cls).float().cpu())
            labels.append(rest["labels"].cpu().clone())
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
    what = f"{records.manifest.fingerprint} {encoder.size} {block} {pool}"
    name.update((what + " without norm" * encoder.is_swin).encode())
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
