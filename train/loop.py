"""The training loop, from shards to checkpoints; `pretrain` reads from top to bottom.

In: a set of shards, a recipe, a seed. Out: a run folder: run.json, metrics.jsonl, TensorBoard
events, checkpoints and, at the end, pictures. Killed and resumed, the losses are the same.
"""

import math
import os
import signal
import time
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards import ShardSet, writing
from shards.crops import pinned, to_device
from shards.ffcv_loader import FfcvLoader
from shards.loader import Loader
from shards.manifest import Detector
from shards.plan import Plan
from train import checkpoint
from train.inputs import MEAN, STD, find_visible, prepare
from train.log import Log, say
from train.loss import block_masks, masked_l1
from train.model import CELL, SimMIM, model_flops
from train.pictures import draw_loss, draw_reconstructions
from train.schedule import learning_rate
from train.setup import (
    Run,
    check,
    count_micro_steps,
    describe,
    device_name,
    find_device,
    parameter_groups,
    restore,
    run_facts,
)

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


class Stopped(Exception):
    """A signal (its number is the argument) arrived; the run was saved and can be resumed."""


def pretrain(run: Run) -> None:
    """Train; returns when all steps are done.

    Raises ValueError, before the first step, if shards, recipe and what is in `out` do not fit
    together, and Stopped, after saving, on SIGTERM or a first Ctrl-C.
    """
    recipe = run.recipe
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(run.device)

    # What to train on.
    records = ShardSet(run.shards)
    detector = check(run, records.manifest, rank, ranks)
    micro_steps = count_micro_steps(recipe, ranks)
    plan = Plan(
        len(records), recipe.batch, run.seed, micro_steps, recipe.area, vertical=recipe.vertical
    )
    total = plan.steps(recipe.epochs)
    if total < 1:
        raise ValueError(
            f"{recipe.epochs:g} epochs of {len(records)} records make no batch of {recipe.batch}; "
            "give more --epochs or a smaller --batch"
        )
    steps_an_epoch = len(records) / recipe.batch
    warmup = min(round(recipe.warmup * steps_an_epoch), total - 1)
    last = min(run.steps or total, total)
    facts = run_facts(run, records.manifest, detector)
    visible = find_visible(recipe, records.manifest, detector, device)

    # The model, and where it left off.
    torch.manual_seed(run.seed)
    model = SimMIM(recipe.model, recipe.size, recipe.options).to(device)
    groups = parameter_groups(model, recipe)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=device.type == "cuda")
    first = restore(run, facts, model, optimizer, device)
    flops = model_flops(model, recipe.size)
    peak = next((p for n, p in PEAK_FLOPS.items() if n in device_name(device)), None)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    parallel: nn.Module = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    forward: Any = torch.compile(parallel) if run.compile and device.type == "cuda" else parallel
    if rank == 0:
        describe(run, records, facts, model, total, micro_steps, ranks, device)
        if first:
            say(f"going on after step {first}")

    # The stream of batches.
    loader = open_loader(run, records, plan, (first, last), (rank, ranks), detector, device)
    batches = to_device(loader, device)
    part, cells = recipe.batch // (ranks * micro_steps), recipe.size // CELL
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    stop = _Stop()
    held = writing.alone(run.out, run.out / ".lock") if rank == 0 else nullcontext()
    pending: list[tuple[int, float, Tensor]] = []  # (step, lr, [loss, grad norm, mean weight])
    waited, since = 0.0, time.perf_counter()

    with held, Log(run.out, first, run.wandb, facts) if rank == 0 else nullcontext() as log:
        for step in range(first, last):
            rate = learning_rate(step, total, warmup, recipe.peak, recipe.floor, recipe.start)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            masks = block_masks(run.seed, step, recipe.batch, cells, recipe.mask_ratio, device)
            sums = torch.zeros(2, device=device)  # loss, mean weight
            for micro_step in range(micro_steps):
                asked = time.perf_counter()
                batch, tensors = next(batches)
                waited += time.perf_counter() - asked
                assert batch.step == step
                images, weights = prepare(tensors, recipe, visible)
                begin = (micro_step * ranks + rank) * part
                mask = masks[begin : begin + part]
                # Gradients are averaged over processes once, in the last micro-step.
                alone = ranks > 1 and micro_step < micro_steps - 1
                with parallel.no_sync() if alone else nullcontext():  # type: ignore[operator]
                    with autocast:
                        reconstruction = forward(images, mask)
                    loss = masked_l1(reconstruction, images, mask, weights) / micro_steps
                    loss.backward()
                mean_weight = weights.mean() if weights is not None else torch.ones_like(loss)
                sums += torch.stack([loss.detach(), mean_weight / micro_steps])
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            pending.append((step, rate, torch.stack([sums[0], norm.detach(), sums[1]])))

            stopping = stop.agreed(step, run.log_every, ranks, device)
            saving = stopping or (step + 1) % run.save_every == 0 or step + 1 == last
            if saving or (step + 1) % run.log_every == 0:
                rows = _rows(pending, steps_an_epoch, ranks)  # the one synchronisation
                spent = time.perf_counter() - since
                speed = len(rows) * recipe.batch / spent
                rows[-1] |= {"images_per_s": speed, "waiting": waited / spent}
                if peak:
                    rows[-1]["mfu"] = speed * flops / (peak * ranks)
                if loader.damaged:
                    rows[-1]["damaged"] = len(loader.damaged)
                if rank == 0:
                    log.rows(rows, total)  # type: ignore[union-attr]
                pending, waited, since = [], 0.0, time.perf_counter()
            if saving and rank == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                path = checkpoint.save(run.out / "checkpoints", step + 1, state | {"run": facts})
                since = time.perf_counter()
            if stopping:
                if rank == 0:
                    say(f"stopped after step {step + 1}; saved {path}; go on with --resume auto")
                batches.close()
                raise Stopped(stop.wished)

    # Pictures of the last step's first images, whether this process trained on them or not.
    if rank == 0 and last == total:
        draw_loss(run.out)
        loader = open_loader(run, records, plan, (total - 1, total), (0, ranks), detector, device)
        _, tensors = next(to_device(loader, device))
        images, weights = prepare(tensors, recipe, visible)
        masks = block_masks(run.seed, total - 1, recipe.batch, cells, recipe.mask_ratio, device)
        with torch.no_grad(), autocast:
            draw_reconstructions(run.out, model, images, masks[:part], weights, MEAN, STD)
    if ranks > 1:
        dist.destroy_process_group()


def open_loader(
    run: Run,
    records: ShardSet,
    plan: Plan,
    steps: tuple[int, int],
    place: tuple[int, int],
    detector: Detector | None,
    device: torch.device,
) -> Loader | FfcvLoader:
    """The loader of the set's container, for `steps` (first, end) and `place` (rank, ranks)."""
    common: dict[str, Any] = {"rank": place[0], "ranks": place[1], "workers": run.workers}
    common |= {"detectors": [detector.name] if detector else [], "bank": run.bank}
    if records.manifest.container == "ffcv":
        return FfcvLoader(records, plan, *steps, **common)
    allocate = pinned if device.type == "cuda" else None
    return Loader(records, plan, *steps, skip=run.skip_damaged, allocate=allocate, **common)


def _rows(
    pending: list[tuple[int, float, Tensor]], steps_an_epoch: float, ranks: int
) -> list[dict[str, Any]]:
    """One row a step, with losses and weights averaged over processes. Waits for the device."""
    values = torch.stack([value for _, _, value in pending])
    if ranks > 1:
        dist.all_reduce(values)
        values /= ranks
    rows = []
    for (step, rate, _), (loss, norm, weight) in zip(pending, values.tolist(), strict=True):
        if not math.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {step + 1}; the last checkpoint is sound: lower the "
                "peak learning rate or raise the temperature"
            )
        row = {"step": step, "epoch": (step + 1) / steps_an_epoch, "loss": loss, "lr": rate}
        rows.append(row | {"grad_norm": norm, "mean_weight": weight})
    return rows


class _Stop:
    """SIGTERM and Ctrl-C as a wish: asked for between steps, and agreed on by all processes."""

    def __init__(self) -> None:
        self.wished = 0  # the signal's number
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._wish)

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self.wished = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def agreed(self, step: int, every: int, ranks: int, device: torch.device) -> bool:
        """Whether to stop after `step`. With several processes it costs a sync, every so often."""
        if ranks == 1:
            return bool(self.wished)
        if (step + 1) % every:
            return False
        wish = torch.tensor(self.wished, device=device)
        dist.all_reduce(wish, dist.ReduceOp.MAX)
        self.wished = int(wish.item())
        return bool(self.wished)
