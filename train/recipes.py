"""Recipes: a name in, the full configuration of a run out. One visible difference each.

Values: KAMIM For GPUs/utils/config.py, SimMIM and MAE configs, AMT's command lines; see
docs/decisions.md where they differ.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from shards.errors import UserError
from train.words import nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the numbers of a run, beside the shards and the seed.

    model: a timm name; options: for timm beside it. size: crop side, px. batch: samples an
    optimizer step, over all processes.
    warmup: epochs. peak, floor, start: learning rates. temperature None: no weights (plain SimMIM
    or MAE). w_ps: side of a weight cell, px. area: of crops.
    mask_ratio, throw_ratio: shares of cells, of 32 px for simmim, of a patch for mae. sample_by:
    what cells are drawn by, `none` (at random), `attention`, a map of the shards, or several with
    `*` between. Before random_epochs, random_mask_ratio is masked at random and nothing thrown;
    attention is looked at then, and again every refresh_epochs.
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
    beta2: float = 0.999
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
    method: Literal["simmim", "mae"] = "simmim"
    decoder: tuple[int, int, int] = (512, 8, 16)  # of mae: width, blocks, heads
    norm_pix: bool = False  # of mae: each patch's pixels by their own mean and spread
    throw_ratio: float = 0.0
    sample_by: str = "none"
    random_epochs: float = 0.0
    random_mask_ratio: float = 0.6
    refresh_epochs: float = 40.0


BACKBONES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
}
# MAE's for ViT-B; two thirds of the encoder's width for the others, 32 a head.
DECODERS = {"vit_tiny": (128, 8, 4), "vit_small": (256, 8, 8), "vit_base": (512, 8, 16),
            "small": (96, 2, 3)}  # fmt: skip


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


def demo() -> Recipe:
    """The 312 demo photographs on two CPU cores: a small ViT at 192 px, two minutes, a picture."""
    return Recipe(
        model="vit_tiny_patch16_224",
        options={"embed_dim": 128, "depth": 4, "num_heads": 4},
        epochs=20,
        batch=16,
        warmup=2,
        peak=2e-3,
    )


def simmim(recipe: Recipe) -> Recipe:
    """The plain SimMIM ablation of `recipe`: the same run without weights."""
    return replace(recipe, temperature=None)


def mean_normalised(recipe: Recipe) -> Recipe:
    """`recipe` with weights of mean 1, not of least weight 1: the same loss scale as SimMIM's."""
    return replace(recipe, normalise="mean")


def mae(recipe: Recipe, decoder: tuple[int, int, int] = (512, 8, 16)) -> Recipe:
    """`recipe` as plain MAE (arXiv 2111.06377). Crops, flips and epochs stay, so that methods are
    compared on the same data; MAE's own crops (area from 0.2) want larger frames.
    """
    return replace(recipe, method="mae", mask_ratio=0.75, temperature=None, decoder=decoder,
                   beta2=0.95)  # fmt: skip


def sampled(recipe: Recipe, by: str) -> Recipe:
    """`recipe` with cells drawn, and some thrown, by `by` after a random phase, as AMT and FAMT.

    40 epochs and 40 between looks, as published for 200 and 400; of a short run a tenth and a half.
    """
    masked, thrown = (0.45, 0.40) if recipe.method == "mae" else (0.44, 0.26)
    first, again = (40.0, 40.0) if recipe.epochs >= 100 else (recipe.epochs / 10, recipe.epochs / 2)
    early = recipe.mask_ratio
    return replace(recipe, sample_by=by, mask_ratio=masked, throw_ratio=thrown, random_epochs=first,
                   random_mask_ratio=early, refresh_epochs=again)  # fmt: skip


def amt(recipe: Recipe) -> Recipe:
    """`recipe` with masks by attention (AMT, arXiv 2211.15362 v1)."""
    return sampled(recipe, "attention")


def famt(recipe: Recipe) -> Recipe:
    """`recipe` with masks by attention times frequency (FAMT, v3); our own frequency map."""
    return sampled(recipe, "attention*frequency")


Make = Callable[[], Recipe]


def _variants(name: str, make: Make) -> dict[str, Make]:
    """`name` and what else there is of it: KAMIM, SimMIM, MAE, and AMT and FAMT of each."""
    found = {
        name: make,
        f"{name}_simmim": lambda: simmim(make()),
        f"{name}_mean": lambda: mean_normalised(make()),
    }
    decoder = DECODERS.get(name.removesuffix("_224"))
    if decoder is None:  # a Swin: its windows need every patch
        return found
    found[f"{name}_mae"] = lambda: mae(make(), decoder)
    found[f"{name}_mae_kamim"] = lambda: replace(mae(make(), decoder), temperature=0.25)
    for base in (name, f"{name}_simmim", f"{name}_mae", f"{name}_mae_kamim"):
        found[f"{base}_amt"] = lambda plain=found[base]: amt(plain())  # type: ignore[misc]
        found[f"{base}_famt"] = lambda plain=found[base]: famt(plain())  # type: ignore[misc]
    return found


RECIPES: dict[str, Make] = {"demo": demo} | _variants("small", small)
for _name, _model in BACKBONES.items():
    RECIPES |= _variants(_name, lambda model=_model: Recipe(model=model))  # type: ignore[misc]
    RECIPES |= _variants(
        f"{_name}_224",
        lambda model=_model: Recipe(model=model, size=224),  # type: ignore[misc]
    )


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`; a timm model name gives the published recipe on that model.

    Raises UserError, with the nearest name and what there is, for any other name.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if "_patch" in name:
        return Recipe(model=name)
    raise UserError(
        f"unknown recipe {name!r}; there are demo, small, {', '.join(BACKBONES)}, these as _224, "
        "and endings for other methods, all listed by `kamim recipes`; or any timm ViT by its name"
        f"{nearest(name, RECIPES)}"
    )


def recipe_of(facts: Mapping[str, Any]) -> Recipe:
    """The recipe of a checkpoint; what an older one does not have was as the defaults are.

    Raises UserError for one of a kamim that knows more.
    """
    unknown = set(facts) - {each.name for each in fields(Recipe)}
    if unknown:
        raise UserError(f"the checkpoint's recipe has {sorted(unknown)}, of a newer kamim")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
    return Recipe(**plain)
