"""Features of every record of a set, computed once and kept in a file.

The file is used again only for the very same set, encoder, block and pooling.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shards import Plan, ShardSet
from shards.errors import UserError
from train.export import write_tensors
from train.features import Encoder, Pool, features_of
from train.models import MEAN, STD


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
    batches = records.loader(order, 0, order.steps(), device=device.type)
    title = f"features of {records.folder.name}"
    return features_of(encoder, batches, len(records), block, pool, device, title)


def add_weights(digest: Any, encoder: Encoder) -> None:
    """Have a hash of hashlib take in all that decides an encoder's features: its weights, what it
    normalises images by, and the settings of its layers that no tensor's shape shows.
    """
    if (encoder.mean, encoder.std) != (MEAN, STD):
        digest.update(repr((encoder.mean, encoder.std)).encode())
    for name, module in encoder.model.named_modules():  # not their repr: another torch has another
        settings = [getattr(module, key, None) for key in ("num_heads", "eps", "approximate")]
        digest.update(f"{name} {type(module).__name__} {settings}".encode())
    for key, tensor in encoder.model.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())


def hash_of(encoder: Encoder) -> str:
    """sha256 (hex) of what `add_weights` takes in."""
    digest = hashlib.sha256()
    add_weights(digest, encoder)
    return digest.hexdigest()


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
    add_weights(name, encoder)
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
