"""Linear probe, nearest neighbours and effective rank: what frozen features are worth."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.errors import UserError
from shards.progress import progress
from train.features import Bar

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
HELD_OUT = 0.1  # of the training set, to choose a rate or a penalty on: never on the validation set
FEWEST = 3  # training images of a linear probe: one to choose a rate on, two that have a spread
SIMILARITIES = 2**28  # float32, 1 GiB


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of the validation set, 0 to 1, and the learning rate that was chosen."""

    top1: float
    top5: float
    rate: float


def linear_probe(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    seed: int,
    epochs: int = 30,
    batch: int = 1024,
    device: torch.device | str = "cpu",
    bar: Bar = progress,
) -> Score:
    """The fast protocol: a linear head behind a BatchNorm without parameters, by AdamW and cosine.

    Heads for all RATES are trained side by side; the one best on a tenth of the training set, which
    no head was trained on, is read on the validation set. features [N, d], labels [N]. UserError if
    there are too few images.
    """
    check_images(train, val, FEWEST)
    shuffle = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train[0]), generator=shuffle)
    held = max(1, round(HELD_OUT * len(order)))
    features, labels = (tensor[order[held:]].to(device) for tensor in train)
    chosen_on = tuple(tensor[order[:held]].to(device) for tensor in train)
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    torch.manual_seed(seed)
    heads = [nn.Linear(features.shape[1], classes).to(device) for _ in RATES]
    for head in heads:
        nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    groups = [
        {"params": head.parameters(), "lr": rate, "peak": rate}
        for head, rate in zip(heads, RATES, strict=True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    steps = epochs * -(-len(features) // batch)
    step = 0
    with bar(f"heads of seed {seed}", epochs * len(features)) as shown:
        for _ in range(epochs):
            for part in torch.randperm(len(features), generator=shuffle).split(batch):
                for group in optimizer.param_groups:
                    turn = torch.cos(torch.tensor(torch.pi * step / steps)).item()
                    group["lr"] = group["peak"] * 0.5 * (1 + turn)
                x, y = (features[part] - mean) / std, labels[part]
                loss = torch.stack([F.cross_entropy(head(x), y) for head in heads]).sum()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                step += 1
                shown.update(len(part))
    with torch.inference_mode():
        held_x = (chosen_on[0] - mean) / std
        scores = [(head(held_x).argmax(1) == chosen_on[1]).float().mean().item() for head in heads]
        best = scores.index(max(scores))
        logits = heads[best]((val[0].to(device) - mean) / std)
        top = logits.topk(min(5, classes), dim=1).indices.cpu() == val[1][:, None]
    return Score(top[:, 0].float().mean().item(), top.any(1).float().mean().item(), RATES[best])


def nearest_neighbours(
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
    bar: Bar = progress,
) -> float:
    """Share of the validation set that its `k` nearest training features get right, 0 to 1.

    By `votes_of_nearest`, on `device`, 1 GiB of similarities at a time beside the training
    features. UserError if there are too few images.
    """
    check_images(train, val, 1)
    vote = votes_of_nearest(*train, classes, k, temperature, device)
    batch = max(1, min(1024, SIMILARITIES // len(train[0])))
    right = torch.zeros((), dtype=torch.int64, device=device)
    with bar("nearest neighbours", len(val[0])) as shown:
        for features, labels in zip(val[0].split(batch), val[1].split(batch), strict=True):
            right += (vote(features.to(device)).argmax(1) == labels.to(device)).sum()
            shown.update(len(features))
    return int(right) / len(val[0])


def votes_of_nearest(
    known: Tensor,
    labels: Tensor,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], Tensor]:
    """What gives, for features [n, d] on `device`, the votes of their `k` nearest of `known`
    [m, d] for each class, float32 [n, classes].

    Cosine similarity of features with the mean of `known` taken off, votes exp(similarity / T), as
    in DINO's evaluation (arXiv 2104.14294, eval_knn.py).
    """
    mean = known.mean(0).to(device)
    there, labels = F.normalize(known.to(device) - mean), labels.to(device)

    def votes(features: Tensor) -> Tensor:
        near, which = (F.normalize(features - mean) @ there.T).topk(min(k, len(there)), dim=1)
        none = torch.zeros(len(features), classes, device=device)
        return none.scatter_add_(1, labels[which], (near / temperature).exp())

    return votes


def check_images(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], fewest: int) -> None:
    """Raise UserError unless there are `fewest` training images, and one to validate on."""
    if len(train[0]) < fewest or not len(val[0]):
        raise UserError(
            f"a probe needs at least {fewest} training images and 1 of validation, not "
            f"{len(train[0])} and {len(val[0])}; give larger sets"
        )


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the singular values of centred features [n, d], as shares."""
    centred = (features - features.mean(0)).double()
    values = torch.linalg.eigvalsh((centred.T @ centred).cpu()).clamp_min(0).sqrt()
    shares = values / values.sum().clamp_min(1e-12)
    return float(torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum()))
