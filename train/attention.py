"""The attention map: what the class token of the last block looks at, for every record.

One pass over the whole frames gives RUN/attention-STEP.npy, uint8 [records, n], which is read back
without unpickling. AMT (arXiv 2211.15362, mae-AMT): per head least to most, mean over heads.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shards import Batch
from shards.errors import UserError
from train.checkpoint import read_rows, write_rows
from train.diagnosis import is_readable, queries_and_keys
from train.distributed import Process, rows_of_all
from train.features import frames_of
from train.models import in_bf16, normalised

UNSEEN = 255  # a record that was not reached (damaged and skipped): all alike, as AMT begins


def check_attention(encoder: Any, name: str) -> None:
    """UserError unless `encoder` has a class token whose attention can be read."""
    token = getattr(encoder, "cls_token", None)
    if token is None or not hasattr(encoder, "blocks"):
        raise UserError(
            f"{name} has no class token, whose attention sample_by needs; use a ViT with one, or "
            "sample by frequency or by keypoints"
        )
    if not is_readable(encoder):
        raise UserError(f"{name}: its attention cannot be read; use one of timm's plain ViTs")


def class_attention(encoder: Any, images: Tensor) -> Tensor:
    """Attention of the class token to each patch in the last block, float32 [b, n], 0 to 1.

    Per head its least is 0 and its most 1; the mean over heads. SimMIM's loss does not reach this
    very query: it is trained as far as it is shared with the patches'.
    """
    tokens = encoder.norm_pre(encoder._pos_embed(encoder.patch_embed(images)))
    for block in encoder.blocks[:-1]:
        tokens = block(tokens)
    block = encoder.blocks[-1]
    query, key = queries_and_keys(block, tokens)
    scores = (query[:, :, :1] @ key.transpose(-2, -1))[:, :, 0] * block.attn.scale
    row = scores.float().softmax(-1)[:, :, encoder.num_prefix_tokens :]
    low, high = row.amin(-1, keepdim=True), row.amax(-1, keepdim=True)
    return ((row - low) / (high - low).clamp_min(1e-12)).mean(1)


def write_attention(
    path: Path,
    encoder: Any,
    batches: Iterable[Batch],
    count: int,
    size: int,
    process: Process,
    device: torch.device,
) -> Tensor:
    """Write the maps of all `count` records into `path`, whole or not at all. Process 0 writes.
    Returns them as they stay on `device`, uint8 [count, n].

    `batches` show each record once at least, to this process or to another; their crops and flips
    are not used. All processes return when the file is there.
    """
    rank, ranks = process.rank, process.ranks
    patches = (size // encoder.patch_embed.patch_size[0]) ** 2
    was_training = encoder.training
    encoder.eval()
    with ExitStack() as stack:
        stack.callback(encoder.train, was_training)
        stack.enter_context(torch.no_grad())
        maps = torch.full((count, patches), UNSEEN, dtype=torch.uint8, device=device)
        for frames, tensors in frames_of(batches, size, device):
            with in_bf16(device):
                found = class_attention(encoder, normalised(frames))
            levels = torch.round(found * 255).to(torch.uint8)
            rows, numbers = (rows_of_all(each, ranks) for each in (levels, tensors["samples"]))
            maps[numbers] = rows
    if rank == 0:
        write_rows(path, maps.cpu().numpy())
    if ranks > 1:
        dist.barrier()
    return maps


def read_attention(path: Path, count: int, patches: int) -> Tensor:
    """The maps in `path`, uint8 [count, patches]. UserError if they are not it."""
    return torch.from_numpy(read_rows(path, np.dtype(np.uint8), (count, patches)))
