"""Segmentation from patch tokens, by nearest neighbours or a linear head.

A set is a folder with images/ and masks/. The mask of images/a/b.jpg is masks/a/b.png, of one
channel or with a palette: the class of each pixel by its number, 255 where it has none.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from preprocess import Rejected, decode_image
from shards.errors import UserError
from shards.progress import progress
from shards.rng import Purpose, mix
from train.features import Encoder, tokens
from train.models import in_bf16

NONE = 255
PATCHES = 200_000  # of the training set, at most; chosen by the seed
EPOCHS, RATE, BATCH = 20, 1e-3, 1024  # of the linear head, on patches
Pair = tuple[Path, Path]
Guess = Callable[[Tensor], Tensor]  # tokens [n, d] in, scores of the classes [n, c] out


def list_pairs(folder: Path) -> list[Pair]:
    """(image, mask) of every image of a set, in order. UserError unless there are some."""
    images, masks = folder / "images", folder / "masks"
    found = sorted(path for path in images.rglob("*") if path.is_file())
    if not found:
        raise UserError(f"{folder} has no images; lay them into {images}, their masks into {masks}")
    pairs = [(path, masks / path.relative_to(images).with_suffix(".png")) for path in found]
    for image, mask in pairs:
        if not mask.is_file():
            raise UserError(f"{image} has no mask; there is no {mask}")
    return pairs


def fingerprint(pairs: list[Pair]) -> str:
    """sha256 (hex) of the names and sizes of a set's files: enough to tell it from another set."""
    files = (f"{path.name} {path.stat().st_size}" for pair in pairs for path in pair)
    return hashlib.sha256("\n".join(files).encode()).hexdigest()


def read_pair(pair: Pair, size: int) -> tuple[Tensor, Tensor]:
    """(image float32 [3, size, size] of 0 to 255, classes int64 [size, size]), both squeezed."""
    try:
        pixels = decode_image(pair[0].read_bytes())
    except Rejected as error:
        raise UserError(f"{pair[0]} is no sound image ({error.detail}); restore it") from None
    try:
        with Image.open(pair[1]) as file:
            mask = np.asarray(file)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{pair[1]} is no sound PNG ({error}); restore it") from None
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise UserError(f"{pair[1]} is {mask.dtype} {mask.shape}; a mask has one channel of bytes")
    if mask.shape != pixels.shape[:2]:
        raise UserError(f"{pair[1]} is {mask.shape}, its image {pixels.shape[:2]}; make them alike")
    image = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    # Not INTER_NEAREST, which takes the first pixel: half a pixel beside the image.
    classes = cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
    return torch.from_numpy(image).permute(2, 0, 1).float(), torch.from_numpy(classes).long()


def read_tokens(
    encoder: Encoder, pairs: list[Pair], block: int, device: torch.device, title: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(patch tokens float32 [n, d], classes int64 [size, size]) of each pair, on the CPU."""
    with progress(title, len(pairs)) as bar:
        for pair in pairs:
            image, classes = read_pair(pair, encoder.size)
            with torch.no_grad(), in_bf16(device):
                patches, _ = tokens(encoder, encoder.normalised(image[None].to(device)), block)
            yield patches[0].float().cpu(), classes
            bar.update(1)


def patch_classes(classes: Tensor, side: int) -> Tensor:
    """The class that most pixels of each patch have, int64 [side**2]; NONE counts as a class."""
    size = len(classes) // side
    parts = classes.unflatten(1, (side, size)).unflatten(0, (side, size)).transpose(1, 2)
    return parts.flatten(2).mode(-1).values.flatten()


def collect(
    encoder: Encoder, pairs: list[Pair], block: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(tokens [p, d], classes [p]) of the patches that have a class, PATCHES of them at most."""
    found: list[Tensor] = []
    labels: list[Tensor] = []
    share = max(1, PATCHES // len(pairs))
    for number, (patches, classes) in enumerate(
        read_tokens(encoder, pairs, block, device, "patches to learn from")
    ):
        known = patch_classes(classes, round(len(patches) ** 0.5))
        drawn = mix(Purpose.FEW, seed, number, np.arange(len(known))).argsort()[:share]
        kept = torch.from_numpy(drawn)[known[drawn] != NONE]
        found.append(patches[kept])
        labels.append(known[kept])
    if not sum(map(len, labels)):
        raise UserError(f"no patch of {pairs[0][0].parent} has a class; are all masks {NONE}?")
    return torch.cat(found), torch.cat(labels)


def by_head(known: Tensor, labels: Tensor, classes: int, seed: int) -> Guess:
    """A linear head on standardised tokens, by AdamW and a cosine."""
    mean, std = known.mean(0), known.std(0).clamp_min(1e-6)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    head = nn.Linear(known.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=1e-4)
    turn = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * -(-len(known) // BATCH))
    with progress("linear head", EPOCHS * len(known)) as bar:
        for _ in range(EPOCHS):
            for part in torch.randperm(len(known), generator=order).split(BATCH):
                loss = F.cross_entropy(head((known[part] - mean) / std), labels[part])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                turn.step()
                bar.update(len(part))

    missing = torch.bincount(labels, minlength=classes) == 0  # class numbers of no patch

    def guess(patches: Tensor) -> Tensor:
        scores = head((patches - mean) / std).masked_fill(missing, -torch.inf)
        found: Tensor = scores.softmax(1)
        return found

    return guess


@torch.no_grad()
def segment(
    encoder: Encoder, pairs: list[Pair], block: int, guess: Guess, device: torch.device
) -> Tensor:
    """How many pixels of each class were taken for which, int64 [c, c]: rows are the truth.

    A class that `guess` does not know has a row and no column of hits. Scores of patches are
    enlarged bilinearly to pixels.
    """
    counts = torch.zeros(NONE, NONE, dtype=torch.int64)
    for patches, classes in read_tokens(encoder, pairs, block, device, "images to segment"):
        side = round(len(patches) ** 0.5)
        scores = guess(patches).T.unflatten(1, (side, side))[None]
        found = F.interpolate(scores, classes.shape, mode="bilinear").argmax(1)[0]
        there = classes != NONE
        places = classes[there] * NONE + found[there]
        counts += places.bincount(minlength=NONE**2).view(NONE, NONE)
    return counts


def intersections_over_unions(counts: Tensor) -> dict[int, float]:
    """Of each class that is there or was said to be, 0 to 1."""
    hits, unions = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
    return {int(n): round((hits[n] / unions[n]).item(), 4) for n in unions.nonzero().flatten()}
