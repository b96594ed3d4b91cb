"""A frozen encoder from whatever holds one."""

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor, nn

from kamim.evaluate.checks import CONFIG, HUGGING_FACE, file_of
from kamim.evaluate.huggingface import is_huggingface, options_of, to_timm
from shards.errors import UserError
from train import checkpoint
from train.export import encoder_state
from train.features import Encoder
from train.models import make_encoder
from train.recipes import Recipe, find_recipe, nearest, recipe_names


def load_encoder(what: str, device: torch.device, size: int = 192) -> Encoder:
    """The encoder that `what` names. `size` is for timm models, which come in any.

    what: a run folder or .pt checkpoint of ours; a .safetensors of `kamim export` or of Hugging
    Face's ViT (or its .bin, or the folder of either); `timm:NAME` with timm's weights;
    `random:NAME` without, of a model or a recipe. Raises UserError, in one line, if it is none of
    these or its tensors do not fit.
    """
    kind, _, name = what.partition(":")
    if kind in ("timm", "random"):
        torch.manual_seed(0)  # the same random weights each time
        if kind == "timm":
            model = _from_timm(name, size)
        else:
            known = name in recipe_names()
            recipe = find_recipe(name) if known else Recipe(model=name, size=size)
            size = recipe.size
            model = make_encoder(recipe.model, size, recipe.options)
        return Encoder(what, model.to(device).eval().requires_grad_(False), size)
    model, side = _from_file(file_of(what))
    return Encoder(what, model.to(device).eval().requires_grad_(False), side)


def _from_timm(name: str, size: int) -> Any:
    """timm's model with its weights, from Hugging Face or from the copy that is here."""
    if not timm.is_model(name):
        near = nearest(name, timm.list_models()) or "; see https://huggingface.co/timm"
        raise UserError(f"timm has no model {name!r}{near}")
    # Its client tries for a minute before it says that there is no network.
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, img_size=size)
    except TypeError:
        raise UserError(f"timm's {name!r} takes no img_size; use a ViT or Swin") from None
    except Exception as error:  # the client's, httpx's and timm's own kinds
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"the weights of timm:{name} are not on this machine and {constants.ENDPOINT} does "
                "not answer; connect once, or name a file in place of them"
            ) from None
        line = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        raise UserError(f"the weights of timm:{name} do not load ({line})") from None


def _answers(url: str) -> bool:
    """Whether there is a server, whatever it says."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _from_file(path: Path) -> tuple[nn.Module, int]:
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
            with safetensors.safe_open(path, "pt") as file:
                facts = file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is no sound .safetensors file: {error}") from None
        if is_huggingface(tensors):
            return _from_huggingface(tensors, path, facts.get("config"))
        if not {"model", "options"} <= set(facts):
            raise UserError(f"{path} does not say what it is of; `kamim export` writes that")
        options = json.loads(facts["options"])
        size = int(options.pop("img_size"))
        for known in ("num_classes", "window_size"):
            options.pop(known, None)
        return fitted(make_encoder(facts["model"], size, options), tensors, path), size
    plain = checkpoint.read(path)
    if isinstance(plain, dict) and is_huggingface(plain):
        return _from_huggingface(plain, path)
    state = checkpoint.checked(plain, path)
    recipe = state["run"]["recipe"]
    model = make_encoder(recipe["model"], recipe["size"], recipe["options"])
    return fitted(model, encoder_state(state), path), int(recipe["size"])


def _from_huggingface(
    tensors: dict[str, Tensor], path: Path, config: str | None = None
) -> tuple[nn.Module, int]:
    """`config` is the text of its config.json; by default that beside it is read, if any."""
    beside = path.parent / CONFIG
    if config is None and path.name in HUGGING_FACE and beside.is_file():
        config = beside.read_text(encoding="utf-8")
    try:
        options, size, eps = options_of(tensors, json.loads(config or "{}"))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds no whole Hugging Face ViT ({type(error).__name__}: {error})"
        ) from None
    model = make_encoder("vit_base_patch16_224", size, options)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return fitted(model, to_timm(tensors), path), size


def fitted(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> nn.Module:
    """`model` with `tensors`. UserError, naming the first that does not fit."""
    wanted = model.state_dict()
    wrong = [
        f"{name} is {tuple(tensors[name].shape) if name in tensors else 'missing'}, the model's is "
        f"{tuple(wanted[name].shape) if name in wanted else 'missing'}"
        for name in sorted(set(wanted) | set(tensors))
        if name not in wanted or name not in tensors or wanted[name].shape != tensors[name].shape
    ]
    if wrong:
        raise UserError(f"{path} is of another architecture: {wrong[0]} ({len(wrong)} such)")
    model.load_state_dict(tensors)
    return model
