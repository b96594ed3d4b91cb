"""Patches of images and back, and the positions of a grid of them."""

import torch
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


def sincos(side: int, width: int) -> Tensor:
    """Sine and cosine positions of side x side patches, float32 [side**2, width] (MAE util)."""
    if width % 4:
        raise UserError(f"a width of {width} is no multiple of 4, which sin-cos positions need")
    rates = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    along = torch.arange(side, dtype=torch.float64)[:, None] * rates
    one = torch.cat([along.sin(), along.cos()], dim=1)
    columns, rows = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1).float()
