"""Checks of a request before torch is imported: a mistake need not cost seconds."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shards.errors import UserError, install
from train.request import HUGGING_FACE

BATCH = 2048  # of kamim probe
SUPERVISED = ("paper", "attentive")  # its protocols that train on images, not on kept features
MOVED = ("encoder", "train", "val")  # of a request: names of what has hashes


def check_installed(*modules: str) -> None:
    """UserError for the first of `modules` that is not there."""
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"this needs {module}, which is not installed; {install(module)}")


def folder_for(command: str, encoder: str) -> Path:
    """Where a command keeps its results without --out: runs/COMMAND-ENCODER; of a run's checkpoint
    runs/COMMAND-RUN-STEP, of Hugging Face's model.safetensors that of its folder.
    """
    path = Path(encoder.replace(":", "-"))
    path = path.parent if path.name in HUGGING_FACE else path
    path = path if path.name.strip(".") else path.resolve()  # of . and .. too
    run = f"{path.parent.parent.resolve().name}-" if path.parent.name == "checkpoints" else ""
    name = path.stem if path.suffix in (".pt", ".bin") else path.name
    return Path("runs") / f"{command}-{run}{name}"


def result_for(folder: Path, command: str, **unusual: object) -> Path:
    """The file of a result in `folder`: COMMAND.json, with what is `unusual` in its name.

    A value "" or 0 is the usual one; a number's name is said with it: finetune-kamim-seed-1.json.
    """
    said = [f"{k}-{v}" if isinstance(v, int) else str(v) for k, v in unusual.items() if v]
    return folder / f"{'-'.join([command, *said])}.json"


def check_kept(path: Path, request: dict[str, Any]) -> None:
    """UserError if `path` holds the result of another request, which would be lost.

    Weights and sets are compared by their hashes, and may have moved.
    """
    if not path.exists():
        return
    try:
        kept = dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (AttributeError, ValueError):
        kept = {}
    if "weights" not in kept:  # no result, or one of an older kamim
        raise UserError(
            f"{path} does not say of what weights it is; move it, or name another --out"
        )
    for name in (name for name in request if name not in MOVED):
        if kept.get(name) != request[name]:
            hashed = name in ("weights", "sets")
            other = f"other {name}" if hashed else f"{name} {kept.get(name)}, not {request[name]}"
            raise UserError(f"{path} holds a result of {other}; move it, or name another --out")


def check_protocol(
    protocol: str, lr: float, batch: int, epochs: float, every_block: bool, pool: str
) -> None:
    """UserError if an option of `kamim probe` is not of the `protocol`."""
    for option, given, those in (
        ("--lr", lr, SUPERVISED),
        ("--batch", batch != BATCH, SUPERVISED),
        ("--epochs", epochs, ("fast", *SUPERVISED)),
        ("--every-block", every_block, ("fast", *SUPERVISED)),
        ("--pool cls", pool == "cls", ("fast", "fewshot", "paper")),
    ):
        if given and protocol not in those:
            words = f"{', '.join(those[:-1])} and {those[-1]}"
            raise UserError(f"{option} is of the protocols {words}; leave it out")
