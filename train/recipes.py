"""Recipes: a name in, the full configuration of a run out.

A name is a base and endings, each of which changes one thing: vit_base_224_mae_famt.
Values: KAMIM For GPUs/utils/config.py, SimMIM and MAE configs, AMT's command lines; see
docs/decisions.md where they differ.
"""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from shards.errors import UserError, nearest

# What a run has beside its recipe; train/recipe_file.py keeps them in a table of their own.
OPTIONS = ("seed", "init", "detector", "bank", "window", "decode", "deterministic", "out", "device")
EXAMPLES = {dict: ", as {depth = 2}; one of its values as options.depth=2", tuple: ", as 0.5,1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the numbers of a run, except the shards and the seed.

    The text of a field is its line in docs/recipes.md and in `kamim recipes --show`.
    """

    model: Annotated[str, "timm name of the encoder: a ViT or Swin"]
    options: Annotated[dict[str, Any], "arguments for timm, such as `depth`"] = field(
        default_factory=dict
    )
    size: Annotated[int, "side of a crop, px"] = 192
    epochs: Annotated[float, "passes over the shards"] = 100
    batch: Annotated[int, "images per optimizer step, over all processes"] = 2048
    warmup: Annotated[float, "epochs in which the learning rate rises to its peak"] = 10
    peak: Annotated[float, "peak learning rate"] = 8e-4
    floor: Annotated[float, "learning rate of the last step (cosine decay)"] = 1e-5
    start: Annotated[float, "learning rate of the first step"] = 1e-6
    optimizer: Annotated[str, "adamw, or another name of timm.optim: muon, lion, sgd ..."] = "adamw"
    optimizer_options: Annotated[
        dict[str, Any], "arguments for the optimizer, such as `betas` or `momentum`"
    ] = field(default_factory=dict)
    beta2: Annotated[float, "beta2 of AdamW"] = 0.999
    weight_decay: Annotated[float, "weight decay of the optimizer"] = 0.05
    decay_all: Annotated[
        bool, "weight decay also for norms, biases and positions, as published; SimMIM: no"
    ] = True
    clip: Annotated[float, "the gradient is clipped to this norm; 0: no clipping"] = 1.0
    ema: Annotated[
        float, "decay of a moving average of the weights, such as 0.9999; 0: no average"
    ] = 0.0
    mask_ratio: Annotated[float, "mask ratio: share of cells that are masked"] = 0.6
    cell: Annotated[int, "side of a mask cell of simmim, px; a cell of mae is a patch"] = 32
    temperature: Annotated[
        float | None, "T in the weights exp(density / T); none: no weights, plain SimMIM or MAE"
    ] = 0.25
    temperature_end: Annotated[
        float | None, "T of the last step: T changes from step to step; none: T is constant"
    ] = None
    temperature_form: Annotated[Literal["cosine", "linear"], "how T changes"] = "cosine"
    w_ps: Annotated[int, "side of a weight cell, px"] = 8
    normalise: Annotated[
        Literal["min", "mean", "batch"],
        "weights are divided by their minimum or mean per image, or by the mean of the forward "
        "pass",
    ] = "min"
    weights: Annotated[str, "source of the weights: detector, or a control (docs/masking.md)"] = (
        "detector"
    )
    correct: Annotated[
        bool,
        "correct weights that are read from a map (docs/fidelity.md); never those of controls, and "
        "never while T changes",
    ] = True
    area: Annotated[
        tuple[float, float], "least and most area of a crop, as shares of the image"
    ] = (
        0.67,
        1.0,
    )
    vertical: Annotated[float, "probability of a vertical flip; 0.5 as published, 0 in SimMIM"] = (
        0.5
    )
    micro_batch: Annotated[
        int, "most images per forward pass and process; 0: chosen automatically"
    ] = 0
    checkpoint: Annotated[
        bool, "activation checkpointing in the encoder: less memory, a third slower"
    ] = False
    method: Annotated[Literal["simmim", "mae"], "model and loss"] = "simmim"
    decoder: Annotated[tuple[int, int, int], "decoder of mae: width, blocks, heads"] = (512, 8, 16)
    norm_pix: Annotated[
        bool, "mae: each target patch is normalised by its own mean and deviation"
    ] = False
    throw_ratio: Annotated[
        float, "share of cells that are thrown away: neither masked nor visible"
    ] = 0.0
    sample_by: Annotated[
        str,
        "what masked and thrown cells are drawn by: `none` (at random), `attention`, a map of the "
        "shards, or a product such as `attention*frequency`",
    ] = "none"
    random_epochs: Annotated[
        float, "epochs at the start in which cells are masked at random and none thrown"
    ] = 0.0
    random_mask_ratio: Annotated[float, "mask ratio in these epochs"] = 0.6
    refresh_epochs: Annotated[float, "epochs between two passes that compute attention"] = 40.0
    select: Annotated[float, "share of the samples to train on; 1: all"] = 1.0
    select_by: Annotated[
        Literal["density", "loss", "weighted_loss"],
        "score by which samples are drawn: mean density, or the latest loss",
    ] = "density"
    select_power: Annotated[
        float, "power of the score; 0: draw at random; large: only the highest scores"
    ] = 1.0
    select_epochs: Annotated[
        float, "epochs between two draws; an epoch is a pass over the drawn samples"
    ] = 10.0
    bf16_residual: Annotated[
        bool, "on CUDA: keep tokens between blocks in bfloat16, embed patches by a matrix product"
    ] = False


_REDUCED = {"embed_dim": 128, "depth": 4, "num_heads": 4}  # a ViT of 0.9 million parameters

BASES = {
    # For the 312 demo photographs, on two CPU cores.
    "demo": Recipe(
        model="vit_tiny_patch16_224", options=_REDUCED, epochs=20, batch=16, warmup=2, peak=2e-3
    ),
    # CIFAR-10 on two CPU cores: minutes per epoch.
    "small": Recipe(
        model="vit_tiny_patch16_224",
        options=_REDUCED,
        size=96,
        epochs=10,
        batch=256,
        warmup=1,
        peak=1.5e-3,
    ),
    "vit_tiny": Recipe(model="vit_tiny_patch16_224"),
    "vit_small": Recipe(model="vit_small_patch16_224"),
    "vit_base": Recipe(model="vit_base_patch16_224"),
    "swin_tiny": Recipe(model="swin_tiny_patch4_window7_224"),
    "swin_base": Recipe(model="swin_base_patch4_window7_224"),
}


def at_224(recipe: Recipe) -> Recipe:
    return replace(recipe, size=224)


def simmim(recipe: Recipe) -> Recipe:
    """The plain SimMIM ablation of `recipe`: the same run without weights."""
    return replace(recipe, temperature=None)


def mean_normalised(recipe: Recipe) -> Recipe:
    """`recipe` with weights of mean 1, not of least weight 1: the same loss scale as SimMIM's."""
    return replace(recipe, normalise="mean")


def mae(recipe: Recipe) -> Recipe:
    """`recipe` as plain MAE (arXiv 2111.06377), with targets per patch and unclipped gradients.
    Crops, flips, epochs and learning rates stay, so that methods are compared on the same data.
    MAE's own crops (area from 0.2) need larger frames.

    The decoder is MAE's own for ViT-B; two thirds of a smaller encoder's width, 32 per head.
    """
    decoders = {"vit_tiny_patch16_224": (128, 8, 4), "vit_small_patch16_224": (256, 8, 8)}
    decoder = (96, 2, 3) if recipe.options == _REDUCED else decoders.get(recipe.model, (512, 8, 16))
    return replace(
        recipe,
        method="mae",
        mask_ratio=0.75,
        temperature=None,
        decoder=decoder,
        norm_pix=True,
        beta2=0.95,
        clip=0.0,
    )


def kamim(recipe: Recipe) -> Recipe:
    """`recipe` with the published weights, after an ending that left them out."""
    return replace(recipe, temperature=0.25)


def sampled(recipe: Recipe, by: str) -> Recipe:
    """`recipe` as AMT and FAMT: after a random phase, cells are drawn by `by`, and some thrown.

    The random phase has 41 epochs, and 40 lie between looks, as published for 200 and 400 epochs
    (`epoch > 40` from 0, mae-AMT models_mae.py). In a short run: a tenth and a half of the epochs.
    """
    masked, thrown = (0.45, 0.40) if recipe.method == "mae" else (0.44, 0.26)
    first, again = (41.0, 40.0) if recipe.epochs >= 100 else (recipe.epochs / 10, recipe.epochs / 2)
    return replace(
        recipe,
        sample_by=by,
        mask_ratio=masked,
        throw_ratio=thrown,
        random_epochs=first,
        random_mask_ratio=recipe.mask_ratio,
        refresh_epochs=again,
    )


def amt(recipe: Recipe) -> Recipe:
    """`recipe` with masks by attention (AMT, arXiv 2211.15362 v1)."""
    return sampled(recipe, "attention")


def famt(recipe: Recipe) -> Recipe:
    """`recipe` with masks by attention times frequency (FAMT, v3); our own frequency map."""
    return sampled(recipe, "attention*frequency")


def bf16(recipe: Recipe) -> Recipe:
    """`recipe` with less to move between blocks on CUDA; its losses differ by rounding."""
    return replace(recipe, bf16_residual=True)


# In the order in which they may follow a base: at most one of each group.
ENDINGS: tuple[dict[str, Callable[[Recipe], Recipe]], ...] = (
    {"_224": at_224},
    {"_simmim": simmim, "_mean": mean_normalised, "_mae": mae},
    {"_kamim": kamim},
    {"_amt": amt, "_famt": famt},
    {"_bf16": bf16},
)


def find_recipe(name: str) -> Recipe:
    """The recipe called `name`; a timm model name gives the published recipe on that model.

    Raises UserError, with the nearest name and what there is, for any other name.
    """
    if "_patch" in name:
        return Recipe(model=name)
    base = next((each for each in BASES if f"{name}_".startswith(f"{each}_")), "")
    recipe, rest = BASES.get(base, Recipe(model=name)), name.removeprefix(base)
    for group in ENDINGS if base else ():
        for ending, change in group.items():
            if f"{rest}_".startswith(f"{ending}_"):
                recipe, rest = change(recipe), rest.removeprefix(ending)
                break
    if rest or not base:
        raise UserError(
            f"unknown recipe {name!r}; there are {', '.join(BASES)}, the larger ones as _224, and "
            "endings for other methods, all listed by `kamim recipes`; or any timm ViT by its name"
            f"{nearest(name, recipe_names())}"
        )
    if base.startswith("swin") and (recipe.method == "mae" or recipe.throw_ratio):
        raise UserError(f"{name}: Swin's windows need every patch; none can be left out, use a ViT")
    return recipe


def changed(recipe: Recipe, words: Iterable[str]) -> Recipe:
    """`recipe` with fields as `words` say: cell=16, area=0.08,0.3 or [0.08, 0.3], temperature=none,
    options={depth = 2} (a table of TOML or JSON), options.depth=2 (that option alone).

    Raises UserError for an unknown field, or a value that is none of its kind.
    """
    kinds, changes = get_type_hints(Recipe), dict[str, Any]()
    for word in words:
        name, given, text = word.partition("=")
        table, _, option = name.partition(".")
        if option and get_origin(kinds.get(table)) is dict and given:
            before = changes.get(table, getattr(recipe, table))
            try:
                changes[table] = {**before, option: _of_toml(text)}
            except ValueError:
                raise UserError(
                    f"{word} does not fit; give a number, true, false or a word"
                ) from None
            continue
        if name in OPTIONS:
            raise UserError(f"{name} is no field of a recipe but an option of its own: --{name}")
        if name not in kinds:
            near = nearest(name, kinds) or f"; there are {', '.join(kinds)}"
            raise UserError(f"a recipe has no {name!r}{near}")
        if not given:
            raise UserError(f"{name} has no value; give {name}=VALUE")
        try:
            changes[name] = _value(text, kinds[name])
        except (ValueError, TypeError, KeyError, AttributeError):
            kind = kind_in_words(kinds[name]).replace(", none", " or none")
            kind += EXAMPLES.get(get_origin(kinds[name]), "")
            raise UserError(f"{name}={text} does not fit; it takes: {kind}") from None
    return replace(recipe, **changes)


def kind_in_words(kind: Any) -> str:
    """A type as a person says it."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return ", ".join(parts)
    if get_origin(kind) is tuple:
        return f"{len(parts)} {kind_in_words(parts[0])}s"
    if get_origin(kind) is dict:
        return "table"
    if type(None) in parts:
        return f"{kind_in_words(parts[0])}, none"
    return {bool: "true, false", str: "text", int: "whole number", float: "number"}[kind]


def _value(text: str, kind: Any) -> Any:
    """What `text` says of a field of `kind`; an error if it is none."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return parts[parts.index(text)]
    if get_origin(kind) is tuple:
        words = text.strip("[]()").split(",")
        return tuple(p(t) for p, t in zip(parts, words, strict=True))
    if get_origin(kind) is dict:
        return dict(_of_toml(text).items())
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if type(None) in parts:
        return None if text.lower() == "none" else float(text)
    return kind(text)


def _of_toml(text: str) -> Any:
    """What JSON's or TOML's value `text` says, True and False as in Python; a word without quotes
    is text. Raises ValueError for anything else.
    """
    text = text.lower() if text.lower() in ("true", "false") else text
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    with suppress(tomllib.TOMLDecodeError, RecursionError):
        found = tomllib.loads(f"value = {text}")["value"]
        if isinstance(found, str | int | float | list | dict):  # TOML has dates, too
            return found
    if not re.fullmatch(r"[A-Za-z_]\w*", text):
        raise ValueError(text)
    return text


def recipe_names() -> list[str]:
    """The names that are worth listing, base by base."""
    names = ["demo"]
    for base in list(BASES)[1:]:
        for name in [base] if base == "small" else [base, f"{base}_224"]:
            names += [name, f"{name}_simmim", f"{name}_mean"]
            if base.startswith("swin"):
                continue
            names += [f"{name}_mae", f"{name}_mae_kamim"]
            for method in ("", "_simmim", "_mae", "_mae_kamim"):
                names += [f"{name}{method}_amt", f"{name}{method}_famt"]
    return names


def recipe_of(facts: Mapping[str, Any]) -> Recipe:
    """The recipe of a checkpoint; what an older one does not have was as the defaults are.

    Raises UserError for one of a kamim that knows more.
    """
    unknown = set(facts) - {each.name for each in fields(Recipe)}
    if unknown:
        raise UserError(f"the checkpoint's recipe has {sorted(unknown)}, of a newer kamim")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}
    return Recipe(**plain)
