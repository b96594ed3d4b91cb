"""From a batch to what the model and the loss take: crops and weights.

In: a loader's tensors on a device, a recipe. Out: normalised crops [b, 3, S, S] and loss weights
[b, c, c], or none.
"""

import torch
from torch import Tensor

from shards import Manifest
from shards.spec import Detector
from shards.visibility import visible_cells
from shards.weighting import crop_frames, crop_maps, loss_weights, pool_counts
from train.recipes import Recipe

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as published


def find_visible(
    recipe: Recipe, manifest: Manifest, detector: Detector | None, device: torch.device
) -> Tensor | None:
    """What `detector` finds of its marks by distance from a crop's edge, float32 [cells]."""
    if detector is None:
        return None
    settings, cells = manifest.settings, recipe.size // recipe.w_ps
    share = visible_cells(detector, settings.crop, cells, settings.mark)
    return torch.from_numpy(share).float().to(device)


def normalised(images: Tensor) -> Tensor:
    """float32 [..., 3, H, W] of 0 to 255 by ImageNet's mean and deviation."""
    mean = images.new_tensor(MEAN).view(3, 1, 1) * 255
    std = images.new_tensor(STD).view(3, 1, 1) * 255
    return (images - mean) / std


def prepare(
    tensors: dict[str, Tensor], recipe: Recipe, visible: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Normalised crops [b, 3, S, S] and their weights [b, c, c], on the tensors' device.

    `visible` is what find_visible gives: with None there are no weights.
    """
    boxes, flips = tensors["boxes"], tensors["flips"]
    crops = crop_frames(tensors["frames"], boxes, flips, recipe.size)
    images = normalised(crops)
    if visible is None or recipe.temperature is None:
        return images, None
    cells = recipe.size // recipe.w_ps
    if tensors["counts"].shape[1]:
        density = pool_counts(tensors["counts"][:, 0], cells)
    else:
        density = crop_maps(tensors["maps"][:, 0], boxes, flips, cells, visible)
    return images, loss_weights(density, recipe.temperature, recipe.normalise)
