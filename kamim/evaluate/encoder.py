"""A frozen encoder from whatever holds one, and the tokens of any of its blocks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.models import make_encoder
from train.recipes import Recipe, find_recipe, recipe_names
from train.weights import encoder_from


@dataclass(frozen=True, slots=True)
class Encoder:
    """A timm ViT or Swin without a head, in evaluation mode; `size` is the image side in px."""

    title: str
    model: Any
    size: int

    @property
    def is_swin(self) -> bool:
        return hasattr(self.model, "layers")

    @property
    def blocks(self) -> int:
        """Blocks of a ViT, stages of a Swin."""
        return len(self.model.layers if self.is_swin else self.model.blocks)

    @property
    def default_block(self) -> int:
        """The published probe's: block 8 of 12, two thirds of any ViT; a Swin's last stage."""
        return self.blocks if self.is_swin else max(1, round(self.blocks * 2 / 3))


def load_encoder(what: str, device: torch.device, size: int = 192) -> Encoder:
    """The encoder that `what` names. `size` is for timm models, which come in any.

    what: a run folder or .pt checkpoint of ours; a .safetensors of `kamim export` or of Hugging
    Face's ViT (or its .bin, or the folder of either, or timm's); `timm:NAME` with timm's weights;
    `random:NAME` without, of a model or a recipe. Raises UserError, in one line, if it is none of
    these or its tensors do not fit.
    """
    kind, _, name = what.partition(":")
    torch.manual_seed(0)  # the same random weights each time
    if kind == "random":
        known = name in recipe_names()
        recipe = find_recipe(name) if known else Recipe(model=name, size=size)
        model, size = make_encoder(recipe.model, recipe.size, recipe.options), recipe.size
    else:
        model, size = encoder_from(what, size)
    return Encoder(what, model.to(device).eval().requires_grad_(False), size)


def tokens(
    encoder: Encoder, images: Tensor, block: int, norm: bool = True
) -> tuple[Tensor, Tensor]:
    """(patch tokens [b, n, d], class token [b, d]) after `block`, counted from 1.

    After the last block, the final norm is applied unless `norm` is false; a Swin's class token is
    its mean token.
    """
    model = encoder.model
    last = norm and block == encoder.blocks
    options = {"indices": [block - 1], "norm": last, "stop_early": True, "intermediates_only": True}
    if encoder.is_swin:
        (out,) = model.forward_intermediates(images, **options)
        patches = out.flatten(2).transpose(1, 2)
        return patches, patches.mean(1)
    options |= {"output_fmt": "NLC", "return_prefix_tokens": True}
    ((patches, prefix),) = model.forward_intermediates(images, **options)
    return patches, prefix[:, 0] if prefix.shape[1] else patches.mean(1)
