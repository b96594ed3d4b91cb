"""The encoder of a checkpoint as safetensors that timm loads unchanged.

The file's metadata says how to make the model.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from shards.errors import UserError
from shards.files import write_atomically
from train import checkpoint
from train.models import encoder_options


def encoder_state(state: dict[str, Any]) -> dict[str, Any]:
    """The encoder's tensors of a loaded checkpoint, by timm's names."""
    prefix = "encoder."
    return {
        name.removeprefix(prefix): tensor.contiguous()
        for name, tensor in state["model"].items()
        if name.startswith(prefix)
    }


def write_tensors(tensors: dict[str, Tensor], path: Path, facts: dict[str, str]) -> None:
    """Write `tensors` and `facts` as a .safetensors file that appears when it is whole.

    Costs a copy of them in memory: the library's own way to a file leaves a nameless one behind
    when it is killed.
    """
    write_atomically(path, save(tensors, facts))


def export(source: Path, target: Path) -> str:
    """Write the encoder of checkpoint `source` to `target`; returns the line that loads it.

    Raises UserError if `source` is no checkpoint or `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists; name another file or remove it")
    state = checkpoint.load(source)
    recipe = state["run"]["recipe"]
    options = encoder_options(recipe["model"], recipe["size"], recipe["options"])
    metadata = {"model": recipe["model"], "options": json.dumps(options), "format": "pt"}
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(encoder_state(state), target, metadata)
    arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
    return f"timm.create_model({recipe['model']!r}, {arguments})"
