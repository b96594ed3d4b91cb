"""Checkpoints: everything a run needs to go on, written atomically, read without unpickling.

In: model, optimizer, step and what the run is. Out: RUN/checkpoints/step-00001234.pt, the newest
few. Random state is not in them: it follows from (seed, epoch, sample) and (seed, step).
"""

from pathlib import Path
from typing import Any

import torch

from shards.errors import UserError
from shards.files import replacing, sweep

VERSION = 1
KEEP = 2  # the newest; an older one serves if the newest was lost with its disk block


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint after `step` optimizer steps; drop all but the newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"version": VERSION, "step": step, **state}, file)
    except RuntimeError as error:  # so torch calls a write that failed, as on a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else None
        detail = cause.strerror if cause else str(error).splitlines()[0]
        raise OSError(
            cause and cause.errno, f"checkpoint not written ({detail})", str(path)
        ) from None
    for old in sorted(folder.glob("step-*.pt"))[:-KEEP]:
        old.unlink(missing_ok=True)
    sweep(folder)
    return path


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return max(folder.glob("step-*.pt"), default=None)


def chosen(what: Path) -> Path:
    """`what` itself, or the newest checkpoint of the run in the folder `what`.

    Raises UserError if there is no `what`, or it is a folder that holds none.
    """
    if not what.exists():
        raise UserError(f"there is no {what}; name a run of `kamim pretrain`, or its checkpoint")
    path = newest(what / "checkpoints") if what.is_dir() else what
    if path is None:
        raise UserError(f"{what} holds no checkpoint; train first with `kamim pretrain`")
    return path


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The state in `path`. Raises UserError if it is no checkpoint of ours, or damaged."""
    return checked(read(path, device), path)


def read(path: Path, device: torch.device | str = "cpu") -> Any:
    """What torch.save wrote into `path`, ours or not. Raises UserError if it is damaged.

    Only tensors and plain values are read: a file that holds anything else is refused unread.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception:  # zip, pickle and torch each raise their own, in lines of advice
        raise UserError(
            f"{path} is no sound checkpoint and was not loaded; {instead(path)}"
        ) from None


def checked(state: Any, path: Path) -> dict[str, Any]:
    """`state`, read from `path`, if it is a checkpoint of ours; else UserError."""
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise UserError(
            f"{path} is not a checkpoint of version {VERSION} of kamim; {instead(path)}"
        )
    return state


def instead(path: Path) -> str:
    """What to do about `path`, which cannot be loaded."""
    if path.parent.name == "checkpoints":
        return "remove it, and the checkpoint before it is used"
    return "name a run, a checkpoint of it, or a file of `kamim export`"
