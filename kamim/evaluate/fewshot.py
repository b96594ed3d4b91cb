"""Probes with few labels: a share of the training set, equally many per class."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.rng import Purpose, mix
from train.probe import linear_probe, nearest_neighbours

SHARES = (0.01, 0.10)
STEPS, BATCH = 300, 1024  # of a head, at least; images of a step at most


def few(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """The numbers of a `share` of the images with `labels`, int64, in their order.

    As many of each class, 2 at least, or all it has: a pure function of labels and seed. A larger
    share of the same seed has them all.
    """
    count = max(2, round(share * len(labels) / classes))
    drawn = torch.from_numpy(mix(Purpose.FEW, seed, np.arange(len(labels))).argsort())
    of_each = [drawn[labels[drawn] == each][:count] for each in range(classes)]
    return torch.cat(of_each).sort().values


def few_shot(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    share: float,
    seeds: int,
    neighbours: int,
    device: torch.device,
) -> dict[str, Any]:
    """linear_probe and nearest_neighbours on a share of `train`, of so many seeds."""
    row: dict[str, Any] = {"share": share, "images": 0, "top1": [], "top5": [], "knn": []}
    for seed in range(seeds):
        chosen = few(train[1], share, classes, seed)
        known = train[0][chosen], train[1][chosen]
        epochs = max(30, -(-STEPS // -(-len(chosen) // BATCH)))
        score = linear_probe(known, val, classes, seed, epochs, BATCH, device)
        near = nearest_neighbours(known, val, classes, neighbours, device=device)
        row["images"] = len(chosen)
        for name, value in (("top1", score.top1), ("top5", score.top5), ("knn", near)):
            row[name].append(round(value, 4))
    return row
