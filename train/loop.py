"""The training loop, from shards to checkpoints; `pretrain` reads from top to bottom.

A run leaves in its folder run.json, metrics.jsonl, TensorBoard events, checkpoints and, at the end,
pictures. Killed and resumed, the losses are the same.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards import Batch, to_device
from shards import files as writing
from train import checkpoint
from train.distributed import Stop, agree, connect, this_process, together
from train.estimate import (
    describe,
    largest_part,
    memory_lines,
    memory_needed,
    say_where,
    synchronize,
    time_lines,
)
from train.log import Log, make_rows
from train.masking import Masking
from train.models import make_model, model_flops
from train.pictures import PICTURES, draw_loss, draw_reconstructions
from train.progress import Progress, busy, say
from train.request import Run
from train.schedule import learning_rate
from train.setup import count_micro_steps, device_name, find_device, make_optimizer, open_data

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
ROWS_PACE = 8.0  # seconds between rows on a CPU, where they cost no wait


def pretrain(run: Run) -> None:
    """Train; returns when all steps are done.

    Raises UserError, before the first step, if shards, recipe and what is in `out` do not fit
    together, and Stopped, after saving, on SIGTERM or a first Ctrl-C.
    """
    recipe = run.recipe
    device = find_device(run.device)
    process = connect(this_process(), device)
    rank, ranks = process.rank, process.ranks

    # --- Data
    data = open_data(run, process, device)
    records, crops, plan = data.records, data.crops, data.plan
    total = plan.steps(recipe.epochs)
    last = min(run.steps or total, total)
    steps_an_epoch = len(records) / recipe.batch
    warmup = min(round(recipe.warmup * steps_an_epoch), total - 1)
    rates = total, warmup, recipe.peak, recipe.floor, recipe.start
    facts = checkpoint.run_facts(run, records.manifest, crops.weights, plan)

    # --- Model, and where it left off
    with busy("making the model", rank == 0):
        torch.manual_seed(run.seed)
        model = make_model(recipe).to(device)
        masking = Masking(recipe, run.seed, records.manifest, model.encoder, steps_an_epoch, device)
        optimizer = make_optimizer(model, recipe, device)
        first, seconds, epochs = together(
            process, lambda: checkpoint.restore(run, facts, model, optimizer, device)
        )
        agree(process, run.out, first, facts["shards"])
        together(process, lambda: masking.restore(run.out, first))
        flops = model_flops(model, recipe.size, masking.example())
        most = largest_part(recipe.micro_batch, flops, device)
        micro_steps = count_micro_steps(recipe, ranks, most)
        plan = replace(plan, micro_steps=micro_steps)
        part = recipe.batch // (ranks * micro_steps)
        needed = memory_needed(model, masking.example(), recipe.size, part, device)
    parallel: nn.Module = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    compiles = run.compile and device.type == "cuda"
    forward: Any = torch.compile(parallel, dynamic=False) if compiles else parallel
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    peak = next((p for n, p in PEAK_FLOPS.items() if n in device_name(device)), None)
    drawn = (run.out / "reconstructions.png").exists()
    idle = first >= last  # nothing to train, and nothing is written
    if rank == 0 and not idle:
        describe(run, records, facts, model, masking.describe(), plan, ranks, device)
        say(*memory_lines(needed, part, device))
    if rank == 0:
        say_where(run, first, last, plan.steps(epochs), steps_an_epoch, rates)

    # --- Steps
    loader = data.load(plan, first, last, maps=data.maps, rank=rank, ranks=ranks)
    batches = to_device(loader, device)
    stop = Stop()
    if ranks > 1:
        stop.listen()

    def every_record(step: int) -> Iterator[Batch]:
        """Each record once, for a look at its attention before `step`; crops are not used."""
        once = replace(plan, batch=part * ranks, micro_steps=1)
        whole = data.load(once, 0, -(-len(records) // once.batch), rank=rank, ranks=ranks)
        return stop.heeded(whole, step, ranks)

    progress = Progress(first, last, total, recipe.batch, rank == 0 and not idle)
    pending: list[tuple[int, float, Tensor]] = []  # (step, lr, [loss, grad norm, mean weight])
    parts, saved = 0, first  # micro-steps of this process; the step of the newest checkpoint
    waited, since = 0.0, time.perf_counter()
    now, clock = since, since - seconds  # training began then, had it never paused

    with (
        writing.alone(run.out) if rank == 0 else nullcontext(),
        Log(run.out, first, run.wandb, facts) if rank == 0 and not idle else nullcontext() as log,
        progress.running(),
    ):
        for step in range(first, last):
            progress.begin(step)
            if masking.due(step):
                with progress.busy("looking at attention"):
                    frames = partial(every_record, step)
                    since += masking.refresh(run.out, step, model.encoder, frames, process)
            rate = learning_rate(step, *rates)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            noise = masking.noise(step)
            sums = torch.zeros(2, device=device)  # loss, mean weight
            cut = False  # by a signal: the step's gradients are dropped
            for micro_step in range(micro_steps):
                timed = parts == 1 and rank == 0  # the first warms up, the second is the rule
                if timed:
                    synchronize(device)
                asked = time.perf_counter()
                batch, tensors = next(batches)
                waited += time.perf_counter() - asked
                assert batch.step == step
                images, weights, *_ = crops(tensors)
                begin = (micro_step * ranks + rank) * part
                cells = masking.hidden(noise[begin : begin + part], step, batch.samples, tensors)
                # Gradients are averaged over processes once, in the last micro-step.
                apart = ranks > 1 and micro_step < micro_steps - 1
                with (
                    parallel.no_sync() if apart else nullcontext(),  # type: ignore[operator]
                    progress.busy("compiling") if compiles and not parts else nullcontext(),
                ):
                    with autocast:
                        output = forward(images, *cells)
                    loss = model.loss(output, images, cells, weights) / micro_steps
                    loss.backward()
                mean_weight = weights.mean() if weights is not None else torch.ones_like(loss)
                sums += torch.stack([loss.detach(), mean_weight / micro_steps])
                progress.advance(part * ranks)
                parts += 1
                if timed:
                    synchronize(device)
                    spent = time.perf_counter() - asked
                    say(*time_lines(spent, micro_steps, last - first, device))
                if parts == 1:  # before, there was nothing to save, and compiling takes long
                    stop.listen()
                if stop.wished and ranks == 1 and micro_step + 1 < micro_steps:
                    cut = True
                    break
            done = step if cut else step + 1
            if not cut:
                norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
                pending.append((step, rate, torch.stack([sums[0], norm.detach(), sums[1]])))

            # What is due after the step: rows, a checkpoint, the end.
            stopping = stop.agreed(step, run.log_every, ranks, device)
            saving = stopping or done % run.save_every == 0 or done == last
            # A pass over all records may take minutes, in which a signal cuts it short.
            saving = (saving or masking.due(done)) and done > saved
            # The first row shows that all is well. On a CPU there is no queue to wait for.
            paced = device.type == "cpu" and ranks == 1
            late = paced and time.perf_counter() - since > ROWS_PACE
            if pending and (saving or late or step == first or done % run.log_every == 0):
                rows = make_rows(pending, steps_an_epoch, ranks)  # the one synchronisation
                now = time.perf_counter()
                speed = len(rows) * recipe.batch / (now - since)
                rows[-1] |= {"images_per_s": speed, "waiting": waited / (now - since)}
                rows[-1] |= {"seconds": now - clock}
                rows[-1] |= {"mfu": speed * flops / (peak * ranks)} if peak else {}
                rows[-1] |= {"damaged": len(loader.damaged)} if loader.damaged else {}
                if log is not None:
                    log.rows(rows, progress)
                pending, waited, since = [], 0.0, time.perf_counter()
            if saving and rank == 0:
                state = {"run": facts, "seconds": now - clock}
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                with progress.busy("saving"):
                    checkpoint.save(run.out / "checkpoints", done, state)
                since = time.perf_counter()
                clock += since - now
            saved = done if saving else saved
            if stopping:
                batches.close()
                stop.end(done, rank)

    # --- Pictures of the last step's first images, whether this process trained on them or not
    if rank == 0 and last == total and not (idle and drawn):
        with busy("drawing pictures"):
            draw_loss(run.out)
            alike = replace(plan, micro_steps=count_micro_steps(recipe, 1, max(PICTURES, part)))
            again = data.load(alike, total - 1, total, maps=data.maps)
            batch, tensors = next(to_device(again, device))
            images, weights, *_ = crops(tensors)
            masking.restore(run.out, total - 1, done=True)
            noise = masking.noise(total - 1)[: len(images)]
            cells = masking.hidden(noise, total - 1, batch.samples, tensors)
            with torch.no_grad(), autocast:
                draw_reconstructions(run.out, model, images, cells, weights)
    if ranks > 1:
        dist.destroy_process_group()
