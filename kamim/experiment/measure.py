"""What an encoder is worth, frozen: probes on CIFAR-10, retrieval, rank, attention, and its loss.

All on the encoder's device, in seconds: a probe is logistic regression on all features at once.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kamim.experiment.data import Labelled, Photos
from kamim.experiment.steps import Arm, Trainer, cells_of
from shards.progress import progress
from train.diagnosis import diagnose
from train.features import Encoder, tokens
from train.models import MEAN, STD
from train.probe import HELD_OUT, effective_rank, nearest_neighbours

PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
QUARTERS = ((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5))  # of a photo: crops without overlap
QUIET = partial(progress, delay=60)
WHOLE = 0.44  # side of the crop whose attention is looked at: the middle of those trained on


def measure(
    trainer: Trainer, cifar: tuple[Labelled, Labelled], held: Photos, block: int
) -> dict[str, Any]:
    """All figures of the trainer's model as it was last looked at; features are of `block`."""
    encoder = Encoder("", trainer.plain.encoder, trainer.recipe.size)
    with torch.inference_mode():
        known, asked = (features(encoder, each.images, block) for each in cifar)
    pairs = (known, cifar[0].labels), (asked, cifar[1].labels)
    found = probe(*pairs)
    with torch.inference_mode():
        classes = int(cifar[0].labels.max()) + 1
        found["knn"] = nearest_neighbours(*pairs, classes, device=known.device, bar=QUIET)
        found["rank"] = effective_rank(asked)
        found["retrieval"] = retrieval(encoder, trainer, held, block)
        found |= losses(trainer, held)
    images, _ = trainer.crops(held, *middle(held), Arm("uniform"))
    return found | {"attention": diagnose(encoder.model, images)}


def upsampled(images: Tensor, size: int) -> Tensor:
    """Normalised float32 [n, 3, size, size] of uint8 [n, h, w, 3]."""
    mean, std = (torch.tensor(each, device=images.device).view(3, 1, 1) for each in (MEAN, STD))
    pixels = images.permute(0, 3, 1, 2).float() / 255
    large = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    return (large - mean) / std


def features(encoder: Encoder, images: Tensor, block: int, batch: int = 1000) -> Tensor:
    """Mean patch tokens after `block`, float32 [n, d]; numbers even of a run that diverged."""
    parts = images.split(batch)
    means = [tokens(encoder, upsampled(part, encoder.size), block)[0].mean(1) for part in parts]
    return torch.cat(means).float().nan_to_num()


def probe(
    known: tuple[Tensor, Tensor], asked: tuple[Tensor, Tensor], steps: int = 300
) -> dict[str, float]:
    """Top-1 of logistic regression on `asked`; `chosen_on` is that on a tenth of `known`.

    Heads for all PENALTIES are fitted side by side by Adam on the whole of the other nine tenths,
    and the best of them on that tenth is read.
    """
    features, labels = known
    device, classes = features.device, int(labels.max()) + 1
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)).to(device)
    kept, rest = order.tensor_split([round(HELD_OUT * len(order))])
    mean, std = features[rest].mean(0), features[rest].std(0).clamp_min(1e-6)

    def scaled(each: Tensor) -> Tensor:
        return (each - mean) / std

    x, y = scaled(features[rest]), labels[rest].repeat(len(PENALTIES))
    heads = torch.zeros(len(PENALTIES), x.shape[1], classes, device=device, requires_grad=True)
    biases = torch.zeros(len(PENALTIES), 1, classes, device=device, requires_grad=True)
    penalties = torch.tensor(PENALTIES, device=device)
    optimizer = torch.optim.Adam([heads, biases], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logits = x @ heads + biases
        loss = F.cross_entropy(logits.flatten(0, 1), y) * len(PENALTIES)
        loss = loss + ((heads**2).sum((1, 2)) * penalties).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        right = ((scaled(features[kept]) @ heads + biases).argmax(2) == labels[kept]).float()
        scores = right.mean(1)
        best = int(scores.argmax())
        answers = (scaled(asked[0]) @ heads[best] + biases[best]).argmax(1)
        top1 = float((answers == asked[1]).float().mean())
    return {"top1": top1, "chosen_on": float(scores[best]), "penalty": PENALTIES[best]}


def retrieval(encoder: Encoder, trainer: Trainer, held: Photos, block: int) -> float:
    """Share of quarters of photos whose nearest other quarter is of the same photo."""
    count, parts = len(held.frames), []
    device = held.frames.device
    numbers = torch.arange(count, device=device)
    for top, left in QUARTERS:
        boxes = torch.tensor([[top, left, 0.5, 0.5]], device=device).expand(count, 4)
        flips = torch.zeros(count, 2, dtype=torch.bool, device=device)
        images, _ = trainer.crops(held, numbers, boxes, flips, Arm("uniform"))
        parts.append(tokens(encoder, images, block)[0].mean(1))
    whole = torch.cat(parts)
    unit = F.normalize(whole - whole.mean(0))
    alike = (unit @ unit.T).fill_diagonal_(-2)
    owners = numbers.repeat(len(QUARTERS))
    return float((owners[alike.argmax(1)] == owners).float().mean())


def middle(held: Photos) -> tuple[Tensor, Tensor, Tensor]:
    """(samples, boxes, flips) of the central crop of each photo."""
    count, device = len(held.frames), held.frames.device
    begin = (1 - WHOLE) / 2
    boxes = torch.tensor([[begin, begin, WHOLE, WHOLE]], device=device).expand(count, 4)
    flips = torch.zeros(count, 2, dtype=torch.bool, device=device)
    return torch.arange(count, device=device), boxes, flips


def losses(trainer: Trainer, held: Photos, masks: int = 4) -> dict[str, float]:
    """The loss on photos kept out, plain and weighted by FAST, mean over the same few masks."""
    samples, boxes, flips = middle(held)
    number = (trainer.recipe.size // trainer.recipe.cell) ** 2
    generator = torch.Generator().manual_seed(0)
    images, weights = trainer.crops(held, samples, boxes, flips, Arm())
    sums = {"held_loss": 0.0, "held_loss_fast": 0.0}
    model: Any = trainer.plain
    for _ in range(masks):
        order = torch.rand(len(samples), number, generator=generator).argsort(1)
        cells = cells_of(order.to(samples.device), trainer.recipe)
        output = model(images, *cells)
        for name, by in (("held_loss", None), ("held_loss_fast", weights)):
            sums[name] += float(model.loss(output, images, cells, by)) / masks
    return sums
