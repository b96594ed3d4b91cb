"""Where a model errs: its plain error at masked cells, by tenths of their density.

On the same few crops each time, under the same masks, for every seed: a tenth of a step's own
cells would need a sort in each step, and would be other cells each time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shards import WeightedCrops, to_device
from shards.records import Records
from train.loss import on_one_grid
from train.masking import Masking
from train.metrics import DECILES
from train.models import MEAN, STD, in_bf16
from train.request import Run
from train.setup import WINDOW, find_detector

MOST = 128  # crops
SEED = 0  # of every run


class Deciles:
    """The crops of `records` that a run's model is tried on. UserError if they have no densities
    of the run's detector (that weights would be of, where the recipe has none). `load`: a plan's
    batches of them.
    """

    def __init__(
        self, run: Run, records: Records, masking: Masking, load: Callable[..., Any]
    ) -> None:
        recipe, self.masking = run.recipe, masking
        detector = find_detector(run, records)
        self.crops = WeightedCrops(
            records, detector, size=recipe.size, w_ps=recipe.w_ps, mean=MEAN, std=STD
        ).to(masking.device)
        self.count = min(MOST, len(records))
        remote = any(one.copies for one in records.sets)
        crops: dict[str, Any] = {"area": recipe.area, "vertical": recipe.vertical}
        plan = records.plan(self.count, SEED, window=WINDOW if remote else 0, **crops)
        self.load = partial(load, plan, 0, 1, maps=[detector])

    def look(self, model: Any) -> dict[str, float]:
        """The error of each tenth, by its name; `model` is as it is evaluated."""
        _, tensors = next(to_device(self.load(), self.masking.device))
        cells = self.masking.fixed(self.count, SEED)
        with torch.inference_mode():
            images, *_ = self.crops(tensors)
            with in_bf16(images.device):
                output = model(images, *cells)
            errors = by_density(model, output, images, cells, self.crops.density(tensors))
        return dict(zip(DECILES, errors.tolist(), strict=True))


def by_density(model: Any, output: Tensor, images: Tensor, cells: Any, density: Tensor) -> Tensor:
    """The mean unweighted error of `output` in each tenth of the masked cells, float32 [10], from
    the least density [b, c, c] to the most; of equal ones the first come first.

    It is the model's own loss with a weight of 1 in the tenth, and of 0 elsewhere.
    """
    grown, masked = on_one_grid(density, model.mask_of(cells))
    where = masked.flatten().nonzero()[:, 0]
    order = where[grown.flatten()[where].argsort(stable=True)]
    errors = []
    for tenth in order.tensor_split(len(DECILES)):
        chosen = torch.zeros_like(grown)
        chosen.view(-1)[tenth] = 1
        loss = model.loss(output, images, cells, chosen)
        errors.append(loss * (len(order) / max(1, len(tenth))))
    return torch.stack(errors)
