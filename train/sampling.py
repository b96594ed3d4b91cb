"""Which cells of an image are masked, thrown and visible: one draw without replacement.

In: weights of cells, noise. Out: cell numbers in the order drawn, and how many of them are what.
As AMT (arXiv 2211.15362, mae-AMT and simmim-AMT): first masked, then thrown, the rest visible.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from shards.errors import UserError
from shards.rng import Purpose, mix

LEAST = 1e-20  # a weight of 0 comes after all others, and takes part in a full order

Method = Literal["simmim", "mae"]


def counts(cells: int, mask: float, throw: float, method: Method) -> tuple[int, int, int]:
    """(masked, thrown, visible) of `cells` by the shares `mask` and `throw`.

    Rounded as published: MAE's down, the two together; SimMIM's up, each. Raises UserError if no
    cell is left to mask or to see.
    """
    if method == "mae":
        masked = int(cells * mask)
        thrown = int(cells * (mask + throw) + 1e-9) - masked
    else:
        masked, thrown = (math.ceil(cells * share - 1e-9) for share in (mask, throw))
    visible = cells - masked - thrown
    if masked < 1 or thrown < 0 or visible < 1:
        raise UserError(
            f"of {cells} cells, {mask:g} masked and {throw:g} thrown are {masked} and {thrown}, "
            f"and leave {visible} visible; at least one must be masked and one visible"
        )
    return masked, thrown, visible


def races(seed: int, step: int, batch: int, cells: int) -> Tensor:
    """Exponential noise of a step's whole batch, float32 [batch, cells], on the CPU.

    A pure function of (seed, step): every process draws all of it and takes its part, and every
    device gets the same.
    """
    generator = torch.Generator().manual_seed(int(mix(Purpose.RACE, seed, step)) >> 1)
    return -torch.log1p(-torch.rand(batch, cells, generator=generator))


def drawn(noise: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cell numbers, int64 [b, cells], in the order in which they are drawn without replacement.

    Each draw takes a cell with a chance in proportion to its weight among those left: the one whose
    exponential `noise` over its weight is least. weights: [b, cells], at least 0, of any scale;
    None: all alike. Any weights give a full order.
    """
    if weights is not None:
        noise = noise / weights.float().clamp_min(LEAST)
    return noise.argsort(dim=1, stable=True)
