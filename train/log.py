"""What a run keeps of itself: a row per step in metrics.jsonl, TensorBoard and W&B.

A resumed run goes on in the same files.
"""

import json
import math
import secrets
import time
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from shards.errors import UserError
from shards.files import write_atomically
from train.metrics import METRICS, trim
from train.progress import Progress

WANDB = "wandb.txt"  # in a run's folder: the id that W&B knows it by


class Diverged(UserError):
    """The loss or a gradient is no number any more. Checkpoints are of steps before that."""


class Log:
    """Writes a run's rows. Rows from `step` on, left by a run that was killed, are dropped."""

    def __init__(self, run: Path, step: int, wandb_project: str = "", facts: Any = None) -> None:
        run.mkdir(parents=True, exist_ok=True)
        trim(run, step)
        self.file = (run / METRICS).open("a", buffering=1)
        from torch.utils.tensorboard.writer import SummaryWriter  # slow to import

        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step)
        self.wandb = _wandb(wandb_project, run, step, facts) if wandb_project else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def rows(self, rows: list[dict[str, Any]], progress: Progress) -> None:
        """Write the rows of some steps; the last carries rates, and is shown."""
        for row in rows:
            self.file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if name != "step":
                    self.board.add_scalar(name, value, row["step"])
            if self.wandb is not None:
                self.wandb.log(row, step=row["step"])
        progress.rows(rows[-1], line(rows[-1], progress.total))


class Window:
    """The steps since the last rows, their numbers still on the device, and the clock.

    seconds: of training before it. share: of the devices' peak that an image a second takes.
    clip: most norm of a gradient; 0: any.
    """

    def __init__(
        self,
        seconds: float,
        batch: int,
        steps_an_epoch: float,
        ranks: int,
        share: float | None,
        clip: float,
    ) -> None:
        self.batch, self.steps_an_epoch = batch, steps_an_epoch
        self.ranks, self.share, self.clip = ranks, share, clip
        # step, what the host knows of it, [loss, mean weight, effective share, norm]
        self.pending: list[tuple[int, dict[str, float], Tensor]] = []
        self.since = self.now = time.perf_counter()
        self.begun = self.now - seconds  # when training would have, had it never paused

    def add(self, step: int, known: dict[str, float], sums: Tensor, norm: Tensor) -> None:
        """What `step` gave: `sums` are loss, mean weight and effective share. `known` are columns
        whose values need no waiting for.
        """
        self.pending.append((step, known, torch.cat([sums, norm[None]])))

    def rows(self, waited: float, damaged: int) -> list[dict[str, Any]]:
        """The rows of these steps, the last with their speed; begins anew. The one synchronisation
        of a run's steps.
        """
        rows = make_rows(self.pending, self.steps_an_epoch, self.ranks)
        self.now = time.perf_counter()
        speed = len(rows) * self.batch / (self.now - self.since)
        rows[-1] |= {"images_per_s": speed, "waiting": min(1.0, waited / (self.now - self.since))}
        rows[-1] |= {"seconds": self.seconds}
        cut = sum(row["grad_norm"] > self.clip for row in rows)
        rows[-1] |= {"clip_rate": cut / len(rows)} if self.clip else {}
        rows[-1] |= {"mfu": speed * self.share} if self.share else {}
        rows[-1] |= {"damaged": damaged} if damaged else {}
        self.pending, self.since = [], self.now
        return rows

    @property
    def seconds(self) -> float:
        """Of training up to the last rows."""
        return self.now - self.begun

    @property
    def age(self) -> float:
        """Seconds since the last rows."""
        return time.perf_counter() - self.since


def make_rows(
    pending: list[tuple[int, dict[str, float], Tensor]], steps_an_epoch: float, ranks: int
) -> list[dict[str, Any]]:
    """One row a step, with losses and weights averaged over processes. Waits for the device."""
    values = torch.stack([value for _, _, value in pending])
    if ranks > 1:
        dist.all_reduce(values)
        values /= ranks
    rows = []
    for (step, known, _), found in zip(pending, values.tolist(), strict=True):
        loss, weight, share, norm = found
        if not math.isfinite(loss + norm):
            raise Diverged(
                f"the loss is {loss} at step {step + 1}, and the norm of its gradient {norm}; "
                "lower the peak learning rate or raise the temperature"
            )
        row = {"step": step, "epoch": (step + 1) / steps_an_epoch, "loss": loss, **known}
        rows.append(row | {"grad_norm": norm, "mean_weight": weight, "effective_share": share})
    return rows


def line(row: dict[str, Any], steps: int) -> str:
    """One readable line of a row."""
    parts = [
        f"step {row['step'] + 1}/{steps}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"{row['images_per_s']:,.0f} img/s",
        f"waiting {row['waiting']:.0%}",
    ]
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.0%}")
    return "  ".join(parts)


def _wandb(project: str, run: Path, step: int, facts: Any) -> Any:
    """W&B's run. One that is resumed goes on with its curves, and no other run has its id."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package; type: pip install wandb") from None
    kept = run / WANDB
    known = kept.read_text().strip() if step and kept.exists() else ""
    number, name = known or secrets.token_hex(8), run.resolve().name
    try:
        found = wandb.init(
            project=project, id=number, name=name, resume="allow", dir=str(run), config=facts
        )
    except Exception as error:  # its own kinds, of which most are about the login
        detail = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(
            f"--wandb {project} cannot be used ({detail}); type: wandb login, or set "
            "WANDB_MODE=offline, or leave --wandb out"
        ) from None
    write_atomically(kept, f"{number}\n".encode("ascii"))
    return found
