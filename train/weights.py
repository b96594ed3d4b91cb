"""An encoder's weights from whatever holds them."""

import hashlib
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import safetensors
import timm
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor, nn

from shards.errors import UserError, nearest
from train import checkpoint
from train.export import encoder_state
from train.features import Encoder
from train.huggingface import is_huggingface, options_of, to_timm
from train.models import MEAN, STD, Colour, encoder_options, is_known, make_encoder
from train.request import CONFIG, HUGGING_FACE, PREPROCESSOR, file_of


def encoder_from(what: str, size: int, fit: bool = False) -> Encoder:
    """timm:NAME at `size` px or the next size of whole patches, or the encoder of a file, as it is
    trained.

    fit: with the windows that a recipe's Swin has. Raises UserError, in one line, if `what` is none
    of these or its tensors do not fit.
    """
    kind, _, name = what.partition(":")
    if kind != "timm":
        path = file_of(what)
        return Encoder(what, *_from_file(path), *_colours_beside(path))
    model = _from_timm(name, size, fit)
    missing = -size % model.patch_embed.patch_size[0]
    if missing:  # or no patch would see the last pixels; read anew, to resize its positions once
        size += missing
        model = _from_timm(name, size, fit)
    return Encoder(what, model, size, *_colours(model.pretrained_cfg, ("mean", "std"), what))


def start_from(what: str, encoder: nn.Module, size: int) -> str:
    """Give `encoder`, for crops of `size` px, the weights of `what`; returns their SHA-256.

    Raises UserError if they are of another size or architecture.
    """
    found = encoder_from(what, size, fit=True)
    if found.size != size:
        raise UserError(
            f"{what} is for {found.size} px, the recipe's crops have {size}; "
            f"--set size={found.size}"
        )
    theirs, ours = _unseen(found.model), _unseen(encoder)
    if theirs != ours:
        raise UserError(f"{what} has {theirs}, the recipe's model {ours}: heads and activations")
    tensors = found.model.state_dict()
    fitted(encoder, tensors, Path(what))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _unseen(encoder: Any) -> list[tuple[int, str]]:
    """What shapes do not show of a ViT's blocks, each kind once: heads and activation."""
    found = set()
    for block in getattr(encoder, "blocks", ()):
        heads = getattr(getattr(block, "attn", None), "num_heads", 0)
        found.add((heads, type(getattr(getattr(block, "mlp", None), "act", None)).__name__))
    return sorted(found)


def timm_facts(path: Path) -> dict[str, str]:
    """What `kamim export --to timm` wrote beside the file `path`, as its metadata has it, if so."""
    config = _config_beside(path)
    if not {"architecture", "pretrained_cfg"} <= set(config):
        return {}
    try:
        size = {"img_size": config["pretrained_cfg"]["input_size"][1]}
        options = {**config.get("model_args", {}), **size}
        if options.get("in_chans") == 3:  # timm writes it into its own folders
            del options["in_chans"]
    except (LookupError, TypeError) as error:
        raise UserError(
            f"{path.parent / CONFIG} says no size ({error!r}); fetch it again"
        ) from None
    return {"model": str(config["architecture"]), "options": json.dumps(options)}


def _colours_beside(path: Path) -> tuple[Colour, Colour]:
    """(mean, deviation) by which the model of file `path` takes images; if none is said, ours."""
    if timm_facts(path):
        own = _config_beside(path)["pretrained_cfg"]
        return _colours(own, ("mean", "std"), str(path.parent / CONFIG))
    said, where = _config_beside(path, PREPROCESSOR), path.parent / PREPROCESSOR
    if not said and path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            said, where = _object((file.metadata() or {}).get("preprocessor", "{}"), path), path
    if said.get("do_normalize") is False:
        said = said | {"image_mean": 0, "image_std": 1}
    mean, deviation = _colours(said, ("image_mean", "image_std"), str(where))
    if said.get("do_rescale") is False:  # they are of pixels up to 255
        mean, deviation = (tuple(n / 255 for n in each) for each in (mean, deviation))
    return mean, deviation


def _colours(said: dict[str, Any], names: tuple[str, str], where: str) -> tuple[Colour, Colour]:
    """(mean, deviation) that are `said` by `names`, ours where they are not."""
    found: list[Colour] = []
    for name, ours in zip(names, (MEAN, STD), strict=True):
        value = ours if said.get(name) is None else said[name]
        numbers = value if isinstance(value, list | tuple) else [value] * 3
        least = 1e-6 if ours is STD else -1e6
        sound = [type(each) in (int, float) and least <= each <= 1e6 for each in numbers]
        if sound != [True] * 3:
            kind = "finite numbers above 0" if ours is STD else "finite numbers"
            raise UserError(
                f"{where}: {name} is {repr(value)[:80]}, not 3 {kind}; correct it, or fetch the "
                "file again"
            )
        found.append(tuple(map(float, numbers)))
    return found[0], found[1]


def _config_beside(path: Path, name: str = CONFIG) -> dict[str, Any]:
    """What stands beside the file `path` of a folder for from_pretrained; {} if nothing does."""
    beside = path.parent / name
    if path.name not in HUGGING_FACE or not beside.is_file():
        return {}
    try:
        return _object(beside.read_text(encoding="utf-8"), beside)
    except UnicodeDecodeError:
        raise UserError(f"{beside} is no JSON object; fetch it again") from None


def _object(text: str, where: Path) -> dict[str, Any]:
    """The JSON object that `text` is."""
    try:
        return dict(json.loads(text).items())
    except (AttributeError, RecursionError, ValueError):
        raise UserError(f"{where} holds no JSON object; fetch it again") from None


def _from_timm(name: str, size: int, fit: bool) -> Any:
    """timm's model with its weights, from Hugging Face or from the copy that is here. `fit`: with
    the windows that a recipe has.
    """
    if not timm.is_model(name):
        near = nearest(name, timm.list_models()) or "; see https://huggingface.co/timm"
        raise UserError(f"timm has no model {name!r}{near}")
    # Its client tries for a minute before it says that there is no network.
    constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT)
    try:
        options = encoder_options(name, size) if fit else {"img_size": size, "num_classes": 0}
        encoder = timm.create_model(name, pretrained=True, **options)
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
    if not is_known(encoder):
        raise UserError(f"timm's {name!r} is no ViT or Swin; name one")
    return encoder


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
        facts = timm_facts(path) | facts
        if not {"model", "options"} <= set(facts):
            raise UserError(f"{path} does not say what it is of; `kamim export` writes that")
        try:
            options = dict(json.loads(facts["options"]))
            size = int(options.pop("img_size"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: its options are no arguments of a model ({type(error).__name__}: {error})"
            ) from None
        options.pop("num_classes", None)
        return fitted(make_encoder(facts["model"], size, options), tensors, path), size
    plain = checkpoint.read(path)
    if isinstance(plain, dict) and is_huggingface(plain):
        return _from_huggingface(plain, path)
    state = checkpoint.checked(plain, path)
    try:
        recipe, tensors = state["run"]["recipe"], encoder_state(state)
        size, options = int(recipe["size"]), dict(recipe["options"])
        model = make_encoder(recipe["model"], size, options)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no whole checkpoint ({type(error).__name__}: {error}); "
            f"{checkpoint.instead(path)}"
        ) from None
    return fitted(model, tensors, path), size


def _from_huggingface(
    tensors: dict[str, Tensor], path: Path, config: str | None = None
) -> tuple[nn.Module, int]:
    """`config` is the text of its config.json; by default that beside it is read, if any."""
    beside = {} if config else _config_beside(path)
    try:
        known = dict(json.loads(config)) if config else beside
        options, size, eps = options_of(tensors, known)
        renamed = to_timm(tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} holds no whole Hugging Face ViT ({type(error).__name__}: {error})"
        ) from None
    model = make_encoder("vit_base_patch16_224", size, options)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return fitted(model, renamed, path), size


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
