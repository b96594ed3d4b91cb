"""Pictures at the end of a run: the loss curve, and reconstructions with masks and weights."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.log import read_metrics
from train.models import MEAN, STD, Cells
from train.progress import say

PICTURES = 8  # images


def draw_loss(run: Path) -> None:
    """RUN/loss.png: loss and learning rate over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_metrics(run)
    epochs, losses = [row["epoch"] for row in rows], np.array([row["loss"] for row in rows])
    figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
    axes.plot(epochs, losses, color="#9ecae1", linewidth=0.8, label="each step")
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    axes.plot(epochs[window - 1 :], smooth, color="#08519c", label=f"mean of {window} steps")
    axes.set(xlabel="epoch", ylabel="loss", title=f"{run.name}: {losses[-1]:.4f} at the end")
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(epochs, [row["lr"] for row in rows], color="#aaaaaa", linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    figure.savefig(run / "loss.png", dpi=120)
    pyplot.close(figure)


def draw_reconstructions(
    run: Path,
    model: Any,
    images: Tensor,
    cells: Cells,
    weights: Tensor | None,
    count: int = PICTURES,
) -> None:
    """RUN/reconstructions.png: a row per image with crop, weights, what the model sees, and its
    reconstruction of what it does not see.
    """
    images, cells = images[:count], cells.first(count)
    model.eval()
    output, *where = model.picture(model(images, *cells), images, cells)
    model.train()
    masked, visible = (F.interpolate(each[:, None].float(), images.shape[-1]) for each in where)
    seen = images * visible
    pasted = seen + output.float() * masked  # what was thrown stays grey
    columns = [_pixels(images)]
    titles = ["crop"]
    if weights is not None:
        columns.append(_heat(weights[:count], images.shape[-1]))
        titles.append("weight (log, each image's own range)")
    columns += [_pixels(seen), _pixels(pasted)]
    titles += ["visible to the model", "reconstructed"]
    rows = np.concatenate([np.concatenate(list(column), axis=0) for column in columns], axis=1)
    scale = max(1, round(192 / images.shape[-1]))
    rows = cv2.resize(rows, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    bar = np.full((28, rows.shape[1], 3), 255, np.uint8)
    for number, title in enumerate(titles):
        at = (6 + number * rows.shape[1] // len(titles), 19)
        cv2.putText(bar, title, at, cv2.FONT_HERSHEY_SIMPLEX, 0.38, (40, 40, 40), 1, cv2.LINE_AA)
    path = run / "reconstructions.png"
    cv2.imwrite(str(path), np.concatenate([bar, rows])[:, :, ::-1])
    say(f"look at {path}: crop, loss weight, what the model sees, and what it makes of the rest")


def _pixels(images: Tensor) -> np.ndarray:
    """Normalised images [b, 3, S, S] as uint8 [b, S, S, 3]."""
    scale, shift = images.new_tensor(STD).view(3, 1, 1), images.new_tensor(MEAN).view(3, 1, 1)
    pixels = ((images * scale + shift) * 255).clamp(0, 255).permute(0, 2, 3, 1)
    return pixels.to(torch.uint8).cpu().numpy()


def _heat(weights: Tensor, size: int) -> np.ndarray:
    """Weights [b, c, c] as uint8 [b, size, size, 3] colours."""
    heats = []
    for weight in weights.cpu().log().numpy():
        share = (weight - weight.min()) / max(1e-6, weight.max() - weight.min())
        colours = cv2.applyColorMap((share * 255).astype(np.uint8), cv2.COLORMAP_VIRIDIS)
        heats.append(cv2.resize(colours, (size, size), interpolation=cv2.INTER_NEAREST)[..., ::-1])
    return np.stack(heats)
