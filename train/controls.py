"""Loss weights for experiments: a detector's, and controls that take one of its properties away.

A control answers what of a weight helps: its place on the image's own keypoints, on any busy part,
on some image's keypoints, or its spread alone. All are pure functions of crops and densities.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.errors import UserError
from shards.weighting import Normalise, loss_weights

SOURCES = ("detector", "uniform", "shuffled", "permuted", "inverse", "contrast")
CONSTANT = "constant:"
_FACTORS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64's


def check_source(source: str) -> None:
    """UserError unless `source` is one of SOURCES, or constant:K with K above 0."""
    number = source.removeprefix(CONSTANT)
    try:
        known = source in SOURCES or (number != source and 0 < float(number) < float("inf"))
    except ValueError:
        known = False
    if not known:
        raise UserError(f"weights {source!r} are unknown; use {', '.join(SOURCES)} or constant:26")


def control_weights(
    density: Tensor,
    images: Tensor,
    batch: Mapping[str, Any],
    *,
    source: str,
    temperature: float = 0.25,
    normalise: Normalise = "min",
) -> Tensor:
    """Loss weights [b, c, c] of crops by `source`, from a detector's `density` [b, c, c] there.

    detector: of the density itself. uniform, constant:K: of 1, of K, everywhere. shuffled: of the
    batch's next crop (as it lies in a forward pass). permuted: of the crop's own densities in other
    places, by (sample, epoch). contrast: the crop's own densities again, the highest where its
    gradient is steepest. inverse: exp(-density / T) for exp(density / T).
    images: the crops, [b, 3, S, S]. batch: samples and epochs, int64 [b], which `permuted` reads,
    and a temperature, a tensor, where it changes from step to step.
    """
    if source == "uniform" or source.startswith(CONSTANT):
        return torch.full_like(density, float(source.partition(":")[2] or 1))
    if source == "shuffled":
        density = density.roll(1, 0)
    elif source == "permuted":
        density = placed(density, noise(batch["samples"], batch["epochs"], density[0].numel()))
    elif source == "contrast":
        density = placed(density, contrast(images, density.shape[-1]))
    elif source == "inverse":
        density = -density
    return loss_weights(density, batch.get("temperature", temperature), normalise)


def placed(density: Tensor, key: Tensor) -> Tensor:
    """Each image's densities [b, c, c] in the order of `key`: the highest where `key` is."""
    order = key.flatten(1).argsort(dim=1, stable=True)
    values = density.flatten(1).sort(1).values
    return torch.empty_like(values).scatter(1, order, values).view_as(density)


def contrast(images: Tensor, cells: int) -> Tensor:
    """Mean gradient of the grey `images` [b, 3, S, S] in cells x cells parts, [b, cells, cells]."""
    grey = images.mean(1)
    down = F.pad(grey[:, 1:] - grey[:, :-1], (0, 0, 0, 1))
    along = F.pad(grey[:, :, 1:] - grey[:, :, :-1], (0, 1))
    return F.adaptive_avg_pool2d((down**2 + along**2).sqrt(), cells)


def noise(samples: Tensor, epochs: Tensor, cells: int) -> Tensor:
    """A number from -1 to 1 for each cell of each sample in its epoch, [b, cells]: splitmix64."""
    factors = [number - (1 << 64) if number >> 63 else number for number in _FACTORS]
    state = torch.zeros(len(samples), 1, dtype=torch.int64, device=samples.device)
    places = torch.arange(cells, device=samples.device)[None]
    for part in (samples[:, None], epochs[:, None], places):
        state = state + part + factors[0]  # int64 wraps, which is the point
        state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * factors[1]
        state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * factors[2]
        state = state ^ ((state >> 31) & ((1 << 33) - 1))
    return state.float() / 2**63
