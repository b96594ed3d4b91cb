"""Checks of a request before torch is imported: a mistake need not cost seconds."""

from importlib.util import find_spec
from pathlib import Path

from shards.errors import UserError, install


def check_installed(*modules: str) -> None:
    """UserError for the first of `modules` that is not there."""
    for module in modules:
        if find_spec(module) is None:
            raise UserError(f"this needs {module}, which is not installed; {install(module)}")


def folder_for(command: str, encoder: str) -> Path:
    """Where a command keeps its results without --out: runs/COMMAND-ENCODER; of a run's checkpoint
    runs/COMMAND-RUN-STEP.
    """
    path = Path(encoder.replace(":", "-"))
    run = f"{path.parent.parent.name}-" if path.parent.name == "checkpoints" else ""
    name = path.stem if path.suffix in (".pt", ".bin") else path.name
    return Path("runs") / f"{command}-{run}{name}"
