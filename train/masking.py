"""A recipe's method: its model, and what of each image that model is shown in each step.

In: a recipe, a seed, the maps of a batch. Out: SimMIM or MAE, and cells: masked, thrown, visible.
AMT and FAMT (arXiv 2211.15362) draw them by maps; the rest draw them at random.
"""

import math
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Manifest
from shards.weighting import crop_grid, crop_maps, edge_rule
from train.attention import check_attention, read_attention, write_attention
from train.loss import block_masks
from train.mae import MAE
from train.models import CELL, SimMIM
from train.recipes import Recipe
from train.sampling import counts, drawn, races
from train.tokens import check_tokens

ATTENTION = "attention"


def make_model(recipe: Recipe) -> SimMIM | MAE:
    """The recipe's model, untrained. Raises UserError if its encoder cannot serve."""
    if recipe.method == "mae":
        return MAE(recipe.model, recipe.size, recipe.options, recipe.decoder, recipe.norm_pix)
    model = SimMIM(recipe.model, recipe.size, recipe.options)
    if recipe.throw_ratio:
        check_tokens(model.encoder, recipe.model)
    return model


def guides(recipe: Recipe) -> list[str]:
    """What the recipe draws cells by: ATTENTION and names of maps; none for at random."""
    return [] if recipe.sample_by == "none" else recipe.sample_by.split("*")


def guide_maps(recipe: Recipe) -> list[str]:
    """Those of `guides` that are maps in the shards."""
    return [name for name in guides(recipe) if name != ATTENTION]


class Masking:
    """What is hidden of the images of each step, by the recipe.

    A pure function of (seed, step), of the maps of a batch, and of the attention in force, which is
    written anew by `refresh` at the steps that are `due` and read again when a run goes on.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        manifest: Manifest,
        encoder: Any,
        steps_an_epoch: float,
        device: torch.device,
    ) -> None:
        self.recipe, self.seed, self.device = recipe, seed, device
        self.steps_an_epoch, self.records = steps_an_epoch, manifest.count
        self.patches_a_side = recipe.size // encoder.patch_embed.patch_size[0]
        self.side = self.patches_a_side if recipe.method == "mae" else recipe.size // CELL
        self.guides = guides(recipe)
        self.attention: NDArray[Any] | None = None
        if ATTENTION in self.guides:
            check_attention(encoder, recipe.model)
        self.begin = self._step_of(0)  # of drawing by maps; before, at random
        self.random = counts(self.side**2, recipe.random_mask_ratio, 0, recipe.method)
        self.counts = counts(self.side**2, recipe.mask_ratio, recipe.throw_ratio, recipe.method)
        self.visible: dict[str, Tensor] = {}  # by map: what a crop keeps of it near its edges
        for name in guide_maps(recipe):
            row, settings = manifest.detectors.index(name), manifest.settings
            self.visible[name] = edge_rule(settings, settings.detectors[row], self.side).to(device)

    def _step_of(self, number: int) -> int:
        """The first step of the phase that refresh `number` begins."""
        recipe = self.recipe
        epoch = recipe.random_epochs + number * recipe.refresh_epochs
        return math.ceil(epoch * self.steps_an_epoch - 1e-9)

    def in_force(self, step: int) -> int | None:
        """The step at whose beginning the attention of `step` was, or is, written; None: none."""
        if ATTENTION not in self.guides or step < self.begin:
            return None
        recipe = self.recipe
        near = int((step / self.steps_an_epoch - recipe.random_epochs) / recipe.refresh_epochs)
        steps = (self._step_of(max(0, number)) for number in (near - 1, near, near + 1))
        return max(one for one in steps if one <= step)

    def due(self, step: int) -> bool:
        """Whether `step` begins with a refresh."""
        return self.in_force(step) == step

    def refresh(self, run: Path, step: int, encoder: Any, loader: Any,
                place: tuple[int, int]) -> None:  # fmt: skip
        """Write the attention of all records as `encoder` now has it, and use it from here on."""
        size, path = self.recipe.size, self._path(run, step)
        write_attention(path, encoder, loader, self.records, size, place, self.device)
        self.attention = read_attention(path, self.records, self.patches_a_side**2)

    def restore(self, run: Path, step: int, done: bool = False) -> None:
        """Before `step` of a run that goes on: read what an earlier step wrote, if it is needed;
        what `step` itself wrote too if it is `done`.
        """
        written = self.in_force(step)
        if written is not None and (done or written != step):
            path = self._path(run, written)
            self.attention = read_attention(path, self.records, self.patches_a_side**2)

    @staticmethod
    def _path(run: Path, step: int) -> Path:
        return run / f"attention-{step:08d}.npy"

    def noise(self, step: int) -> Tensor:
        """What decides the draws of a step's whole batch; a process takes its rows of it."""
        batch, recipe = self.recipe.batch, self.recipe
        plain = step < self.begin or not (self.guides or recipe.throw_ratio)
        if recipe.method == "simmim" and plain:  # SimMIM's masks, drawn where the model is
            ratio = recipe.random_mask_ratio if step < self.begin else recipe.mask_ratio
            return block_masks(self.seed, step, batch, self.side, ratio, self.device)
        return races(self.seed, step, batch, self.side**2).to(self.device)

    def hidden(
        self, noise: Tensor, step: int, samples: NDArray[Any], tensors: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """What the model takes beside the images of a part of the batch: its rows of `noise`, its
        `samples` and its `tensors` decide. SimMIM: (mask,) or (mask, kept); MAE: (masked, visible).
        """
        if noise.dtype == torch.bool:
            return (noise,)
        early = step < self.begin
        masked, thrown, _ = self.random if early else self.counts
        weights = None if early or not self.guides else self.weights(samples, tensors)
        order = drawn(noise, weights)
        if self.recipe.method == "mae":
            return order[:, :masked], order[:, masked + thrown :]
        none = torch.zeros_like(noise, dtype=torch.bool)
        mask = none.scatter(1, order[:, :masked], True).view(-1, self.side, self.side)
        if not thrown:
            return (mask,)
        return mask, torch.cat([order[:, :masked], order[:, masked + thrown :]], dim=1)

    def example(self) -> tuple[Tensor, ...]:
        """What the model takes beside one image, for counting its operations."""
        masked, thrown, _ = self.counts
        order = torch.arange(self.side**2, device=self.device)[None]
        if self.recipe.method == "mae":
            return order[:, :masked], order[:, masked + thrown :]
        mask = (order < masked).view(1, self.side, self.side)
        return (mask, order[:, : self.side**2 - thrown]) if thrown else (mask,)

    def weights(self, samples: NDArray[Any], tensors: dict[str, Any]) -> Tensor:
        """The product of the guides on each cell of each crop, float32 [b, side**2]."""
        boxes, flips = tensors["boxes"], tensors["flips"]
        product = torch.ones(len(boxes), self.side, self.side, device=self.device)
        for name in self.guides:
            if name != ATTENTION:
                maps, visible = tensors["maps"][name], self.visible[name]
                product = product * crop_maps(maps, boxes, flips, self.side, visible)
                continue
            assert self.attention is not None
            levels = torch.from_numpy(self.attention[samples]).to(self.device).float() / 255
            grid = levels.unflatten(1, (self.patches_a_side, self.patches_a_side))
            product = product * crop_grid(grid, boxes, flips, self.side)
        return product.flatten(1)

    def describe(self) -> str:
        """What is hidden, in one line a person can check."""
        masked, thrown, visible = self.counts
        cells = f"{masked} masked, {thrown} thrown, {visible} visible of {self.side**2} cells"
        if not self.guides:
            return f"{self.recipe.method}: {cells}, at random"
        recipe = self.recipe
        line = (
            f"{recipe.method}: {cells}, drawn by {recipe.sample_by} from epoch "
            f"{recipe.random_epochs:g} on, until then {self.random[0]} masked at random"
        )
        if ATTENTION in self.guides:
            line += f"; attention anew every {recipe.refresh_epochs:g} epochs"
        if "frequency" in self.guides:
            line += "; the frequency map is our own design, FAMT's formula is not known"
        return line
