"""From uint8 batches to training inputs, in torch: crops of frames and densities, loss weights.

`WeightedCrops` is all of it in one module; the functions below it are each usable alone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shards.correction import STEPS, Correction, correction
from shards.crops import visible_cells
from shards.errors import UserError
from shards.order import Plan
from shards.records import Records
from shards.spec import BANK_CELL, Detector, Settings

Normalise = Literal["min", "mean", "batch"]
# (density [b, c, c], crops, the batch they were read from) in, weights [b, c, c] out.
Rule = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]


class Crops(NamedTuple):
    """What a step trains on, on one device.

    images: float32 [b, 3, S, S], 0 to 1 if `mean` and `std` were left out. weights:
    float32 [b, c, c], or None. labels, samples, epochs: int64 [b].
    """

    images: Tensor
    weights: Tensor | None
    labels: Tensor
    samples: Tensor
    epochs: Tensor


class WeightedCrops(nn.Module):
    """A batch of frames and densities in, its random crops and their loss weights out: Crops.

    The batch is a mapping: frames uint8 [b, F, F, 3], boxes [b, 4], flips bool [b, 2], maps or
    counts by detector, labels, samples and epochs. to_device makes it from a batch of the loader, a
    DataLoader from `ShardSet.dataset`, and draw_crops completes what another reader has read. Frame
    and density get the same crop. The density is read off the map by the detector's edge rule, or
    from the counts, if there are any. If the batch has a `temperature`, a tensor, it is used in
    place of the module's: it may change from step to step without a new graph.

    weights: a detector of the set, or None for images alone. size: side of a crop, px. w_ps: side
    of a weight cell, px; it must divide `size`. temperature, normalise: as in loss_weights. mean,
    std: per channel, of images from 0 to 1; images are normalised by them. rule: makes the weights
    from the densities in place of loss_weights. correct: weights that are read off a map get the
    correction of shards/correction.py, if it has the detector; those of counts and of a rule never.
    Raises UserError if the set cannot serve.
    """

    likely: Tensor
    least: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        records: Records,
        weights: str | None = None,
        *,
        size: int = 192,
        w_ps: int = 8,
        temperature: float = 0.25,
        normalise: Normalise = "min",
        bank: bool = False,
        rule: Rule | None = None,
        correct: bool = True,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ) -> None:
        super().__init__()
        self.weights, self.size, self.temperature = weights, size, temperature
        if size < 1:
            raise UserError(f"crop size {size} is out of range; give 1 or more")
        if w_ps < 1:
            raise UserError(f"w_ps {w_ps} is out of range; give 1 or more")
        if normalise not in get_args(Normalise):
            known = ", ".join(get_args(Normalise))
            raise UserError(f"normalise is {normalise!r}; there are {known}")
        self.normalise, self.cells, self.rule = normalise, size // w_ps, rule
        table: Correction | None = None
        if weights is not None:
            records.find_maps([weights], bank)
            for one in records.sets:
                check_cells(one.manifest.settings, size, w_ps, bank)
            if not 0 < temperature < math.inf:
                raise UserError(f"temperature {temperature} is out of range; published is 0.25")
            self.sight = EdgeRule(records, weights, size, self.cells)
            if correct and rule is None:
                table = _correction(records, weights, temperature, w_ps, self.cells)
        self.corrected = table is not None
        for name, values in zip(Correction._fields, table or ((), ()), strict=True):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)
        for name, values in (("mean", mean), ("std", std)):
            scaled = torch.tensor(values).view(3, 1, 1) * 255
            self.register_buffer(name, scaled, persistent=False)

    def forward(self, batch: Mapping[str, Any]) -> Crops:
        """The crops of a batch, on the device that it and this module are on."""
        boxes, flips = batch["boxes"], batch["flips"]
        images = crop_frames(batch["frames"], boxes, flips, self.size)
        images = (images - self.mean) / self.std
        weights = self.weigh(batch, images)
        return Crops(images, weights, batch["labels"], batch["samples"], batch["epochs"])

    def weigh(self, batch: Mapping[str, Any], images: Tensor | None = None) -> Tensor | None:
        """Only the loss weights of a batch's crops. A rule needs the `images` of the crops."""
        if self.weights is None:
            return None
        density, exact = self.density(batch), self.weights in batch.get("counts", {})
        if self.corrected and not exact and "temperature" not in batch:  # the tables are of one T
            least = _between(self.least, density.flatten(1).amin(1))
            density = _between(self.likely, density)
            return loss_weights(density, self.temperature, self.normalise, least)
        if self.rule is not None:
            if images is None:
                raise UserError("the weights are by a rule, which needs the images of the crops")
            return self.rule(density, images, batch)
        return loss_weights(density, batch.get("temperature", self.temperature), self.normalise)

    def density(self, batch: Mapping[str, Any]) -> Tensor:
        """The density in each weight cell of a batch's crops, float32 [b, c, c], 0 to 1."""
        assert self.weights is not None
        if self.weights in batch.get("counts", {}):
            return pool_counts(batch["counts"][self.weights], self.cells)
        maps, boxes, flips = batch["maps"][self.weights], batch["boxes"], batch["flips"]
        return crop_maps(maps, boxes, flips, self.cells, self.sight(batch.get("samples")))


def draw_crops(
    plan: Plan, epoch: int, samples: Sequence[int], heights: Sequence[int], widths: Sequence[int]
) -> dict[str, Tensor]:
    """boxes, flips, samples and epochs of a batch that another reader of the set has read.

    samples: numbers of the records in the set. heights, widths: of their sources, px. A sample gets
    the crop that `plan` shows of it in `epoch`, in whatever order samples are read.
    """
    numbers, tall, wide = (np.asarray(each, np.int64) for each in (samples, heights, widths))
    epochs = np.full(len(numbers), epoch)
    boxes, flips = plan.boxes(epochs, numbers, tall, wide)
    drawn = {"boxes": boxes, "flips": flips, "samples": numbers, "epochs": epochs}
    return {name: torch.from_numpy(array) for name, array in drawn.items()}


def check_cells(settings: Settings, size: int, w_ps: int, bank: bool = False) -> None:
    """Raise UserError unless crops of `size` px can be read in cells of `w_ps` px."""
    cells, rest = divmod(size, w_ps)
    if rest:
        raise UserError(f"w_ps {w_ps} does not divide the crop size {size}")
    if not bank and settings.grid < cells:
        raise UserError(
            f"maps of {settings.grid} cells per side cannot serve {cells} weight cells (crop "
            f"{size}, w_ps {w_ps}); build with --grid {2 * cells} or raise w_ps"
        )
    if bank and w_ps % BANK_CELL:
        raise UserError(f"w_ps {w_ps} is no multiple of the bank's {BANK_CELL} px")
    if bank and size != settings.crop:
        raise UserError(
            f"the bank's crops have {settings.crop} px, not {size}; build a bank for crops of "
            f"{size} px (--crop {size}), or train on the maps"
        )


class EdgeRule(nn.Module):
    """The share of its marks that a detector finds at each distance from a crop's edge, per set.

    Call it with numbers of samples: it gives float32 [cells], or [b, cells] if the sets differ.
    """

    visible: Tensor
    ends: Tensor

    def __init__(self, records: Records, detector: str, size: int, cells: int) -> None:
        super().__init__()
        sights = []
        for one in records.sets:
            settings, (row,) = one.manifest.settings, one.find_maps([detector])
            sights.append(edge_rule(settings, settings.detectors[row], size, cells))
        same = all(torch.equal(each, sights[0]) for each in sights)
        self.register_buffer("visible", sights[0] if same else torch.stack(sights), False)
        self.register_buffer("ends", torch.from_numpy(records.set_ends), False)

    def forward(self, samples: Tensor | None) -> Tensor:
        if self.visible.ndim == 1 or samples is None:
            return self.visible
        return self.visible[torch.searchsorted(self.ends, samples, right=True)]


def _correction(
    records: Records, name: str, temperature: float, w_ps: int, cells: int
) -> Correction | None:
    """The table of detector `name`, the same for all sets; None if a set has none."""
    tables = []
    for one in records.sets:
        settings, (row,) = one.manifest.settings, one.find_maps([name])
        detector = settings.detectors[row]
        tables.append(correction(detector, settings.mark, temperature, w_ps, cells))
    return None if None in tables else tables[0]


def edge_rule(settings: Settings, detector: Detector, size: int, cells: int) -> Tensor:
    """The share of its marks that `detector` finds at each distance from the edge of a crop of
    `size` px, float32 [cells].

    The size for which the maps were made does not matter: an edge rule is in px of the image that
    the detector is given.
    """
    share = visible_cells(detector, size, cells, settings.mark)
    return torch.from_numpy(share).float()


def crop_frames(frames: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Crops of `frames` (uint8 [b, F, F, 3]) as float32 [b, 3, size, size], 0 to 255.

    Bilinear without antialias. As in torchvision's crop and resize, no pixel outside the box is
    read. boxes: [b, 4] (top, left, height, width); flips: bool [b, 2] (horizontal, vertical).
    """
    pixels = frames.permute(0, 3, 1, 2).float()
    side = frames.shape[1]
    places = (torch.arange(size, device=frames.device) + 0.5) / size
    axes = []
    for axis in (1, 0):  # x, then y: the order that grid_sample wants
        begin, length = boxes[:, axis, None] * side, boxes[:, axis + 2, None] * side
        along = torch.where(flips[:, 1 - axis, None], 1 - places, places)
        at = torch.clamp(begin + length * along, begin + 0.5, begin + length - 0.5)
        axes.append(at * (2 / side) - 1)
    x, y = axes
    grid = torch.stack(
        [x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    return F.grid_sample(pixels, grid, "bilinear", "border", align_corners=False)


def crop_maps(
    maps: Tensor, boxes: Tensor, flips: Tensor, cells: int, visible: Tensor | None = None
) -> Tensor:
    """Mean density of each of cells x cells parts of a crop, float32 [b, cells, cells], 0 to 1.

    `maps` is uint8 [b, G, G], density = value / 255. The mean is exact: a map cell counts by its
    overlap with the part. `visible`, [cells] or [b, cells]: what EdgeRule gives.
    """
    return crop_grid(maps / 255, boxes, flips, cells, visible)


def crop_grid(
    values: Tensor, boxes: Tensor, flips: Tensor, cells: int, visible: Tensor | None = None
) -> Tensor:
    """crop_maps for any `values` over the unit square, float32 [b, G, G]; attention, say."""
    grid = values.shape[-1]
    lower = torch.arange(grid, device=values.device, dtype=torch.float32)
    edges = torch.arange(cells + 1, device=values.device) / cells
    shares = []
    for axis in (0, 1):
        at = (boxes[:, axis, None] + boxes[:, axis + 2, None] * edges) * grid
        low, high = at[:, :-1, None], at[:, 1:, None]
        overlap = torch.clamp(torch.minimum(high, lower + 1) - torch.maximum(low, lower), min=0)
        share = overlap / (high - low)
        if visible is not None:
            share = share * visible[..., None]
        shares.append(torch.where(flips[:, 1 - axis, None, None], share.flip(1), share))
    rows, columns = shares
    return rows @ values @ columns.transpose(1, 2)


def pool_counts(counts: Tensor, cells: int) -> Tensor:
    """Density of each of cells x cells parts of a stored crop, float32 [b, cells, cells].

    `counts` is uint8 [b, c, c] of a bank, as flipped; exact. `cells` must divide c.
    """
    part = counts.shape[-1] // cells
    return F.avg_pool2d(counts[:, None].float(), part)[:, 0] / BANK_CELL**2


def _between(table: Tensor, density: Tensor) -> Tensor:
    """`table`, float32 [STEPS + 1] for densities 0 to 1, at each `density`; linear in between."""
    at = density.clamp(0, 1) * STEPS
    low = at.long().clamp(max=STEPS - 1)
    below = table[low]
    return below + (table[low + 1] - below) * (at - low)


def loss_weights(
    density: Tensor,
    temperature: float | Tensor,
    normalise: Normalise = "min",
    least: Tensor | None = None,
) -> Tensor:
    """exp(clip(density / T, -20, 20)) of `density` [b, c, c], divided as `normalise` says.

    min: by the least of the image, the published form (KAMIM utils/KAMIM.py). Weights are at least
    1, and the scale of the loss depends on the detector and on T. mean: by the mean of the image,
    so that all images count alike. batch: by the mean of all images given, so that an image with
    more keypoints counts for more. least: [b], the least density of each image, if it is not that
    of `density`.
    """
    raw = torch.exp(torch.clamp(density.float() / temperature, -20, 20))
    if normalise == "batch":
        return raw / raw.mean()
    flat = raw.flatten(1)
    if normalise == "mean":
        base = flat.mean(1)
    elif least is None:
        base = flat.amin(1)
    else:
        base = torch.exp(torch.clamp(least / temperature, -20, 20))
    return raw / base[:, None, None]
