"""Which cells of each image are masked, thrown or visible in each step.

Cells are drawn without replacement: first those to mask, then those to throw; the rest is visible.
AMT and FAMT (arXiv 2211.15362, mae-AMT and simmim-AMT) draw by maps, other methods at random.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shards import Batch
from shards.errors import UserError
from shards.records import Records
from shards.rng import Purpose, mix
from shards.weighting import EdgeRule, crop_grid, crop_maps
from train.attention import check_attention, read_attention, write_attention
from train.distributed import Process
from train.models import Cells
from train.progress import say
from train.recipes import Recipe

LEAST = 1e-20  # a weight of 0 comes after all others, and takes part in a full order
ATTENTION = "attention"


def guides(recipe: Recipe) -> list[str]:
    """What the recipe draws cells by: ATTENTION and names of maps. Empty: at random."""
    return [] if recipe.sample_by == "none" else recipe.sample_by.split("*")


def guide_maps(recipe: Recipe) -> list[str]:
    """Those of `guides` that are maps of the shards."""
    return [name for name in guides(recipe) if name != ATTENTION]


def wanted_maps(recipe: Recipe, detector: str | None) -> list[str]:
    """Names of the maps that a step reads: the weights' first, if there are any."""
    weighing = [detector] if detector else []
    return weighing + [name for name in guide_maps(recipe) if name not in weighing]


class Masking:
    """The cells of each step's images, by the recipe.

    A pure function of (seed, step), of the maps of the batch, and of the attention. `refresh`
    computes the attention of all records at the steps that are `due`, and writes it to a file;
    `restore` reads the file when a run is resumed.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        records: Records,
        encoder: Any,
        steps_an_epoch: float,
        device: torch.device,
    ) -> None:
        self.recipe, self.seed, self.device = recipe, seed, device
        self.steps_an_epoch, self.records = steps_an_epoch, len(records)
        self.patches_a_side = recipe.size // encoder.patch_embed.patch_size[0]
        self.side = self.patches_a_side if recipe.method == "mae" else recipe.size // recipe.cell
        self.guides = guides(recipe)
        self.attention: Tensor | None = None  # uint8 [records, patches], where the model is
        if ATTENTION in self.guides:
            check_attention(encoder, recipe.model)
        self.begin = self._step_of(0)  # of drawing by maps; before, at random
        self.random = counts(self.side**2, recipe.random_mask_ratio, 0, recipe.method)
        self.counts = counts(self.side**2, recipe.mask_ratio, recipe.throw_ratio, recipe.method)
        # By map: what a crop keeps of it near its edges.
        self.edges = {
            name: EdgeRule(records, name, recipe.size, self.side).to(device)
            for name in guide_maps(recipe)
        }

    def _step_of(self, number: int) -> int:
        """The first step of the phase that refresh `number` begins."""
        recipe = self.recipe
        epoch = recipe.random_epochs + number * recipe.refresh_epochs
        return math.ceil(epoch * self.steps_an_epoch - 1e-9)

    def in_force(self, step: int) -> int | None:
        """The step before which the attention that `step` uses is written; None: it uses none."""
        if ATTENTION not in self.guides or step < self.begin:
            return None
        recipe = self.recipe
        near = int((step / self.steps_an_epoch - recipe.random_epochs) / recipe.refresh_epochs)
        steps = (self._step_of(max(0, number)) for number in (near - 1, near, near + 1))
        return max(one for one in steps if one <= step)

    def due(self, step: int) -> bool:
        """Whether `step` begins with a refresh."""
        return self.in_force(step) == step

    def refresh(
        self,
        run: Path,
        step: int,
        encoder: Any,
        every_record: Callable[[], Iterable[Batch]],
        process: Process,
    ) -> float:
        """Compute the attention of every record by `encoder` before `step`, write it, and use it
        from now on. Returns the seconds that this took.
        """
        began, path = time.perf_counter(), self._path(run, step)
        size, batches = self.recipe.size, every_record()
        self.attention = write_attention(
            path, encoder, batches, self.records, size, process, self.device
        )
        spent = time.perf_counter() - began
        if process.rank == 0:
            say(
                f"attention of {self.records:,} records looked at before step {step + 1}, "
                f"in {spent:.1f} s"
            )
        return spent

    def restore(self, run: Path, step: int, done: bool = False) -> None:
        """Before `step` of a resumed run: read the attention that an earlier step wrote, if `step`
        uses it. `done`: also what was written before `step` itself.
        """
        written = self.in_force(step)
        if written is not None and (done or written != step):
            path = self._path(run, written)
            maps = read_attention(path, self.records, self.patches_a_side**2)
            self.attention = maps.to(self.device)

    @staticmethod
    def _path(run: Path, step: int) -> Path:
        return run / f"attention-{step:08d}.npy"

    def noise(self, step: int) -> Tensor:
        """The random numbers of a step's whole batch; a process takes its rows."""
        batch, recipe = self.recipe.batch, self.recipe
        plain = step < self.begin or not (self.guides or recipe.throw_ratio)
        if recipe.method == "simmim" and plain:  # SimMIM's masks, drawn where the model is
            ratio = recipe.random_mask_ratio if step < self.begin else recipe.mask_ratio
            return block_masks(self.seed, step, batch, self.side, ratio, self.device)
        noise = races(self.seed, step, batch, self.side**2)
        if self.device.type == "cuda":  # or the copy would wait for all that is queued
            noise = noise.pin_memory()
        return noise.to(self.device, non_blocking=True)

    def cells(self, noise: Tensor, step: int, tensors: dict[str, Any]) -> Cells:
        """Cells of a part of the batch, by its rows of `noise` and its `tensors`."""
        if noise.dtype == torch.bool:
            return Cells(noise)
        early = step < self.begin
        weights = None if early or not self.guides else self.guide_scores(tensors)
        return self._split(drawn(noise, weights), self.random if early else self.counts)

    def example(self, early: bool = False) -> Cells:
        """Cells of one image, for counting what the model does; `early`: as the run begins."""
        counts = self.random if early and self.begin else self.counts
        return self._split(torch.arange(self.side**2, device=self.device)[None], counts)

    def fixed(self, count: int, seed: int | None = None) -> Cells:
        """Cells of `count` images, drawn at random, the same at any step; as many as the first.
        seed: the run's, if none is given.
        """
        seed = self.seed if seed is None else seed
        order = drawn(races(seed, 0, count, self.side**2)).to(self.device)
        return self._split(order, self.random if self.guides else self.counts)

    def _split(self, order: Tensor, counts: tuple[int, int, int]) -> Cells:
        """Cells of numbers in the `order` drawn, int64 [b, n]."""
        masked, thrown, _ = counts
        chosen, visible = order[:, :masked], order[:, masked + thrown :]
        if self.recipe.method == "mae":
            return Cells(chosen, visible)
        none = torch.zeros_like(order, dtype=torch.bool)
        mask = none.scatter(1, chosen, True).view(-1, self.side, self.side)
        return Cells(mask, torch.cat([chosen, visible], dim=1) if thrown else None)

    def guide_scores(self, tensors: dict[str, Any]) -> Tensor:
        """The product of the guides on each cell of each crop, float32 [b, side**2]."""
        boxes, flips = tensors["boxes"], tensors["flips"]
        product = torch.ones(len(boxes), self.side, self.side, device=self.device)
        for name in self.guides:
            if name != ATTENTION:
                maps, visible = tensors["maps"][name], self.edges[name](tensors["samples"])
                product = product * crop_maps(maps, boxes, flips, self.side, visible)
                continue
            assert self.attention is not None
            levels = self.attention[tensors["samples"]].float() / 255
            grid = levels.unflatten(1, (self.patches_a_side, self.patches_a_side))
            product = product * crop_grid(grid, boxes, flips, self.side)
        return product.flatten(1)

    def describe(self) -> str:
        """What is masked, in one line a person can check."""
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


def block_masks(
    seed: int, step: int, batch: int, cells: int, ratio: float, device: torch.device
) -> Tensor:
    """Masks of a step's whole batch, bool [batch, cells, cells], True where masked.

    Each masks ceil(ratio * cells**2) cells (22 of 36 at 0.6), a pure function of (seed, step)
    and the kind of device: every process draws all of them and takes its part.
    """
    generator = torch.Generator(device).manual_seed(int(mix(Purpose.MASK, seed, step)) >> 1)
    noise = torch.rand(batch, cells * cells, generator=generator, device=device)
    masked = noise.argsort(dim=1).argsort(dim=1) < math.ceil(ratio * cells * cells)
    return masked.view(batch, cells, cells)


def counts(
    cells: int, mask: float, throw: float, method: Literal["simmim", "mae"]
) -> tuple[int, int, int]:
    """(masked, thrown, visible) of `cells` by the shares `mask` and `throw`.

    Rounded as published: MAE's visible cells down; where cells are thrown, as AMT does, the masked
    ones down, and these with the thrown ones; SimMIM's up, each. Raises UserError if no cell is
    left to mask or to see.
    """
    if method == "mae" and not throw:
        masked, thrown = cells - int(cells * (1 - mask)), 0
    elif method == "mae":
        masked = int(cells * mask)
        thrown = int(cells * (mask + throw) + 1e-9) - masked
    else:
        masked, thrown = (math.ceil(cells * share) for share in (mask, throw))
    visible = cells - masked - thrown
    if masked < 1 or thrown < 0 or visible < 1:
        raise UserError(
            f"of {cells} cells, {mask:g} masked and {throw:g} thrown are {masked} and {thrown}, "
            f"and leave {visible} visible; at least one must be masked and one visible"
        )
    return masked, thrown, visible


def races(seed: int, step: int, batch: int, cells: int) -> Tensor:
    """Exponential noise of a step's whole batch, float32 [batch, cells], on the CPU.

    A pure function of (seed, step): every process draws all of it and takes its part, and every
    device gets the same.
    """
    generator = torch.Generator().manual_seed(int(mix(Purpose.RACE, seed, step)) >> 1)
    return -torch.log1p(-torch.rand(batch, cells, generator=generator))


def drawn(noise: Tensor, weights: Tensor | None = None) -> Tensor:
    """Cell numbers, int64 [b, cells], in the order in which they are drawn without replacement.

    The chance of a cell is its weight over the weights of all cells that are left: first comes the
    cell with the least exponential `noise` / weight. weights: [b, cells], at least 0, of any scale;
    None: all the same. Cells of weight 0 come last.
    """
    if weights is not None:
        noise = noise / weights.float().clamp_min(LEAST)
    return noise.argsort(dim=1, stable=True)
