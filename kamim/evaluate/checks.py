"""Checks of a request before torch is imported: a mistake need not cost seconds."""

from importlib.util import find_spec
from pathlib import Path

from shards.errors import UserError, install

NAMED = ("timm", "random")
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")
CONFIG = "config.json"  # what a folder of either has beside it


def check_encoders(encoders: list[str]) -> None:
    """UserError if one of `encoders` is neither a file, a run nor a name."""
    for encoder in encoders:
        kind, _, name = encoder.partition(":")
        if kind not in NAMED:
            file_of(encoder)
        elif not name:
            raise UserError(f"{encoder!r} names no model; give {kind}:vit_base_patch16_224, say")


def check_installed(*modules: str) -> None:
    """UserError for the first of `modules` that is not there."""
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"this needs {module}, which is not installed; {install(module)}")


def file_of(encoder: str) -> Path:
    """The file of an encoder: a run's newest checkpoint, or the tensors in a folder for
    from_pretrained. Raises UserError if there is none.
    """
    path = Path(encoder)
    if path.is_dir():
        published = [path / name for name in HUGGING_FACE if (path / name).is_file()]
        saved = published or sorted((path / "checkpoints").glob("step-*.pt"))
        if not saved:
            raise UserError(f"{encoder} holds no checkpoint; train first with `kamim pretrain`")
        return saved[0] if published else saved[-1]
    if not path.is_file():
        raise UserError(f"{encoder} is no file, run folder, timm:NAME or random:NAME")
    return path


def folder_for(command: str, encoder: str) -> Path:
    """Where a command keeps its results without --out: runs/COMMAND-ENCODER."""
    name = Path(encoder.replace(":", "-"))
    return Path("runs") / f"{command}-{name.stem if name.suffix in ('.pt', '.bin') else name.name}"
