"""Probes the features while a run trains: linear probe, neighbours, effective rank, attention.

A look does not change the run. It uses whole frames of a labelled set, by default the shards that
are trained on. A tenth of the images is held out from heads and neighbours. The encoder may have
trained on their pixels, never on a label, so a run is the same with and without looks. With
`--probe-set` the encoder has not seen the images either.
"""

import math
import time
from copy import deepcopy
from functools import partial
from typing import Any

import torch

import shards
from shards.errors import UserError
from shards.progress import counted
from shards.remote.storage import is_url
from train.deciles import Deciles
from train.diagnosis import diagnose, is_readable
from train.features import Bar, Encoder, features_of, frames_of
from train.masking import Masking
from train.metrics import COLLAPSED, DECILES
from train.models import model_flops, normalised
from train.probe import FEWEST, HELD_OUT, effective_rank, linear_probe, nearest_neighbours
from train.request import Run, count_classes
from train.setup import WINDOW, Data

LEAST, MOST = 500, 20_000  # images of a look, where there are as many
SHARE, LIMIT = 0.01, 0.02  # of a run's computation: for forward passes; of its time, for all
PART, SEEN = 128, 32  # images of a forward pass; whose attention is looked at
SEED = 0  # of every run: seeds are compared on the same images
NEIGHBOURS = 20


class Looks:
    """When a run's features are looked at, and on what. UserError if the set cannot serve.

    `flops`: of training, per image. The model that is looked at is a copy. Without `masking` its
    error is not told by density.
    """

    def __init__(
        self,
        run: Run,
        data: Data,
        encoder: Any,
        flops: float,
        total: int,
        device: torch.device,
        masking: Masking | None = None,
    ) -> None:
        recipe = run.recipe
        self.size, self.device, self.every, self.total = recipe.size, device, run.probe_every, total
        self.epoch = data.selection.steps_an_epoch
        self.batch, self.classes, self.warned = recipe.batch, 0, False
        records = data.records.sets[0]  # of several, the first
        if run.probe_set is not None:
            where: dict[str, Any] = {"patience": run.patience}
            if is_url(run.probe_set):
                where |= {"cache": run.cache, "cache_limit": run.cache_limit}
            records = shards.open(run.probe_set, **where)
        skip = run.skip_damaged and run.probe_set is None
        load = partial(records.loader, device=str(device), workers=run.workers, skip=skip)
        self.without = ""
        self.where = str(run.probe_set or records.folder)
        try:
            self.classes = count_classes({self.where: records})
        except UserError as error:
            if run.probe_set is not None:
                raise
            self.without = f"; no probe, only rank and attention: {error}"
        images = self.every * data.selection.epoch  # that are trained on between two looks
        cost = model_flops(encoder, recipe.size, ()) / 3 / flops  # of one image, trained on: 1
        wanted = min(len(records), int(max(LEAST, min(MOST, SHARE * images / cost))))
        steps = math.ceil(wanted / PART)
        self.count = wanted // steps * steps
        if self.classes and self.count <= FEWEST:
            self.classes = 0
            self.without = f"; no probe, only rank and attention: {self.count} images"
        self.share = self.count * cost / images
        self.deciles: Deciles | None = None
        if masking is not None:
            try:
                self.deciles = Deciles(run, records, masking, load)
                self.share += self.deciles.count / 3 / images
            except UserError as error:
                self.without += f"; no error by density: {error}"
        plan = partial(records.plan, seed=SEED, window=WINDOW if records.copies else 0)
        self.load = partial(load, plan(self.count // steps), 0, steps)
        self.few = partial(load, plan(min(SEEN, len(records))), 0, 1)

    def due(self, done: int) -> bool:
        """Whether the features are looked at after `done` steps: after the first, every so many
        epochs, at a tenth of the run, where attention should have left uniform, and at its end.
        """
        before, now = ((step / self.epoch + 1e-9) // self.every for step in (done - 1, done))
        return done in (1, math.ceil(self.total / 10), self.total) or now > before

    def look(self, model: Any, bar: Bar) -> dict[str, float]:
        """Shares of the held-out tenth that a linear probe and 20 neighbours get right, effective
        rank, and mean over blocks of the attention distance in px; mutual information of the block
        that has most; the error by tenths of density.
        """
        began = time.perf_counter()
        copied = deepcopy(model).eval().requires_grad_(False)
        frozen = Encoder("", copied.encoder, self.size)
        block, title = frozen.default_block, "looking at features"
        features, labels = features_of(
            frozen, self.load(), self.count, block, "mean", self.device, title, bar
        )
        found: dict[str, float] = {}
        if self.classes:
            held = max(1, round(HELD_OUT * self.count))
            asked, known = (features[:held], labels[:held]), (features[held:], labels[held:])
            score = linear_probe(known, asked, self.classes, SEED, device=self.device, bar=bar)
            near = nearest_neighbours(
                known, asked, self.classes, NEIGHBOURS, device=self.device, bar=bar
            )
            found |= {"probe_top1": score.top1, "knn_top1": near}
        found["effective_rank"] = effective_rank(features)
        if is_readable(frozen.model):
            frames, _ = next(frames_of(self.few(), self.size, self.device))
            rows = diagnose(frozen.model, normalised(frames))
            found["attention_distance"] = sum(row["distance"] for row in rows) / len(rows)
            found["attention_uniform"] = rows[0]["uniform"]
            found["attention_nmi"] = max(row["nmi"] for row in rows)
        found |= self.deciles.look(copied) if self.deciles else {}
        return found | {"look_seconds": time.perf_counter() - began}

    def describe(self) -> str:
        """What a look is, and what it costs, in one line."""
        held = f", {round(HELD_OUT * self.count):,} of them held out from the heads"
        return (
            f"features are looked at every {counted(self.every, 'epoch')}, on {self.count:,} "
            f"images of {self.where}{held if self.classes else ''}: about {self.share:.1%} more to "
            f"compute{self.without}"
        )

    def lines(self, row: dict[str, float], done: int) -> list[str]:
        """What the row of a look says, what it costs, and warnings, of which each comes once."""
        parts = [f"features after epoch {row['epoch']:.2f}: "]
        if self.classes:
            parts.append(f"probe {row['probe_top1']:.2%}, {NEIGHBOURS}-NN {row['knn_top1']:.2%}, ")
        parts.append(f"effective rank {row['effective_rank']:.1f}")
        if "attention_nmi" in row:
            parts.append(
                f", attention {row['attention_distance']:.1f} px (uniform "
                f"{row['attention_uniform']:.1f}), information {row['attention_nmi']:.4f}"
            )
        if self.deciles:
            least, most = row[DECILES[0]], row[DECILES[-1]]
            parts.append(f", error {least:.3f} where density is least, {most:.3f} where it is most")
        lines = []
        between = self.every * self.epoch * self.batch / row["images_per_s"]
        share = row["look_seconds"] / between
        parts.append(f"; {row['look_seconds']:.1f} s")
        if done > 1:  # a first step is slower than others
            parts.append(f", {share:.1%} of the training since the last")
        if done > 1 and share > LIMIT:
            rarer = max(self.every * share / LIMIT, self.every + 1)
            lines.append(
                f"note: looks at features take {share:.1%} of the time of training; --probe-every "
                f"{math.ceil(rarer)} takes less"
            )
        flat = row.get("attention_nmi", 1.0) < COLLAPSED
        if flat and not self.warned and done >= math.ceil(self.total / 10):
            self.warned = True
            lines.append(
                f"warning: {done / self.total:.0%} of the run is done and attention is uniform "
                f"still: mutual information of query and key is below {COLLAPSED} in every block, "
                "so it does not depend on the image; features will be worth little: train longer, "
                "or raise the peak learning rate"
            )
        return ["".join(parts), *lines]
