"""The losses.

SimMIM's masked L1 and MAE's masked MSE, with KAMIM's weight on each patch: arXiv 2407.13873,
KAMIM vit.py.
"""

import math

from torch import Tensor


def masked_l1(
    reconstruction: Tensor, images: Tensor, mask: Tensor, weights: Tensor | None = None
) -> Tensor:
    """sum(|x - x_hat| * w * m) / (sum(m) + 1e-5) / 3 over the batch, as a scalar.

    reconstruction, images: [b, 3, S, S], normalised. mask: bool [b, g, g], True where masked.
    weights: [b, c, c] or None for SimMIM's own loss; weights of one give the same number.
    """
    error = (images.float() - reconstruction.float()).abs()
    factor = mask.float()
    if weights is not None:
        grown, masked = on_one_grid(weights, factor)
        factor = masked * grown
    count, part = factor.shape[-1], images.shape[-1] // factor.shape[-1]
    # One pass over the pixels: weights and mask meet on their cells, not at full size.
    split = error.unflatten(3, (count, part)).unflatten(2, (count, part))
    total = (split * factor[:, None, :, None, :, None]).flatten(4, 5).flatten(2, 3).sum()
    masked_pixels = mask.float().sum() * (images.shape[-1] // mask.shape[-1]) ** 2
    return total / (masked_pixels + 1e-5) / 3


def on_one_grid(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`weights` [b, c, c] and `mask` [b, g, g] on the coarsest grid that has both, [b, n, n]."""
    cells = math.lcm(weights.shape[-1], mask.shape[-1])
    return _grown(weights, cells), _grown(mask, cells)


def effective_share(weights: Tensor, mask: Tensor) -> Tensor:
    """(sum w)**2 / (n sum w**2) of the n masked parts of each image, mean of the images: 1 where
    weights are alike, 1 / n where one part has all of it.

    weights: [b, c, c]. mask: bool [b, g, g], True where masked.
    """
    grown, masked = on_one_grid(weights, mask)
    of_image = (grown * masked).flatten(1)
    squares = masked.flatten(1).sum(1) * (of_image**2).sum(1)
    return (of_image.sum(1) ** 2 / squares).mean()


def _grown(cells: Tensor, count: int) -> Tensor:
    """`cells` [b, c, c] repeated to [b, count, count]."""
    times = count // cells.shape[-1]
    return cells.repeat_interleave(times, 1).repeat_interleave(times, 2) if times > 1 else cells


def masked_mse(
    output: Tensor,
    patches: Tensor,
    masked: Tensor,
    weights: Tensor | None = None,
    norm_pix: bool = False,
) -> Tensor:
    """MAE's mean squared error over the pixels of masked patches, by KAMIM's weights if given.

    output: [b, m, 3 p**2]. patches: [b, n, 3 p**2] of the images. masked: int64 [b, m]. weights:
    [b, c, c] over the image, or None for MAE's own loss (arXiv 2111.06377, models_mae.py); weights
    of one give the same number. norm_pix: targets by each patch's mean and spread.
    """
    target = take(patches.float(), masked)
    if norm_pix:
        mean, spread = target.mean(2, keepdim=True), target.var(2, keepdim=True)
        target = (target - mean) / (spread + 1e-6).sqrt()
    error = (output.float() - target) ** 2
    if weights is None:
        return error.mean()
    side = math.isqrt(patches.shape[1])
    cells = math.lcm(side, weights.shape[-1])
    per = cells // side  # weight cells along a patch
    grown = _grown(weights, cells).unflatten(2, (side, per)).unflatten(1, (side, per))
    of_patch = take(grown.transpose(2, 3).flatten(3).flatten(1, 2), masked)  # [b, m, per**2]
    patch = math.isqrt(patches.shape[2] // 3)
    split = error.unflatten(2, (3, per, patch // per, per, patch // per))
    return (split.mean((2, 4, 6)).flatten(2) * of_patch).mean()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """The rows `index` [b, k] of `tokens` [b, n, d], as [b, k, d]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))
