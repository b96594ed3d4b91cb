"""The loss: reconstruction, image, mask and weights in, one number out.

SimMIM's masked L1 with KAMIM's weight on each patch: arXiv 2407.13873, KAMIM vit.py.
"""

import math

import torch
from torch import Tensor

from shards.plan import mix

MASK = 3  # this hash's purpose; shards.plan has 1 and 2


def block_masks(seed: int, step: int, batch: int, cells: int, ratio: float,
                device: torch.device) -> Tensor:  # fmt: skip
    """Masks of a step's whole batch, bool [batch, cells, cells], True where hidden.

    Each hides ceil(ratio * cells**2) cells (22 of 36 at 0.6), a pure function of (seed, step)
    and the kind of device: every process draws all of them and takes its part.
    """
    generator = torch.Generator(device).manual_seed(int(mix(MASK, seed, step)) >> 1)
    noise = torch.rand(batch, cells * cells, generator=generator, device=device)
    hidden = noise.argsort(dim=1).argsort(dim=1) < math.ceil(ratio * cells * cells)
    return hidden.view(batch, cells, cells)


def masked_l1(
    reconstruction: Tensor, images: Tensor, mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """sum(|x - x_hat| * w * m) / (sum(m) + 1e-5) / 3 over the batch, as a scalar.

    reconstruction, images: [b, 3, S, S], normalised. mask: bool [b, g, g], True where hidden.
    weights: [b, c, c] or None for SimMIM's own loss; weights of one give the same number.
    """
    error = (images.float() - reconstruction.float()).abs()
    factor = mask.float()
    if weights is not None:
        cells = math.lcm(mask.shape[-1], weights.shape[-1])
        factor = _grown(factor, cells) * _grown(weights, cells)
    count, part = factor.shape[-1], images.shape[-1] // factor.shape[-1]
    # One pass over the pixels: weights and mask meet on their cells, not at full size.
    split = error.unflatten(3, (count, part)).unflatten(2, (count, part))
    total = (split * factor[:, None, :, None, :, None]).flatten(4, 5).flatten(2, 3).sum()
    hidden_pixels = mask.float().sum() * (images.shape[-1] // mask.shape[-1]) ** 2
    return total / (hidden_pixels + 1e-5) / 3


def _grown(cells: Tensor, count: int) -> Tensor:
    """`cells` [b, c, c] repeated to [b, count, count]."""
    times = count // cells.shape[-1]
    return cells.repeat_interleave(times, 1).repeat_interleave(times, 2) if times > 1 else cells
