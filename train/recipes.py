"""Recipes: a name in, the full configuration of a run out. One visible difference each.

Values: KAMIM For GPUs/utils/config.py and SimMIM configs; see docs/decisions.md where they differ.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the numbers of a run, beside the shards and the seed.

    model: a timm name; options: for timm beside it. size: crop side, px. batch: samples an
    optimizer step, over all processes.
    warmup: epochs. peak, floor, start: learning rates. temperature None: plain SimMIM, no weights.
    w_ps: side of a weight cell, px. mask_ratio of 32-px cells. area: of crops.
    """

    model: str
    options: dict[str, int] = field(default_factory=dict)
    size: int = 192
    epochs: float = 100
    batch: int = 2048
    warmup: float = 10
    peak: float = 8e-4
    floor: float = 1e-5
    start: float = 1e-6
    weight_decay: float = 0.05
    decay_all: bool = True  # published: norms, biases and positions decay too; SimMIM: not
    clip: float = 1.0
    mask_ratio: float = 0.6
    temperature: float | None = 0.25
    w_ps: int = 8
    normalise: Literal["min", "mean"] = "min"
    area: tuple[float, float] = (0.67, 1.0)
    vertical: float = 0.5  # probability of a vertical flip: published; SimMIM has none
    micro_batch: int = 256  # most samples a forward pass, of one process


BACKBONES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
}


def small() -> Recipe:
    """CIFAR-10 on two CPU cores: a ViT of 0.9 million parameters at 96 px, minutes an epoch."""
    return Recipe(
        model="vit_tiny_patch16_224",
        options={"embed_dim": 128, "depth": 4, "num_heads": 4},
        size=96,
        epochs=10,
        batch=256,
        warmup=1,
        peak=1.5e-3,
    )


def simmim(recipe: Recipe) -> Recipe:
    """The plain SimMIM ablation of `recipe`: the same run without weights."""
    return replace(recipe, temperature=None)


def mean_normalised(recipe: Recipe) -> Recipe:
    """`recipe` with weights of mean 1, not of least weight 1: the same loss scale as SimMIM's."""
    return replace(recipe, normalise="mean")


RECIPES: dict[str, Callable[[], Recipe]] = {"small": small}
for _name, _model in BACKBONES.items():
    RECIPES[_name] = lambda model=_model: Recipe(model=model)  # type: ignore[misc]
    RECIPES[f"{_name}_224"] = lambda model=_model: Recipe(model=model, size=224)  # type: ignore[misc]
for _name, _make in list(RECIPES.items()):
    RECIPES[f"{_name}_simmim"] = lambda make=_make: simmim(make())  # type: ignore[misc]
    RECIPES[f"{_name}_mean"] = lambda make=_make: mean_normalised(make())  # type: ignore[misc]


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`; a timm model name gives the published recipe on that model.

    Raises ValueError, listing what there is, for any other name.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if "_patch" in name:
        return Recipe(model=name)
    raise ValueError(
        f"unknown recipe {name!r}; there are {', '.join(RECIPES)}, or any timm ViT by its name"
    )
