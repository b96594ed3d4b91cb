"""Pictures of a run: reconstructions, with masks and weights.

At each save the same few images are reconstructed: RUN/pictures holds a strip of them per save, one
above the other, and strips of their crops, weights and visible cells.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.files import sweep, write_atomically
from shards.html import encoded, heat
from train.models import MEAN, STD, Cells, in_bf16
from train.page import GIVEN, pictures_of, write_page
from train.progress import say

PICTURES = 8  # images
WHITE = (255, 255, 255)
GAP = 4  # px between them
FOLLOWED, TILE = 6, 128  # images that every save shows; most px of a side there


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
    seen, pasted = reconstructed(model, images, cells)
    columns = [_pixels(images)]
    titles = ["crop"]
    if weights is not None:
        columns.append(_heat(weights[:count], images.shape[-1]))
        titles.append("weight (log, each image's own range)")
    columns += [_pixels(seen), _pixels(pasted)]
    titles += ["visible to the model", "reconstructed"]
    side = images.shape[-1] * max(1, round(192 / images.shape[-1]))
    rows = np.concatenate([_stacked(column, side, GAP, GAP) for column in columns], axis=1)
    rows = rows[:-GAP, :-GAP]
    bar = np.full((28, rows.shape[1], 3), 255, np.uint8)
    for number, title in enumerate(titles):
        at = (6 + number * (side + GAP), 19)
        cv2.putText(bar, title, at, cv2.FONT_HERSHEY_SIMPLEX, 0.38, (40, 40, 40), 1, cv2.LINE_AA)
    path = run / "reconstructions.png"
    cv2.imwrite(str(path), np.concatenate([bar, rows])[:, :, ::-1])
    say(f"look at {path}: crop, loss weight, what the model sees, and what it makes of the rest")


def reconstructed(model: Any, images: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """(what the model sees, the same with what it makes of the masked cells), normalised [b, 3, S,
    S]. Thrown cells are grey.
    """
    training = model.training
    model.eval()
    with torch.no_grad(), in_bf16(images.device):
        output, *where = model.picture(model(images, *cells), images, cells)
    model.train(training)
    masked, visible = (F.interpolate(each[:, None].float(), images.shape[-1]) for each in where)
    seen = images * visible
    return seen, seen + output.float() * masked


class Followed:
    """The images of a run that every save shows, and their strips in RUN/pictures."""

    def __init__(
        self, run: Path, images: Tensor, cells: Cells, weights: Tensor | None, model: Any
    ) -> None:
        self.folder, self.images, self.cells = pictures_of(run), images, cells
        self.folder.mkdir(exist_ok=True)
        sweep(self.folder)
        seen, _ = reconstructed(model, images, cells)
        strips = {"crop": _pixels(images), "visible": _pixels(seen)}
        if weights is not None:
            strips["weight"] = _heat(weights, images.shape[-1])
        for name, strip in strips.items():
            write_atomically(
                self.folder / f"{name}.{GIVEN[name]}", _strip(strip, GIVEN[name]), durable=False
            )

    def taken(self, model: Any, step: int) -> Callable[[], None]:
        """A function that writes the strip of `model` after `step` steps, and then the page of the
        run.
        """
        pixels = _pixels(reconstructed(model, self.images, self.cells)[1])

        def write() -> None:
            path = self.folder / f"step-{step:08d}.jpg"
            write_atomically(path, _strip(pixels), durable=False)
            write_page(self.folder.parent)

        return write


def _strip(images: np.ndarray, form: str = "jpg") -> bytes:
    """uint8 [b, S, S, 3] one above the other, as a file."""
    return encoded(_stacked(images, min(TILE, images.shape[1]), 3), form)


def _stacked(images: np.ndarray, side: int, below: int, right: int = 0) -> np.ndarray:
    """uint8 [b, S, S, 3] one above the other, of `side` px each, with white around them."""
    how = cv2.INTER_AREA if side < images.shape[1] else cv2.INTER_NEAREST
    tiles = [cv2.resize(each, (side, side), interpolation=how) for each in images]
    white = {"borderType": cv2.BORDER_CONSTANT, "value": WHITE}
    return np.concatenate([cv2.copyMakeBorder(t, 0, below, 0, right, **white) for t in tiles])


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
        colours = heat((share * 255).astype(np.uint8))
        heats.append(cv2.resize(colours, (size, size), interpolation=cv2.INTER_NEAREST))
    return np.stack(heats)
