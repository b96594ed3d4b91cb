"""The training loop, from shards to checkpoints; `pretrain` reads from top to bottom.

In: a set of shards, a recipe, a seed. Out: a run folder: run.json, metrics.jsonl, TensorBoard
events, checkpoints and, at the end, pictures. Killed and resumed, the losses are the same.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards import writing
from shards.crops import to_device
from train import checkpoint
from train.check import check, wanted_maps
from train.data import make_plan, open_loader, open_records
from train.inputs import MEAN, STD, find_visible, prepare
from train.log import Log, say
from train.method import Masking, make_model
from train.model import model_flops
from train.pictures import draw_loss, draw_reconstructions
from train.processes import agree, connect, find_place, together
from train.schedule import learning_rate
from train.setup import (
    Run,
    count_micro_steps,
    describe,
    device_name,
    find_device,
    parameter_groups,
    restore,
    run_facts,
)
from train.stopping import Stop, Stopped

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def pretrain(run: Run) -> None:
    """Train; returns when all steps are done.

    Raises ValueError, before the first step, if shards, recipe and what is in `out` do not fit
    together, and Stopped, after saving, on SIGTERM or a first Ctrl-C.
    """
    recipe = run.recipe
    device = find_device(run.device)
    place = connect(find_place(), device)
    rank, ranks = place.rank, place.ranks

    # What to train on.
    records = together(place, lambda: open_records(run))
    detector = together(place, lambda: check(run, records.manifest, place))
    micro_steps = count_micro_steps(recipe, ranks)
    plan = make_plan(run, records, micro_steps)
    total = plan.steps(recipe.epochs)
    if total < 1:
        raise ValueError(
            f"{recipe.epochs:g} epochs of {len(records)} records make no batch of {recipe.batch}; "
            "give more --epochs or a smaller --batch"
        )
    steps_an_epoch = len(records) / recipe.batch
    warmup = min(round(recipe.warmup * steps_an_epoch), total - 1)
    last = min(run.steps or total, total)
    window = plan.windows.limit if plan.windows else 0
    facts = run_facts(run, records.manifest, detector, window)
    visible = find_visible(recipe, records.manifest, detector, device)
    maps = wanted_maps(recipe, detector)

    # The model, and where it left off.
    torch.manual_seed(run.seed)
    model = make_model(recipe).to(device)
    masking = Masking(
        recipe, run.seed, records.manifest, maps, model.encoder, steps_an_epoch, device
    )
    groups = parameter_groups(model, recipe)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, recipe.beta2), fused=device.type == "cuda")
    first, seconds = together(place, lambda: restore(run, facts, model, optimizer, device))
    agree(place, run.out, first, facts["shards"])
    together(place, lambda: masking.restore(run.out, first))
    flops = model_flops(model, recipe.size, masking.example())
    peak = next((p for n, p in PEAK_FLOPS.items() if n in device_name(device)), None)
    parallel: nn.Module = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    forward: Any = (
        torch.compile(parallel, dynamic=False)
        if run.compile and device.type == "cuda"
        else parallel
    )
    if rank == 0:
        hiding = masking.describe()
        describe(run, records, facts, model, hiding, total, micro_steps, ranks, device)
        if first:
            say(f"going on after step {first}")

    # The stream of batches.
    mine = rank, ranks
    loader = open_loader(run, records, plan, (first, last), mine, maps, device)
    batches = to_device(loader, device)
    part = recipe.batch // (ranks * micro_steps)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    stop = Stop()
    held = writing.alone(run.out) if rank == 0 else nullcontext()
    pending: list[tuple[int, float, Tensor]] = []  # (step, lr, [loss, grad norm, mean weight])
    waited, since = 0.0, time.perf_counter()
    clock = since - seconds  # training began then, had it never paused

    with held, Log(run.out, first, run.wandb, facts) if rank == 0 else nullcontext() as log:
        for step in range(first, last):
            if masking.due(step):
                began = time.perf_counter()
                once = replace(plan, batch=part * ranks, micro_steps=1)  # its crops are not used
                passes = 0, -(-len(records) // once.batch)
                frames = open_loader(run, records, once, passes, mine, [], device)
                masking.refresh(run.out, step, model.encoder, frames, mine)
                since += time.perf_counter() - began
                if rank == 0:
                    say(f"attention of {len(records):,} records looked at before step {step + 1}, "
                        f"in {time.perf_counter() - began:.1f} s")  # fmt: skip
            rate = learning_rate(step, total, warmup, recipe.peak, recipe.floor, recipe.start)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            noise = masking.noise(step)
            sums = torch.zeros(2, device=device)  # loss, mean weight
            for micro_step in range(micro_steps):
                asked = time.perf_counter()
                batch, tensors = next(batches)
                waited += time.perf_counter() - asked
                assert batch.step == step
                images, weights = prepare(tensors, recipe, visible)
                begin = (micro_step * ranks + rank) * part
                hidden = masking.hidden(noise[begin : begin + part], step, batch.samples, tensors)
                # Gradients are averaged over processes once, in the last micro-step.
                alone = ranks > 1 and micro_step < micro_steps - 1
                with parallel.no_sync() if alone else nullcontext():  # type: ignore[operator]
                    with autocast:
                        output = forward(images, *hidden)
                    loss = model.loss(output, images, hidden, weights) / micro_steps
                    loss.backward()
                mean_weight = weights.mean() if weights is not None else torch.ones_like(loss)
                sums += torch.stack([loss.detach(), mean_weight / micro_steps])
            norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            pending.append((step, rate, torch.stack([sums[0], norm.detach(), sums[1]])))

            stopping = stop.agreed(step, run.log_every, ranks, device)
            saving = stopping or (step + 1) % run.save_every == 0 or step + 1 == last
            # A pass over all records may take minutes, in which a signal has to wait.
            saving = saving or masking.due(step + 1)
            if saving or (step + 1) % run.log_every == 0:
                rows = _rows(pending, steps_an_epoch, ranks)  # the one synchronisation
                now = time.perf_counter()
                spent = now - since
                speed = len(rows) * recipe.batch / spent
                rows[-1] |= {
                    "images_per_s": speed,
                    "waiting": waited / spent,
                    "seconds": now - clock,
                }
                if peak:
                    rows[-1]["mfu"] = speed * flops / (peak * ranks)
                if loader.damaged:
                    rows[-1]["damaged"] = len(loader.damaged)
                if rank == 0:
                    log.rows(rows, total)  # type: ignore[union-attr]
                pending, waited, since = [], 0.0, time.perf_counter()
            if saving and rank == 0:
                state: dict[str, Any] = {"model": model.state_dict()}
                state |= {"optimizer": optimizer.state_dict()}
                state |= {"run": facts, "seconds": now - clock}
                path = checkpoint.save(run.out / "checkpoints", step + 1, state)
                since = time.perf_counter()
                clock += since - now
            if stopping:
                if rank == 0:
                    say(f"stopped after step {step + 1}; saved {path}; go on with --resume auto")
                batches.close()
                raise Stopped(stop.wished)

    # Pictures of the last step's first images, whether this process trained on them or not.
    if rank == 0 and last == total:
        draw_loss(run.out)
        loader = open_loader(run, records, plan, (total - 1, total), (0, ranks), maps, device)
        batch, tensors = next(to_device(loader, device))
        images, weights = prepare(tensors, recipe, visible)
        noise = masking.noise(total - 1)[:part]
        masking.restore(run.out, total - 1, done=True)
        hidden = masking.hidden(noise, total - 1, batch.samples, tensors)
        with torch.no_grad(), autocast:
            draw_reconstructions(run.out, model, images, hidden, weights, MEAN, STD)
    if ranks > 1:
        dist.destroy_process_group()


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
