"""The training loop, from shards to checkpoints; `pretrain` reads from top to bottom.

A run leaves in its folder run.json, metrics.jsonl, TensorBoard events, checkpoints and, at the end,
pictures. Killed and resumed, the losses are the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from shards import Plan, to_device
from shards import files as writing
from shards.errors import UserError
from shards.rng import Purpose, mix
from train import checkpoint
from train.cuda import peak_flops, pin_attention
from train.distributed import Stop, agree, connect, gathered, this_process, together
from train.estimate import (
    fitting,
    largest_part,
    memory_free,
    memory_lines,
    memory_of,
    memory_told,
    say_run,
    say_where,
    time_lines,
    write_run,
)
from train.log import Log, Window
from train.look import Looks
from train.masking import Masking
from train.metrics import METRICS
from train.models import in_bf16, make_model, model_flops
from train.pictures import FOLLOWED, PICTURES, Followed, draw_reconstructions
from train.progress import Doing, Progress, busy, say
from train.request import Run, compiler_missing
from train.schedule import learning_rate, temperature
from train.selection import losses_of_all
from train.setup import (
    Data,
    clipped,
    count_micro_steps,
    device_name,
    make_optimizer,
    open_data,
    start_device,
)
from train.step import Pace, Step, compiled, in_parallel, weighed
from train.stream import Stream
from train.weights import start_from

LOADING = (UserError, OSError, MemoryError)  # what keeps a batch from being loaded
ROWS_PACE = 8.0  # seconds between rows on a CPU, where they cost no wait


def pretrain(run: Run) -> None:
    """Train; returns when all steps are done.

    Raises UserError, before the first step, if shards, recipe and what is in `out` do not fit
    together; Stopped, after saving, on SIGTERM or a first Ctrl-C; and one of LOADING for what
    cannot be loaded, after saving if there is one process.
    """
    recipe = run.recipe
    device = start_device(run)
    process = connect(this_process(), device)
    rank, ranks = process.rank, process.ranks

    # --- Data
    data = open_data(run, process, device)
    records, crops, plan, selection = data.records, data.crops, data.plan, data.selection
    total = selection.steps(recipe.epochs)
    last = min(run.steps or total, total)
    steps_an_epoch = selection.steps_an_epoch
    warmup = min(round(recipe.warmup * steps_an_epoch), total - 1)
    rates = total, warmup, recipe.peak, recipe.floor, recipe.start
    facts = checkpoint.run_facts(run, records, crops.weights, plan)
    if selection.detector and not crops.weights:
        facts["select_detector"] = selection.detector

    # --- Model, and where it left off
    with busy("making the model", rank == 0):
        torch.manual_seed(run.seed)
        model = make_model(recipe)
        if run.init:  # each process asks, whether it sees a checkpoint or not
            fresh = checkpoint.newest(run.out / "checkpoints") is None
            start = partial(start_from, run.init, model.encoder, recipe.size)
            digest = together(process, start if fresh else str)
            facts |= {"init_sha256": digest} if digest else {}
        model = model.to(device)
        masking = Masking(recipe, run.seed, records, model.encoder, steps_an_epoch, device)
        optimizer = make_optimizer(model, recipe, device)
        average = ModelEmaV3(model, recipe.ema, use_warmup=True) if recipe.ema else None
        beside = average and average.module
        first, seconds, epochs = together(
            process, lambda: checkpoint.restore(run, facts, model, optimizer, beside)
        )
        agree(process, run.out, first, facts["shards"])
        together(process, lambda: masking.restore(run.out, first))
        together(process, lambda: selection.restore(run.out, first))
    idle = first >= last  # nothing to train, and nothing is written
    writes = rank == 0 and not idle

    # --- Micro-steps: how many, and one graph of each
    with busy("measuring the model", rank == 0):
        flops = model_flops(model, recipe.size, masking.example())
        cells = masking.example(early=True)
        asked = recipe.micro_batch or facts.get("micro_batch", 0)
        memory = memory_of(model, cells, recipe.size, device, recipe.checkpoint)
        free = None if run.deterministic else memory  # what is free may differ from start to start
        most = min(gathered(process, largest_part(asked, flops, device, free)))
        micro_steps = count_micro_steps(recipe, ranks, most)
        plan = replace(plan, micro_steps=micro_steps)
        part = facts["micro_batch"] = recipe.batch // (ranks * micro_steps)
        fits = fitting(memory, memory_free(device))
        attention = pin_attention(model, recipe.size, device, timed=not run.deterministic)
        looks = None
        if run.probe_every:
            given = run, data, model.encoder, flops, total, device, masking
            looks = together(process, lambda: Looks(*given))
    alone: nn.Module = Step(model, crops)
    parallel: Any = in_parallel(alone) if ranks > 1 else alone
    compiles = device.type == "cuda" and run.compile and not compiler_missing()
    micro = compiled(parallel) if compiles else parallel
    peak = peak_flops(device_name(device))

    @contextmanager
    def alone_in_folder() -> Iterator[None]:
        """Begin the run's folder, which is no other process's for as long as the block takes."""
        with writing.alone(run.out) if rank == 0 else nullcontext():
            selection.score(run.out, first, process)
            if writes:
                hiding = masking.describe()
                say_run(run, records, facts, model, hiding, plan, selection, ranks, device)
                write_run(run, facts, part)
                say(*filter(None, [attention]), *memory_lines(memory, part, device))
                say(*([looks.describe()] if looks else []))
            if rank == 0 and "init_sha256" in facts and not first:
                say(f"the encoder starts from {run.init}, SHA-256 {facts['init_sha256'][:12]}")
            if rank == 0:
                say_where(run, first, last, selection.steps(epochs), steps_an_epoch, rates)
            yield

    # --- Steps
    stop = Stop()
    stream = Stream(data, micro_steps, process, device, stop)
    if ranks > 1:
        stop.listen()

    def losses(step: int, looking: Doing) -> Tensor:
        """Each record's, for a draw before `step`."""
        weighed_too, now = recipe.select_by == "weighted_loss", temperature(step, total, recipe)
        shown = stream.every_record(step, looking, data.maps if weighed_too else ())
        weighing = weighed(now, device) if weighed_too else None
        return losses_of_all(model, crops, masking, shown, weighing, process)

    progress = Progress(first, last, total, recipe.batch, writes)
    share = peak and flops / (peak * ranks)
    window = Window(seconds, recipe.batch, steps_an_epoch, ranks, share, recipe.clip)
    followed: Followed | None = None
    failure: Exception | None = None  # to load: a damaged record, a store that is gone
    began, saved = False, first  # whether a micro-step is done; the step of the newest checkpoint

    with (
        alone_in_folder(),
        Log(run.out, first, run.wandb, facts) if writes else nullcontext() as log,
        checkpoint.Saver(
            run.out / "checkpoints", run.save_minutes, device, run.out / METRICS
        ) as saver,
        progress.running(),
        memory_told(part, fits),
    ):
        # What cannot be loaded is said before the first step.
        batches = stream.batches(first, max(first, last))
        pace = Pace(batches, device)
        for step in range(first, last):
            progress.begin(step)
            if masking.due(step):
                with progress.busy("saving"):
                    saver.wait()  # a signal would have it said that all is saved
                with progress.busy("looking at attention", len(records)) as looking:
                    frames = partial(stream.every_record, step, looking)
                    window.since += masking.refresh(run.out, step, model.encoder, frames, process)
            if selection.due(step):
                with progress.busy("saving"):
                    saver.wait()
                with progress.busy("looking at losses", len(records)) as looking:
                    found = partial(losses, step, looking)
                    window.since += selection.refresh(run.out, step, found, process)
            rate = learning_rate(step, *rates)
            for group in optimizer.param_groups:
                group["lr"] = rate
            known, weighing = {"lr": rate}, temperature(step, total, recipe)
            if weighing is not None:
                known["temperature"] = weighing
            optimizer.zero_grad(set_to_none=True)
            torch.manual_seed(int(mix(Purpose.LAYERS, run.seed, step, rank)) >> 1)
            noise = masking.noise(step)
            sums = torch.zeros(3, device=device)  # loss, mean weight, effective share
            cut = False  # by a signal or a failure to load: the step's gradients are dropped
            for micro_step in range(micro_steps):
                try:
                    batch, tensors = pace.next()
                except LOADING as error:
                    if ranks > 1:  # the others wait for this one
                        raise
                    failure, cut = error, True
                    break
                assert batch.step == step
                tensors |= weighed(weighing, device)
                begin = (micro_step * ranks + rank) * part
                cells = masking.cells(noise[begin : begin + part], step, tensors)
                # Gradients are averaged over processes once, in the last micro-step.
                apart = ranks > 1 and micro_step < micro_steps - 1
                with (
                    parallel.no_sync() if apart else nullcontext(),
                    progress.busy("compiling") if compiles and not began else nullcontext(),
                ):
                    loss, of_weights = micro(tensors, cells)
                    (loss / micro_steps).backward()
                sums += torch.cat([loss.detach()[None], of_weights]) / micro_steps
                progress.advance(part * ranks)
                if pace.second is not None and rank == 0:
                    say(*time_lines(pace.second, micro_steps, last - first, device, first > 0))
                    pace.second = None
                if not began:  # before, there was nothing to save, and compiling takes long
                    stop.listen()
                began = True
                if stop.wished and ranks == 1 and micro_step + 1 < micro_steps:
                    cut = True
                    break
            done = step if cut else step + 1
            if not cut:
                norm = clipped(model, recipe)
                optimizer.step()
                if average is not None:
                    average.update(model, step + 1)
                window.add(step, known, sums, norm.detach())

            # What is due after the step: rows, a checkpoint, the end.
            late = rank == 0 and saver.late()
            stopping, late = stop.agreed(late, step, run.log_every, ranks, device)
            saving = failure or stopping or late or done % run.save_every == 0 or done == last
            # A pass over all records may take minutes, in which a signal cuts it short.
            saving = (saving or masking.due(done) or selection.due(done)) and done > saved
            # The first row shows that all is well. On a CPU there is no queue to wait for.
            paced = device.type == "cpu" and ranks == 1 and window.age > ROWS_PACE
            look = looks is not None and not cut and looks.due(done)
            due = saving or paced or look or step == first or done % run.log_every == 0
            if window.pending and due:
                rows = window.rows(pace.take(), stream.damaged)
                if looks and look and rank == 0:  # the others wait in the next step
                    try:
                        rows[-1] |= looks.look(model, progress.busy)
                        window.since += rows[-1]["look_seconds"]
                        say(*looks.lines(rows[-1], done))
                    except LOADING as error:
                        failure, saving = error, done > saved
                if log is not None:
                    log.rows(rows, progress)
            if saving and rank == 0:
                state = {"run": facts, "seconds": window.seconds}
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"ema": average.module.state_dict()} if average is not None else {}
                with progress.busy("saving"):
                    try:
                        if failure is None:
                            followed = followed or follow(run, data, model, masking)
                    except LOADING as error:
                        failure = error
                    shown = [followed.taken(model, done)] if followed else []
                    with besides(failure):  # the write before may have failed
                        saver.save(done, state, *shown)
            saved = done if saving else saved
            if failure is not None:
                batches.close()  # threads that wait for a store would keep the process from ending
                with progress.busy("saving"), besides(failure):
                    saver.wait()
                if saved > first:
                    say(f"step {saved} is saved; when this is mended, go on with --resume:")
                raise failure
            if stopping:
                with progress.busy("saving"):
                    saver.wait()
                batches.close()
                stop.end(done, rank)
        with progress.busy("saving"):
            saver.wait()

    # --- Pictures
    if rank == 0 and last == total and not (idle and (run.out / "reconstructions.png").exists()):
        with busy("drawing pictures"):
            draw_last_step(run, data, plan, model, masking)
    if ranks > 1:
        dist.destroy_process_group()


@contextmanager
def besides(failure: Exception | None) -> Iterator[None]:
    """If the disk is full as well, have `failure` said, which is to be mended too."""
    try:
        yield
    except OSError:
        if failure is not None:
            say(str(failure) or type(failure).__name__)
        raise


def follow(run: Run, data: Data, model: Any, masking: Masking) -> Followed:
    """The run's first images, as every save shows what the model makes of them."""
    first = data.selection.plan(0)
    few = replace(first, batch=min(FOLLOWED, first.total), micro_steps=1)
    _, tensors = next(to_device(data.load(few, 0, 1, maps=data.maps), masking.device))
    images, weights, *_ = data.crops(tensors)
    return Followed(run.out, images, masking.fixed(len(images)), weights, model)


def draw_last_step(run: Run, data: Data, plan: Plan, model: Any, masking: Masking) -> None:
    """Draw the last step's first images, whether this process trained on them or not."""
    total, device = data.selection.steps(run.recipe.epochs), masking.device
    step = total - 1
    data.selection.restore(run.out, step, done=True)
    part = run.recipe.batch // plan.micro_steps
    parts = count_micro_steps(run.recipe, 1, max(PICTURES, part))
    alike = replace(data.selection.plan(step), micro_steps=parts)
    again = data.load(alike, step, step + 1, maps=data.maps)
    _, tensors = next(to_device(again, device))
    tensors |= weighed(temperature(step, total, run.recipe), device)
    images, weights, *_ = data.crops(tensors)
    masking.restore(run.out, step, done=True)
    cells = masking.cells(masking.noise(step)[: len(images)], step, tensors)
    with torch.no_grad(), in_bf16(device):
        draw_reconstructions(run.out, model, images, cells, weights)
