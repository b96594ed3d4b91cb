"""Checks of a request before torch is imported: a mistake need not cost seconds."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from shards.errors import UserError, install
from train.request import CONFIG, HUGGING_FACE, check_encoders, file_of

if TYPE_CHECKING:
    from shards import ShardSet

__all__ = ["CONFIG", "HUGGING_FACE", "check_encoders", "file_of"]


def check_installed(*modules: str) -> None:
    """UserError for the first of `modules` that is not there."""
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"this needs {module}, which is not installed; {install(module)}")


def folder_for(command: str, encoder: str) -> Path:
    """Where a command keeps its results without --out: runs/COMMAND-ENCODER."""
    name = Path(encoder.replace(":", "-"))
    return Path("runs") / f"{command}-{name.stem if name.suffix in ('.pt', '.bin') else name.name}"


def count_classes(sets: dict[str, "ShardSet"]) -> int:
    """The number of classes of `sets`, by folder or URL.

    Raises UserError unless all have the same two or more classes, and every label is one of them.
    """
    known: list[str] | None = None
    for where, records in sets.items():
        classes = records.manifest.classes
        if len(classes) < 2:
            raise UserError(f"{where} has {len(classes)} classes; a probe needs two or more")
        labels = records.index["label"]
        outside = labels[(labels < 0) | (labels >= len(classes))]
        if len(outside):
            raise UserError(
                f"{where}: label {int(outside[0])} is none of its {len(classes)} classes"
            )
        if known not in (None, classes):
            raise UserError(f"{' and '.join(sets)} have different classes")
        known = classes
    return len(known or ())
