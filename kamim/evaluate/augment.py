"""Augmentation of training with labels: each image's by (seed, epoch, sample), a step's mix by
(seed, step). The two published chains, KAMIM's and SimMIM's.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2

from shards.rng import Purpose, mix
from train.models import MEAN, STD, Colour, normalised

Augment = Literal["trivial", "rand", "none"]


def augment(
    frames: Tensor,
    samples: Tensor,
    epochs: Tensor,
    kind: Augment,
    seed: int,
    mean: Colour = MEAN,
    std: Colour = STD,
) -> Tensor:
    """`frames` (uint8 [b, 3, S, S]) augmented and normalised, float32; `samples`, `epochs` [b].

    trivial, KAMIM's: TrivialAugmentWide, then half of the images erased to black. rand, SimMIM's:
    RandAugment, and after normalising a quarter erased to noise. none: normalised alone.
    """
    if kind == "none":
        return normalised(frames.float(), mean, std)
    one = _trivial(mean, std) if kind == "trivial" else _rand(frames.shape[-1], mean, std)
    keys = mix(Purpose.AUGMENT, seed, epochs.cpu().numpy(), samples.cpu().numpy())
    found = []
    with _own_random_state():
        for frame, key in zip(frames, keys.tolist(), strict=True):
            torch.default_generator.manual_seed(key >> 1)
            found.append(one(frame))
    return torch.stack(found)


def mixed(
    images: Tensor, labels: Tensor, classes: int, mixup: float, cutmix: float, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """A step's images mixed up or cut-mixed, at random, and its soft labels [b, classes]; as they
    are where both are 0.
    """
    if not mixup and not cutmix:
        return images, F.one_hot(labels, classes).float()
    choice = v2.RandomChoice(
        [v2.MixUp(alpha=mixup, num_classes=classes), v2.CutMix(alpha=cutmix, num_classes=classes)]
    )
    with _own_random_state():
        torch.default_generator.manual_seed(int(mix(Purpose.BLEND, seed, step)) >> 1)
        found: tuple[Tensor, Tensor] = choice(images, labels)
    return found


def _trivial(mean: Colour, std: Colour) -> Callable[[Tensor], Tensor]:
    wide, erase = v2.TrivialAugmentWide(), v2.RandomErasing()
    return lambda frame: normalised(erase(wide(frame)).float(), mean, std)


def rand_augment(size: int, mean: Colour = MEAN) -> Any:
    """timm's RandAugment as SimMIM calls it for `size` px (data/data_finetune.py)."""
    options = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(round(255 * part) for part in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    change: Any = rand_augment_transform("rand-m9-mstd0.5-inc1", options)
    for each in change.ops:
        if each.name == "PosterizeIncreasing":
            each.aug_fn = posterized
    return change


def _rand(size: int, mean: Colour, std: Colour) -> Callable[[Tensor], Tensor]:
    change = rand_augment(size, mean)
    erase = v2.RandomErasing(p=0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")

    def one(frame: Tensor) -> Tensor:
        own = int(torch.randint(1 << 32, ()))
        random.seed(own)  # timm draws from the global generators
        np.random.seed(own)  # noqa: NPY002
        picture = change(Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()))
        pixels = torch.from_numpy(np.array(picture)).to(frame.device).permute(2, 0, 1)
        erased: Tensor = erase(normalised(pixels.float(), mean, std))
        return erased

    return one


def posterized(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """Each channel's first `bits`; timm asks for none at times, which Pillow refuses."""
    return picture.point(lambda level: level & (256 - 2 ** (8 - bits)))


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Leaves torch's, Python's and NumPy's global generators as they were."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
