"""Checkpoints: everything a run needs to go on, written atomically, read without unpickling.

RUN/checkpoints/step-00001234.pt hold model, a mean of its weights if
there is one, optimizer, step and what the run is. Random state is
not in them: it follows from (seed, epoch, sample) and (seed, step).
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shards import Plan
from shards.errors import UserError
from shards.files import MANIFEST, replacing, sweep, sync
from shards.records import Records
from train.metrics import FACTS
from train.recipes import Recipe, recipe_of
from train.request import Run, checkpoints_in

VERSION = 1
OURS = frozenset({"checkpoints", "pictures", "tensorboard", "wandb", "logs"})
_THEIRS = ".log .txt .out .err .md .csv .toml .yaml .yml .json .jsonl .sh .py .tmp"
THEIRS = frozenset(_THEIRS.split())  # how files end that may lie beside a run
KEEP = 2  # the newest; an older one serves if the newest was lost with its disk block
# What --epochs decides: the length, and the phases of sampling that are shares of it.
LENGTHS = ("recipe.epochs", "recipe.random_epochs", "recipe.refresh_epochs")


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as the checkpoint after `step` optimizer steps; drop all but the newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save({"version": VERSION, "step": step, **state}, file)
    except RuntimeError as error:  # torch's name for a failed write, as on a full disk
        cause = error.__context__ if isinstance(error.__context__, OSError) else None
        detail = cause.strerror if cause else str(error).splitlines()[0]
        raise OSError(
            cause and cause.errno, f"checkpoint not written ({detail})", str(path)
        ) from None
    for old in checkpoints_in(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    sweep(folder)
    return path


class Saver:
    """Writes a run's checkpoints while it goes on: from copies, by a thread, one at a time.

    On CUDA the host does not wait for the copies either. They go into pinned memory, which is kept
    for the next ones. The device makes them in the order of its work, so before the weights change
    again. A write that failed raises at the next save, or at the end. `rows`, the file of the run's
    rows, is synced first, so that a power cut leaves no checkpoint without the rows of its steps.
    """

    def __init__(
        self, folder: Path, minutes: float, device: torch.device, rows: Path | None = None
    ) -> None:
        self.folder, self.device, self.rows = folder, device, rows
        self.seconds = 60 * minutes or float("inf")
        self.saved = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._copy: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._pool.shutdown()
        if kind is None:
            self.wait()

    def late(self) -> bool:
        """Whether the last checkpoint is as old as one may be, by the clock."""
        return time.monotonic() - self.saved >= self.seconds

    def save(
        self, step: int, state: dict[str, Any], first: Callable[[], object] = lambda: None
    ) -> None:
        """Have `state` written as the checkpoint after `step` steps, once the one before is
        written. `first` is called before: a run killed in it comes here again.
        """
        self.wait()
        self.saved, cuda = time.monotonic(), self.device.type == "cuda"
        self._copy = _copied(state, self._copy, cuda)
        copied = torch.cuda.current_stream(self.device).record_event() if cuda else None

        def write() -> Path:
            if copied is not None:
                copied.synchronize()
            if self.rows:
                sync(self.rows)
            try:
                first()
            finally:  # even if its disk is full
                path = save(self.folder, step, self._copy)
            return path

        self._writing = self._pool.submit(write)

    def wait(self) -> None:
        """Return when nothing is being written. Raises what the last write raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _copied(tree: Any, into: Any, pin: bool) -> Any:
    """`tree` of dictionaries and lists with copies of its tensors, made in those of `into` if there
    are any. They are pinned, or the copies would wait for the device.
    """
    if isinstance(tree, dict):
        old = into if isinstance(into, dict) else {}
        return {key: _copied(each, old.get(key), pin) for key, each in tree.items()}
    if isinstance(tree, list):
        return [_copied(each, None, pin) for each in tree]
    if not isinstance(tree, Tensor):
        return tree
    fits = isinstance(into, Tensor) and into.shape == tree.shape and into.dtype == tree.dtype
    copy = into if fits else torch.empty_like(tree, device="cpu", pin_memory=pin)
    return copy.copy_(tree, non_blocking=True)


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return max(checkpoints_in(folder), default=None)


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


def load(path: Path) -> dict[str, Any]:
    """The state in `path`. Raises UserError if it is no checkpoint of ours, or damaged."""
    return checked(read(path), path)


def read(path: Path) -> Any:
    """What torch.save wrote into `path`, ours or not, on the CPU: an optimizer moves what it wants
    on a device, and would wait for each step's number there. Raises UserError if it is damaged.

    Only tensors and plain values are read: a file that holds anything else is refused unread.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
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


def run_facts(run: Run, records: Records, detector: str | None, plan: Plan) -> dict[str, Any]:
    """What a checkpoint belongs to: a run goes on only where all of it is equal.

    Of several sets it has all fingerprints, in their order, and the samples an epoch shows of each.
    """
    plain = asdict(run.recipe)
    recipe = {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}
    prints, mixture = [one.manifest.fingerprint for one in records.sets], plan.mixture
    windows = mixture.orders if mixture else [plan.windows] if plan.windows else []
    return {
        "recipe": recipe,
        "seed": run.seed,
        "init": run.init,
        "detector": detector or "",
        "bank": run.bank,
        "shards": prints if mixture else prints[0],
        "shares": mixture.quotas if mixture else None,
        "window": max((each.limit for each in windows if each.an_epoch > 1), default=0),
        "decode": run.decode,  # another decoder has other pixels
    }


def check_foreign(out: Path) -> None:
    """UserError if `out` holds what no run has written, but for somebody's logs and scripts."""
    if not out.is_dir() or (out / FACTS).exists():
        return
    names = {each.name for each in out.iterdir() if each.suffix not in THEIRS} - OURS
    others = sorted(name for name in names if not name.startswith((".", "scores-", "attention-")))
    if others:
        raise UserError(
            f"{out} holds other files ({', '.join(others[:3])}); name a new or empty --out"
        )


def restore(
    run: Run,
    facts: dict[str, Any],
    model: nn.Module,
    optimizer: Any,
    average: nn.Module | None = None,
) -> tuple[int, float, float]:
    """Load the newest checkpoint if asked to; returns the first step to do, the seconds of
    training that those before took, and the epochs the run was to have. `average`: of the weights.

    `facts` is given what the run was extended by: `extended`, [step, epochs before] each time; and
    `micro_batch`, the images of its forward passes.
    """
    if (run.out / MANIFEST).is_file():
        raise UserError(f"{run.out} is a set of shards; name another --out")
    path = newest(run.out / "checkpoints")
    if path is None:
        check_foreign(run.out)
        if run.extend:
            raise UserError(
                f"{run.out} holds no run to extend; leave --extend out, or name its --out"
            )
        return 0, 0.0, run.recipe.epochs
    if not run.resume:
        raise UserError(
            f"{run.out} holds a run already (to step {int(path.stem[5:])}); go on with it by "
            "--resume, or name another --out"
        )
    state = load(path)
    recipe_of(state["run"]["recipe"])  # or it is of a newer kamim
    # Fields that an older checkpoint's recipe lacks had the defaults, or were not known.
    known = asdict(Recipe(model="")) | {"correct": False} | state["run"]["recipe"]
    known = {k: list(v) if isinstance(v, tuple) else v for k, v in known.items()}
    then = {
        "window": 0,
        "shares": None,
        "init": "",
        "decode": "cpu",
        "select_detector": facts.get("select_detector"),  # earlier runs do not say it
        **state["run"],
        **{f"recipe.{k}": v for k, v in known.items()},
    }
    if not run.init and "init" in facts:  # it started long ago
        facts["init"] = then["init"]
    now = {**facts, **{f"recipe.{k}": v for k, v in facts["recipe"].items()}}
    longer = then["recipe.epochs"] != now["recipe.epochs"]
    apart = ("recipe", "recipe.micro_batch", *(LENGTHS if longer else ()))
    differing = (k for k in now if k not in apart and then.get(k) != now[k])
    changed = [f"{k} was {then.get(k)}, is {now[k]}" for k in differing]
    if changed:
        raise UserError(
            f"{path} is of another run: {'; '.join(changed[:3])}; use the same, or name another "
            "--out"
        )
    epochs, step = float(then["recipe.epochs"]), int(state["step"])
    if longer:
        check_length(run, then, now)
    extended = state["run"].get("extended", []) + ([[step, epochs]] if longer else [])
    if extended:
        facts["extended"] = extended
    if "init_sha256" in then:
        facts["init_sha256"] = then["init_sha256"]
    facts["micro_batch"] = int(state["run"].get("micro_batch", 0))
    if "fused" in optimizer.defaults:  # as the device has it, not the run before
        for group in state["optimizer"]["param_groups"]:
            group["fused"] = optimizer.defaults["fused"]
    model.load_state_dict(state["model"])
    if average is not None:
        average.load_state_dict(state["ema"])
    restore_optimizer(optimizer, state["optimizer"], path)
    return step, float(state.get("seconds", 0.0)), epochs


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Give `optimizer` the state that `path` has. UserError if its parameters are grouped apart."""
    try:
        optimizer.load_state_dict(state)
    except ValueError:
        raise UserError(
            f"{path} was written when other parameters had weight decay; go on with the kamim that "
            "wrote it, or name another --out"
        ) from None


def check_length(run: Run, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError unless a run that was to have other epochs can be extended, and is to be."""
    before, epochs = then["recipe.epochs"], now["recipe.epochs"]
    phases = [k for k in LENGTHS[1:] if then[k] != now[k]]
    what = f"{run.out} is a run of {before:g} epochs, not of {epochs:g}"
    if before > epochs:
        raise UserError(f"{what}; go on with it by --resume --epochs {before:g}")
    if phases:
        name = phases[0].removeprefix("recipe.")
        raise UserError(
            f"{what}, and its {name} of {then[phases[0]]:g} would have been {now[phases[0]]:g}: "
            f"it cannot be extended; train again with --epochs {epochs:g} and another --out"
        )
    if not run.extend:
        raise UserError(f"{what}; add --extend to train it longer, or name another --out")


def write_rows(path: Path, rows: NDArray[Any]) -> None:
    """Write what a run knows of each record, beside its checkpoints, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, durable=False) as temporary, temporary.open("wb") as file:
        np.save(file, rows)


def read_rows(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """What write_rows wrote. UserError if it is not there, or of another dtype or shape."""
    try:
        rows: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} is missing or damaged, and the run cannot go on as it was without it ({error})"
        ) from None
    if rows.dtype != dtype or rows.shape != shape:
        raise UserError(f"{path} is {rows.dtype} {rows.shape}, the run's is {dtype} {shape}")
    return rows
