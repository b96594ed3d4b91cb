"""Which samples a run trains on: a share, drawn by a score, and drawn again every few epochs.

In the spirit of PASS (AAAI 2024), whose formulas are not known to us: this method is our own. The
score is the mean density of a record's map, which is fixed, or the record's loss, from one pass
over the set before the draw. RUN/scores-STEP.npy, float32 [records], is read without unpickling.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from shards import Batch, Plan, WeightedCrops
from shards.crops import Ints
from shards.errors import UserError
from shards.progress import counted
from shards.records import Records
from shards.rng import Purpose, uniform
from train.checkpoint import read_rows, write_rows
from train.distributed import Process, rows_of_all, together
from train.features import frames_of
from train.masking import Masking
from train.models import Cells, in_bf16, normalised
from train.progress import busy, say
from train.recipes import Recipe

SEED = 0  # of the cells that are masked in a look at losses
LEAST = 1e-30  # of a score: 0 comes after all others
FIXED = "density"
NEVER = 1 << 62  # a step
Scores = NDArray[np.float32]


class Selection:
    """The plan of each step of a run: of all samples, or of those that are drawn.

    The draws are numbered; number n begins at step ceil(n * select_epochs * steps_an_epoch), and is
    a pure function of (seed, n, scores). Of each of several sets the same share is drawn. The first
    draw by losses is at random: a model that was not trained yet says nothing.
    `order` makes the plan of a subset; detector: whose densities are the scores.
    """

    def __init__(
        self,
        recipe: Recipe,
        seed: int,
        records: Records,
        order: Callable[..., Plan],
        detector: str | None = None,
    ) -> None:
        self.recipe, self.seed, self.records = recipe, seed, records
        self.order, self.detector, self.whole = order, detector, order()
        self.all = recipe.select == 1
        self.counts = [max(1, round(recipe.select * len(one))) for one in records.sets]
        self.epoch = self.whole.total if self.all else sum(self.counts)
        self.steps_an_epoch = self.epoch / recipe.batch
        self.fixed = recipe.select_by == FIXED
        self.scores: Scores | None = None
        self._drawn = lru_cache(2)(self._draw)

    def steps(self, epochs: float) -> int:
        """Whole steps in `epochs`."""
        if self.all:
            return self.whole.steps(epochs)
        return replace(self.whole, count=self.epoch, windows=None, mixture=None).steps(epochs)

    def plan(self, step: int) -> Plan:
        """What `step` trains on; its scores must have been read or looked at."""
        return self.whole if self.all else self._drawn(self._number(step))

    def end(self, step: int) -> int:
        """The first step after `step` that another draw is for."""
        return NEVER if self.all else self._begin(self._number(step) + 1)

    def due(self, step: int) -> bool:
        """Whether losses are looked at before `step`."""
        return self._written(step) == step and not self.fixed

    def restore(self, run: Path, step: int, done: bool = False) -> None:
        """Before `step` of a run that goes on: read the scores in force, if they were written by an
        earlier step, or by `step` itself and it is `done`.
        """
        written = self._written(step)
        if written is not None and (done or written != step):
            self._use(read_scores(path_of(run, written), len(self.records)))

    def score(self, run: Path, first: int, process: Process) -> None:
        """Before the first step of all: write fixed scores, and use them."""
        if self.all or not self.fixed or first:
            return
        path, detector = path_of(run, 0), self.detector
        assert detector is not None

        def write() -> None:
            if process.rank == 0:
                with busy("reading densities", total=len(self.records)) as read:
                    of_sets = [
                        one.mean_densities(detector, read.update) for one in self.records.sets
                    ]
                write_rows(path, np.concatenate(of_sets))

        together(process, write)
        self._use(read_scores(path, len(self.records)))

    def refresh(
        self, run: Path, step: int, losses: Callable[[], Tensor], process: Process
    ) -> float:
        """Write the losses of every record before `step`, and draw by them from here on. Returns
        the seconds that this took.
        """
        began = time.perf_counter()
        found = losses().cpu().numpy()
        if process.rank == 0:
            write_rows(path_of(run, step), found)
        if process.ranks > 1:
            dist.barrier()
        self._use(found)
        spent = time.perf_counter() - began
        if process.rank == 0:
            say(
                f"losses of {len(self.records):,} records looked at before step {step + 1}, in "
                f"{spent:.1f} s; {self.epoch:,} of them drawn"
            )
        return spent

    def describe(self) -> str:
        """What is drawn, in one line; empty if nothing is."""
        recipe = self.recipe
        if self.all:
            return ""
        by = f"{recipe.select_by.replace('_', ' ')} to the power of {recipe.select_power:g}"
        first = "" if self.fixed else ", the first time at random"
        return (
            f"trains on {self.epoch:,} of {len(self.records):,} samples, drawn by {by} every "
            f"{counted(recipe.select_epochs, 'epoch')}{first}; a selection of our own design"
        )

    def _begin(self, number: int) -> int:
        """The first step of draw `number`."""
        return math.ceil(number * self.recipe.select_epochs * self.steps_an_epoch - 1e-9)

    def _number(self, step: int) -> int:
        """The draw that `step` trains on."""
        near = int(step / (self.recipe.select_epochs * self.steps_an_epoch))
        return max(n for n in (near - 1, near, near + 1) if n == 0 or self._begin(n) <= step)

    def _written(self, step: int) -> int | None:
        """The step before which the scores of `step` are written; None: there are none."""
        if self.all:
            return None
        number = self._number(step)
        return 0 if self.fixed else self._begin(number) if number else None

    def _use(self, scores: Scores) -> None:
        self.scores = scores
        self._drawn.cache_clear()

    def _draw(self, number: int) -> Plan:
        """The plan of draw `number`."""
        power = self.recipe.select_power if number or self.fixed else 0.0
        scores = self.scores if number or self.fixed else np.ones(len(self.records), np.float32)
        assert scores is not None
        found, begin = [], 0
        for one, count in zip(self.records.sets, self.counts, strict=True):
            mine = scores[begin : begin + len(one)]
            found.append(begin + drawn(mine, count, power, self.seed, number, begin))
            begin += len(one)
        subset = np.concatenate(found)
        return self.order(subset=subset)


def drawn(scores: Scores, count: int, power: float, seed: int, number: int, begin: int = 0) -> Ints:
    """`count` of the samples with `scores` [n], ascending, of draw `number`: those with the highest
    keys u ** (1 / score**power), with u in (0, 1] by (seed, number, `begin` + sample).

    Efraimidis and Spirakis' weighted sampling without replacement (2006): each is drawn with a
    chance in proportion to score**power among those that are left. In logarithms, in which the
    least of log(-log u) - power * log(score) are the highest keys.
    """
    u = 1 - uniform(Purpose.CHOICE, seed, number, begin + np.arange(len(scores)))
    with np.errstate(divide="ignore"):  # u of 1 is first
        race = np.log(-np.log(u))
    race -= power * np.log(np.maximum(scores.astype(np.float64), LEAST))
    return np.sort(np.argsort(race, kind="stable")[:count])


def losses_of_all(
    model: Any,
    crops: WeightedCrops,
    masking: Masking,
    batches: Iterable[Batch],
    weighing: dict[str, Tensor] | None,
    process: Process,
) -> Tensor:
    """The loss of each record's whole frame, float32 [records], at least 0, where the model is.

    The same cells are masked in all. `batches` show each record once at least, to this process or
    to another; their crops are not used. weighing: what weighs them beside their maps, or None for
    the plain loss. A record that was not reached, or has no finite loss, has 0.
    """
    device, training = masking.device, model.training
    found = torch.zeros(masking.records, device=device)
    one = masking.fixed(1, SEED)
    model.eval()
    with torch.no_grad():
        for frames, tensors in frames_of(batches, masking.recipe.size, device):
            images = normalised(frames)
            weights = None if weighing is None else crops.weigh(tensors | weighing, images)
            cells = alike(one, len(images))
            with in_bf16(device):
                output = model(images, *cells)
            of_each = [
                model.loss(
                    output[n : n + 1],
                    images[n : n + 1],
                    one,
                    None if weights is None else weights[n : n + 1],
                )
                for n in range(len(images))
            ]
            rows, numbers = torch.stack(of_each), tensors["samples"]
            ranks = process.ranks
            found[rows_of_all(numbers, ranks)] = rows_of_all(rows.float(), ranks)
    model.train(training)
    return found.nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)


def alike(one: Cells, count: int) -> Cells:
    """The cells of one image as those of `count` images."""
    masked = one.masked.expand(count, *one.masked.shape[1:])
    return Cells(masked, None if one.encoded is None else one.encoded.expand(count, -1))


def path_of(run: Path, step: int) -> Path:
    return run / f"scores-{step:08d}.npy"


def read_scores(path: Path, count: int) -> Scores:
    """The scores in `path`, float32 [count]. UserError if they are not it."""
    return read_rows(path, np.dtype(np.float32), (count,))


def check_selection(recipe: Recipe, bank: bool) -> None:
    """UserError unless samples can be drawn as the recipe says."""
    if not 0 < recipe.select <= 1:
        raise UserError(f"select {recipe.select:g} is out of range; give a share above 0, up to 1")
    if recipe.select_epochs < 1e-4:
        raise UserError(
            f"select_epochs {recipe.select_epochs:g} is out of range; give 1e-4 or more"
        )
    if recipe.select == 1 or recipe.select_by != "weighted_loss":
        return
    if recipe.temperature is None:
        raise UserError("select_by=weighted_loss, and the recipe has no weights; use loss")
    if bank:
        raise UserError("--bank loads no maps, which select_by=weighted_loss needs; use loss")
    if recipe.weights == "shuffled" or recipe.normalise == "batch":
        what = "weights=shuffled" if recipe.weights == "shuffled" else "normalise=batch"
        raise UserError(
            f"with {what} the weights of an image depend on its batch, which "
            "select_by=weighted_loss cannot use; use loss"
        )
