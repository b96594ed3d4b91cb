"""What the model takes: images normalised by ImageNet's mean and deviation, as published."""

from torch import Tensor

from shards import ShardSet
from shards.weighting import WeightedCrops
from train.recipes import Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor) -> Tensor:
    """float32 [..., 3, H, W] of 0 to 255 by ImageNet's mean and deviation."""
    mean = images.new_tensor(MEAN).view(3, 1, 1) * 255
    std = images.new_tensor(STD).view(3, 1, 1) * 255
    return (images - mean) / std


def weighted_crops(
    recipe: Recipe, records: ShardSet, detector: str | None, bank: bool = False
) -> WeightedCrops:
    """The recipe's crops of a batch, normalised, with the weights of `detector`, if any."""
    return WeightedCrops(
        records, detector, size=recipe.size, w_ps=recipe.w_ps, temperature=recipe.temperature or 1,
        normalise=recipe.normalise, bank=bank, mean=MEAN, std=STD,
    )  # fmt: skip
