"""Runs that share everything but their loss weights: crops, masks, first parameters, batches.

Frames, boxes and masks of all steps lie on the device, and a step reads its own by a counter that
lies there too. So on CUDA a whole step, with its data, is one graph that is replayed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kamim.experiment.data import Photos
from shards import Plan
from shards.crops import crop_boxes, unit_boxes
from shards.rng import Purpose, mix
from shards.weighting import Normalise, crop_frames, crop_grid
from train.controls import control_weights
from train.masking import counts
from train.models import MEAN, STD, Cells, make_model
from train.recipes import Recipe
from train.schedule import learning_rate
from train.setup import parameter_groups

LOGGED = ("loss", "gradient norm", "effective share of cells")
CHUNK = 1 << 16  # samples whose boxes are drawn at once


@dataclass(frozen=True, slots=True)
class Arm:
    """Where the loss weights of a run come from: `source` as in train/controls.py."""

    source: str = "detector"
    detector: str = "fast"
    normalise: Normalise = "batch"


@dataclass(frozen=True, slots=True)
class Order:
    """What every step shows, on the device: all runs of a seed have the same.

    samples: int64 [steps, batch]; boxes: float32 [steps, batch, 4]; flips: bool [steps, batch, 2];
    cells: uint8 [steps, batch, n], cell numbers in the order in which they are masked.
    """

    samples: Tensor
    boxes: Tensor
    flips: Tensor
    cells: Tensor

    def __len__(self) -> int:
        return len(self.samples)


def make_order(photos: Photos, recipe: Recipe, seed: int, steps: int) -> Order:
    """The samples, crops and masks of `steps`, a pure function of the seed and kind of device."""
    device, total = photos.frames.device, steps * recipe.batch
    flips = (0.5, recipe.vertical)
    stream = Plan(len(photos.frames), CHUNK, seed, area=recipe.area, vertical=recipe.vertical)
    parts: list[tuple[Any, Any, Any]] = []
    for step in range(-(-total // CHUNK)):
        epochs, samples = stream.samples(step)
        size = photos.heights[samples], photos.widths[samples]
        boxes, turned = crop_boxes(
            Purpose.CROP, seed, epochs, samples, *size, recipe.area, flips=flips
        )
        parts.append((samples, unit_boxes(boxes, *size), turned))
    samples, boxes, turned = (
        torch.from_numpy(np.concatenate(each)[:total]).to(device).unflatten(0, (steps, -1))
        for each in zip(*parts, strict=True)
    )
    generator = torch.Generator(device).manual_seed(int(mix(Purpose.MASK, seed)) >> 1)
    number = (recipe.size // recipe.cell) ** 2
    orders = [
        torch.rand(recipe.batch, number, generator=generator, device=device).argsort(1).byte()
        for _ in range(steps)
    ]
    return Order(samples, boxes, turned, torch.stack(orders))


def cells_of(order: Tensor, recipe: Recipe) -> Cells:
    """Cells of images whose cells are masked in `order`, [b, n]."""
    order = order.long()
    side = recipe.size // recipe.cell
    masked, _, _ = counts(side**2, recipe.mask_ratio, 0, recipe.method)
    if recipe.method == "mae":
        return Cells(order[:, :masked], order[:, masked:])
    none = torch.zeros_like(order, dtype=torch.bool)
    return Cells(none.scatter(1, order[:, :masked], True).view(-1, side, side))


def cut(frames: Tensor, samples: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Crops of the frames of `samples`; compiled, it reads only the pixels that it needs."""
    return crop_frames(frames[samples], boxes, flips, size)


class Trainer:
    """A model with its optimizer, which trains one run after the other from the same start.

    fast: on CUDA, compile the blocks and replay a step as a graph.
    """

    def __init__(self, recipe: Recipe, photos: Photos, seed: int, fast: bool) -> None:
        self.recipe, self.photos, self.device = recipe, photos, photos.frames.device
        self.fast = fast and self.device.type == "cuda"
        self.model: Any = make_model(recipe).to(self.device)
        self.plain: Any = make_model(recipe).to(self.device).eval()  # to look at, not compiled
        self.cut: Any = cut
        self.loss: Any = self.model.loss
        if self.fast:
            for block in blocks_of(self.model):
                block.compile(dynamic=False)
            self.cut, self.loss = (torch.compile(f, dynamic=False) for f in (self.cut, self.loss))
        groups, cuda = parameter_groups(self.model, recipe), self.device.type == "cuda"
        self.rate = torch.zeros((), device=self.device)
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, recipe.beta2), fused=cuda, capturable=cuda
        )
        if cuda:  # a rate on the device can change from within a graph
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
        # Made once: no number may come from the CPU while a graph is captured.
        self.mean, self.std = (
            torch.tensor(each, device=self.device).view(3, 1, 1) * 255 for each in (MEAN, STD)
        )
        self.parameters = [p for group in groups for p in group["params"]]
        self.at = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.start_from(seed)

    def start_from(self, seed: int) -> None:
        """Take the first parameters of `seed`; each run begins from them."""
        torch.manual_seed(seed)
        fresh = make_model(self.recipe)
        self.first = {name: value.to(self.device) for name, value in fresh.state_dict().items()}

    def prepare(self, peak: float, steps: int) -> None:
        """The learning rates of a new run, and room for its log."""
        recipe = self.recipe
        warmup = min(round(recipe.warmup * steps / recipe.epochs), steps - 1)
        rates = [
            learning_rate(step, steps, warmup, peak, peak / 80, peak / 800) for step in range(steps)
        ]
        self.rates = torch.tensor(rates, device=self.device)
        self.log = torch.zeros(steps, len(LOGGED), device=self.device)

    def reset(self) -> None:
        """Back to the start, in the tensors that a graph may know."""
        self.model.load_state_dict(self.first)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        self.log.zero_()
        self.at.zero_()

    def step(self, order: Order, arm: Arm) -> None:
        """One step at the counter, which it moves on."""
        at, recipe = self.at, self.recipe
        self.rate.copy_(self.rates.index_select(0, at)[0])
        if self.device.type == "cpu":
            for group in self.optimizer.param_groups:
                group["lr"] = float(self.rate)
        samples, boxes, flips, cells = (
            each.index_select(0, at)[0]
            for each in (order.samples, order.boxes, order.flips, order.cells)
        )
        shown = cells_of(cells, recipe)
        images, weights = self.crops(self.photos, samples, boxes, flips, arm)
        for parameter in self.parameters:
            parameter.grad = None
        # Parameters change between steps of a graph: no copy of them may be kept.
        with torch.autocast(
            self.device.type, torch.bfloat16, self.device.type == "cuda", cache_enabled=False
        ):
            output = self.model(images, *shown)
        loss = self.loss(output, images, shown, weights)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, recipe.clip)
        self.optimizer.step()
        share = weights.sum() ** 2 / (weights**2).sum() / weights.numel()
        self.log.index_copy_(0, at, torch.stack([loss.detach(), norm, share])[None])
        self.at += 1

    def crops(
        self, photos: Photos, samples: Tensor, boxes: Tensor, flips: Tensor, arm: Arm
    ) -> tuple[Tensor, Tensor]:
        """(normalised crops [b, 3, S, S], their loss weights [b, c, c])."""
        recipe = self.recipe
        read = self.cut if photos is self.photos else cut  # compiled for the batch of a step
        images = read(photos.frames, samples, boxes, flips, recipe.size)
        images = (images - self.mean) / self.std
        cells = recipe.size // recipe.w_ps
        maps, edges = photos.maps[arm.detector][samples], photos.edges[arm.detector]
        density = crop_grid(maps, boxes, flips, cells, edges)
        weights = control_weights(
            density,
            images,
            {},
            source=arm.source,
            temperature=recipe.temperature or 1,
            normalise=arm.normalise,
        )
        return images, weights

    def train(
        self, order: Order, arm: Arm, peak: float, look: dict[int, Callable[[], None]]
    ) -> float:
        """Train through `order`; after the steps in `look` call what is there. Returns seconds."""
        self.prepare(peak, len(order))
        self.reset()
        with Graph(lambda: self.step(order, arm), self.fast) as go:
            self.reset()
            spent, began = 0.0, time.perf_counter()
            for step in range(len(order)):
                go()
                if step + 1 in look:
                    self.wait()
                    spent += time.perf_counter() - began
                    self.plain.load_state_dict(self.model.state_dict())
                    look[step + 1]()
                    self.wait()
                    began = time.perf_counter()
            self.wait()
            return spent + time.perf_counter() - began

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Graph:
    """`step` as a CUDA graph while the block lasts, or as it is."""

    def __init__(self, step: Callable[[], None], fast: bool) -> None:
        self.step, self.fast = step, fast

    def __enter__(self) -> Callable[[], None]:
        if not self.fast:
            return self.step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.captured):
            self.step()
        return self.captured.replay

    def __exit__(self, *raised: object) -> None:
        if self.fast:
            torch.cuda.synchronize()
            self.captured.reset()
            torch.cuda.empty_cache()


def blocks_of(model: Any) -> list[nn.Module]:
    """The transformer blocks of a model: an encoder's, and a MAE's decoder's."""
    extra = list(model.decoder) if hasattr(model, "widen") else []
    return [*model.encoder.blocks, *extra]
