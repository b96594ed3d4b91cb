"""Checks of what a user typed, before torch is imported: a misspelt word need not cost seconds.

In: an encoder, a device, sets of shards. Out: the file of an encoder, the number of classes, or a
UserError that says what to give.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError

if TYPE_CHECKING:
    from shards import ShardSet

NAMED = ("timm", "random")
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")
CONFIG = "config.json"  # what a folder of either has beside it


def check_words(encoders: list[str], device: str = "auto") -> None:
    """UserError if one of `encoders` is no file, run or name, or `device` is none we know."""
    for what in encoders:
        kind, _, name = what.partition(":")
        if kind not in NAMED:
            file_of(what)
        elif not name:
            raise UserError(f"{what!r} names no model; give {kind}:vit_base_patch16_224, say")
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise UserError(f"--device {device!r} is unknown; give auto, cpu or cuda")


def check_installed(packages: dict[str, str]) -> None:
    """UserError for the first of `packages` (module: what pip calls it) that is not there."""
    for module, name in packages.items():
        if find_spec(module) is None:
            raise UserError(f"this needs {name}, which is not installed; type: pip install {name}")


def file_of(what: str) -> Path:
    """The file that holds the encoder `what`: of a run its newest checkpoint, of a folder for
    from_pretrained its tensors. Raises UserError if there is none.
    """
    path = Path(what)
    if path.is_dir():
        published = [path / name for name in HUGGING_FACE if (path / name).is_file()]
        saved = published or sorted((path / "checkpoints").glob("step-*.pt"))
        if not saved:
            raise UserError(f"{what} holds no checkpoint; train first with `kamim pretrain`")
        return saved[0] if published else saved[-1]
    if not path.is_file():
        raise UserError(f"{what} is no file, run folder, timm:NAME or random:NAME")
    return path


def folder_for(command: str, encoder: str) -> Path:
    """Where a command keeps its results if nothing else is said: runs/COMMAND-ENCODER."""
    name = Path(encoder.replace(":", "-"))
    return Path("runs") / f"{command}-{name.stem if name.suffix in ('.pt', '.bin') else name.name}"


def check_labels(records: "ShardSet", other: "ShardSet | None" = None) -> int:
    """The number of classes; UserError if a label is none of them or `other` has other classes."""
    classes = records.manifest.classes
    if len(classes) < 2:
        raise UserError(f"{records.folder} has {len(classes)} classes; a probe needs two or more")
    labels = records.index["label"]
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise UserError(
            f"{records.folder}: label {int(outside[0])} is none of its {len(classes)} classes"
        )
    if other is not None and other.manifest.classes != classes:
        raise UserError(f"{records.folder} and {other.folder} have different classes")
    return len(classes)
