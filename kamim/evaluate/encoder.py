"""Loads a frozen encoder from a run, a file, a folder or a name."""

from dataclasses import replace

import torch

from train.features import Encoder
from train.models import make_encoder
from train.recipes import Recipe, find_recipe, recipe_names
from train.weights import encoder_from


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
        model = make_encoder(recipe.model, recipe.size, recipe.options)
        found = Encoder(what, model, recipe.size)
    else:
        found = encoder_from(what, size)
    return replace(found, model=found.model.to(device).eval().requires_grad_(False))
