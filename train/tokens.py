"""Images as patches, and an encoder on some of them only: what is not taken costs nothing.

In: normalised images, indices of patches, a timm ViT. Out: tokens with their positions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.errors import UserError


def patchify(images: Tensor, patch: int) -> Tensor:
    """Patches [b, n, 3 * patch**2] of `images` [b, 3, S, S], row by row; pixels by channel, row,
    column, as a convolution's weights have them.
    """
    side = images.shape[-1] // patch
    split = images.unflatten(3, (side, patch)).unflatten(2, (side, patch))
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Images [b, 3, S, S] of patches [b, n, 3 * patch**2]."""
    side = round(patches.shape[1] ** 0.5)
    split = patches.unflatten(2, (-1, patch, patch)).unflatten(1, (side, side))
    return split.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [b, k] of `tokens` [b, n, d], as [b, k, d]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))


def check_tokens(encoder: Any, name: str) -> None:
    """UserError unless `encoder` can be run on some of its patches."""
    if hasattr(encoder, "layers"):
        raise UserError(f"{name}: Swin's windows need every patch; none can be left out, use a ViT")
    if not isinstance(getattr(encoder, "pos_embed", None), Tensor):
        raise UserError(f"{name} has no absolute positions; patches cannot be left out of it")


def embed(encoder: Any, patches: Tensor) -> Tensor:
    """The encoder's patch embedding of some patches, [b, k, d]: its convolution as a product."""
    stem = encoder.patch_embed
    tokens: Tensor = stem.norm(F.linear(patches, stem.proj.weight.flatten(1), stem.proj.bias))
    return tokens


def encode(encoder: Any, tokens: Tensor, index: Tensor) -> Tensor:
    """What the encoder makes of `tokens` [b, k, d] at patches `index` [b, k], [b, prefix + k, d].

    As timm's forward_features with the other patches left out.
    """
    prefix = [t for t in (encoder.cls_token, getattr(encoder, "reg_token", None)) if t is not None]
    count = sum(t.shape[1] for t in prefix)
    # Some models have no position for class and register tokens.
    ahead = 0 if encoder.no_embed_class else count
    positions = encoder.pos_embed
    tokens = tokens + take(positions[:, ahead:].expand(len(tokens), -1, -1), index)
    if prefix:
        first = torch.cat(prefix, dim=1)
        first = first + positions[:, :ahead] if ahead else first
        tokens = torch.cat([first.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
    out: Tensor = encoder.norm(encoder.blocks(encoder.norm_pre(encoder.pos_drop(tokens))))
    return out


def sincos(side: int, width: int) -> Tensor:
    """Sine and cosine positions of side x side patches, float32 [side**2, width] (MAE util)."""
    if width % 4:
        raise UserError(f"a width of {width} is no multiple of 4, which sin-cos positions need")
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    along = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([along.sin(), along.cos()], dim=1)
    columns, rows = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1).float()
