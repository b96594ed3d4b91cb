"""The encoder of a checkpoint as others load it unchanged: one file, or a folder with a card.

A file's metadata says how to make the model, a folder's config.json.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor

from shards.errors import UserError
from shards.files import check_local, write_atomically
from train import checkpoint
from train.card import card
from train.huggingface import config_of, from_timm
from train.metrics import FACTS
from train.models import MEAN, STD, encoder_options, make_encoder

Form = Literal["safetensors", "timm", "hf"]


def encoder_state(state: dict[str, Any], part: str = "model") -> dict[str, Any]:
    """The encoder's tensors of a loaded checkpoint, by timm's names; of its `ema` if it has one."""
    prefix = "encoder."
    return {
        name.removeprefix(prefix): tensor.contiguous()
        for name, tensor in state[part].items()
        if name.startswith(prefix)
    }


def write_tensors(tensors: dict[str, Tensor], path: Path, facts: dict[str, str]) -> None:
    """Write `tensors` and `facts` as a .safetensors file that appears when it is whole.

    Costs a copy of them in memory: the library's own way to a file leaves a nameless one behind
    when it is killed.
    """
    write_atomically(path, save(tensors, facts))


def export(source: Path, target: Path, to: Form = "safetensors", ema: bool = False) -> str:
    """Write the encoder of checkpoint `source` to `target`; returns the line that loads it.

    ema: the moving average of its weights. Raises UserError if `source` is no checkpoint or has no
    average, or if `target` exists, or if its ending is not that of `to`.
    """
    check_local(target)
    if target.exists():
        if (target / FACTS).exists():
            raise UserError(f"{target} is a run; name the run first, then a new place to write to")
        kind = "file" if to == "safetensors" else "folder"
        raise UserError(f"{target} exists; name another {kind} or remove it")
    if to == "safetensors" and target.suffix != ".safetensors":
        raise UserError(
            f"{target} does not end in .safetensors; for a folder add --to timm or --to hf"
        )
    if to != "safetensors" and target.suffix == ".safetensors":
        raise UserError(f"--to {to} writes a folder, and {target} is a file's name; give another")
    state = checkpoint.load(source)
    recipe = state["run"]["recipe"]
    if ema and "ema" not in state:
        raise UserError(
            f"{source} has no moving average of the model's weights; train with --set ema=0.9999"
        )
    tensors = encoder_state(state, "ema" if ema else "model")
    options = encoder_options(recipe["model"], recipe["size"], recipe["options"])
    target.parent.mkdir(parents=True, exist_ok=True)
    if to == "safetensors":
        metadata = {"model": recipe["model"], "options": json.dumps(options), "format": "pt"}
        write_tensors(tensors, target, metadata)
        arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"timm.create_model({recipe['model']!r}, {arguments})"
    model = make_encoder(recipe["model"], recipe["size"], recipe["options"])
    model.load_state_dict(tensors)
    if to == "timm":
        line = f"timm.create_model('local-dir:{target}', pretrained=True)"
    else:
        line = f"transformers.AutoModel.from_pretrained('{target}', add_pooling_layer=False)"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch) / target.name  # it appears when it is whole
        if to == "timm":
            _save_timm(model, options, folder)
        else:
            _save_huggingface(model, recipe["size"], Path(scratch), folder)
        text = card(state, source, target.name, line.replace(str(target), target.name), to, ema)
        readme = folder / "README.md"
        readme.write_text(text, encoding="utf-8")
        for path in folder.iterdir():  # safetensors writes files that nobody else may read
            path.chmod(readme.stat().st_mode)
        shutil.move(folder, target)
    return line


def _save_timm(model: Any, options: dict[str, Any], folder: Path) -> None:
    """timm's own layout, without a head; it says where one would be, so that timm can add it."""
    from timm.models import save_for_hf

    size = options["img_size"]
    own = {"input_size": (3, size, size), "mean": MEAN, "std": STD, "num_classes": 0}
    own |= {"crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bilinear"}
    kept = {name: model.pretrained_cfg[name] for name in ("architecture", "classifier")}
    model.pretrained_cfg = {**kept, **own}
    arguments = {name: value for name, value in options.items() if name != "num_classes"}
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)


def _save_huggingface(model: Any, size: int, scratch: Path, folder: Path) -> None:
    """transformers' own layout, of whatever version, by way of the published names of a ViT."""
    from transformers import ViTImageProcessor, ViTModel

    if not hasattr(model, "blocks"):
        raise UserError("this is no ViT; its tensors have no names in Hugging Face's; --to timm")
    (scratch / "config.json").write_text(json.dumps(config_of(model)), encoding="utf-8")
    write_tensors(from_timm(model.state_dict()), scratch / "model.safetensors", {"format": "pt"})
    ViTModel.from_pretrained(scratch, add_pooling_layer=False).save_pretrained(folder)
    side = {"height": size, "width": size}
    ViTImageProcessor(size=side, image_mean=MEAN, image_std=STD).save_pretrained(folder)
