"""What a run prints before its first step: what it is, where it continues, and what it costs."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from shards import Mixture, Plan
from shards.errors import UserError
from shards.files import write_atomically
from shards.progress import counted
from shards.records import Records
from train.metrics import FACTS, duration
from train.models import Cells, in_bf16
from train.progress import say
from train.recipe_file import RUN_FILE, used
from train.request import Run
from train.schedule import Rates, learning_rate, temperature
from train.selection import Selection
from train.setup import device_name

USUAL_PART, MOST_PART = 256, 1024  # images of a micro-step where none are asked for: CPU, CUDA
SHARE, MARGIN = 0.9, 1.25  # of free memory to be used; over what a backward pass keeps
CPU_PART = 200e9  # operations a micro-step may take on a CPU: seconds, and little memory
PER_PARAMETER = 16  # bytes: weight, gradient and AdamW's two means, float32
LONG = 3600  # seconds on a CPU that deserve a warning


class Memory(NamedTuple):
    """Bytes that training takes: whatever the part, and for each image of a micro-step."""

    fixed: float
    image: float

    def needed(self, part: int) -> float:
        """Bytes with `part` images per micro-step."""
        return self.fixed + part * self.image


def largest_part(
    asked: int, flops: float, device: torch.device, memory: Memory | None = None
) -> int:
    """Most images of a micro-step: those `asked` for. If none are: on CUDA as many as `memory`
    allows, or 256 without it; on a CPU fewer for a large model.

    On a CPU a step of ViT-B would be silent for minutes and take 15 GB, and a micro-step of two
    images is no slower per image. The number depends on the model alone, not on the machine, so
    that losses do not. On CUDA more images make fewer, longer launches, which small models need;
    above MOST_PART tensors of Swin-B would be too long for 32-bit indices. `flops`: of forward and
    backward, per image.
    """
    if device.type == "cpu":
        return max(1, min(asked or USUAL_PART, int(CPU_PART / flops)))
    if asked or memory is None:
        return asked or USUAL_PART
    return max(1, min(MOST_PART, fitting(memory, memory_free(device))))


def fitting(memory: Memory, free: float) -> int:
    """Most images of a micro-step in `free` bytes; 0 where not one has room."""
    room = SHARE * free - memory.fixed
    return max(0, int(min(room / (MARGIN * memory.image), 1e9)))


def memory_of(
    model: Any,
    cells: Cells | tuple[()],
    size: int,
    device: torch.device,
    checkpoint: bool = False,
) -> Memory:
    """What training takes, from what one and two images leave for their backward pass.

    `cells` are those of one image. `checkpoint`: the encoder's activations are computed again, a
    block at a time. Compiled, five backbones took 1.00 to 1.06 times as much per image. Changes
    neither gradients nor random state.
    """
    one, two = (_kept(model, cells, size, count, device) for count in (1, 2))
    parameters = sum(p.numel() for p in model.parameters())
    again = 0.0
    if checkpoint:
        model.encoder.set_grad_checkpointing(False)
        whole = _kept(model, cells, size, 1, device)
        model.encoder.set_grad_checkpointing(True)
        again = (whole - one) / len(getattr(model.encoder, "blocks", None) or model.encoder.layers)
    return Memory(PER_PARAMETER * parameters + 2 * one - two, two - one + again)


def _kept(
    model: nn.Module, cells: Cells | tuple[()], size: int, count: int, device: torch.device
) -> int:
    """Bytes that `count` images leave for their backward pass, beside the weights."""
    image = torch.zeros(count, 3, size, size, device=device)
    cells_of_all = [torch.cat([each] * count) for each in cells if each is not None]
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, in_bf16(device):
        output = model(image, *cells_of_all)
    del output
    return sum(kept.values())


def memory_free(device: torch.device) -> float:
    """Bytes that can be had now; infinite where the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(found[0]) if found else float("inf")


def memory_lines(memory: Memory, part: int, device: torch.device) -> list[str]:
    """How much of a card `part` images use. If it is more than there is, a warning with the number
    that would fit.
    """
    needed, free = memory.needed(part), memory_free(device)
    if needed <= free and device.type == "cpu":
        return []
    if needed <= free:
        return [f"{part} images at once take about {needed / 1e9:.0f} of {free / 1e9:.0f} GB free"]
    name = "the GPU" if device.type == "cuda" else "this machine"
    return [
        f"warning: training needs about {needed / 1e9:.1f} GB and {name} has {free / 1e9:.1f} GB "
        f"free; {smaller(part, fitting(memory, free))}"
    ]


def smaller(part: int, fits: int) -> str:
    """What to do if there is no room for `part` images; `fits` are estimated to fit."""
    if 0 < fits < part:
        return f"--micro-batch {fits} fits"
    return f"--micro-batch {part // 2} takes less" if part > 1 and fits else "take a smaller model"


@contextmanager
def memory_told(part: int, fits: int) -> Iterator[None]:
    """Say what to type if `part` images at once were too many; `fits` are estimated to fit."""
    try:
        yield
    except RuntimeError as error:
        card = isinstance(error, torch.OutOfMemoryError)
        if not card and "DefaultCPUAllocator" not in str(error):
            raise
        whose = "GPU's " if card else ""
        raise UserError(
            f"the {whose}memory is full with {part} images at once; {smaller(part, fits)}, or "
            "--set checkpoint=true"
        ) from None


def time_lines(
    seconds: float, micro_steps: int, steps: int, device: torch.device, going_on: bool = False
) -> list[str]:
    """What a step and all `steps` will take, where one of `micro_steps` took `seconds`; `going_on`:
    other steps are done.
    """
    step, which = seconds * micro_steps, "the remaining" if going_on else "all"
    whole = duration(step * steps)
    lines = [f"a step takes about {duration(step)}, {which} {steps:,} about {whole}"]
    if device.type == "cpu" and step * steps > LONG:
        lines.append(
            "warning: that is long for a CPU: use a machine with a GPU, --recipe demo, or fewer "
            "--epochs; Ctrl-C saves and stops"
        )
    return lines


def say_run(
    run: Run,
    records: Records,
    facts: dict[str, Any],
    model: nn.Module,
    hiding: str,
    plan: Plan,
    selection: Selection,
    ranks: int,
    device: torch.device,
) -> None:
    """Say what is about to happen, with the sums that a reader can check."""
    recipe, name = run.recipe, facts["detector"]
    total, micro_steps = selection.steps(recipe.epochs), plan.micro_steps
    part = recipe.batch // ranks // micro_steps
    parameters = sum(p.numel() for p in model.parameters())
    way = f"{recipe.temperature}"
    if recipe.temperature_end is not None:
        way += f" to {recipe.temperature_end} ({recipe.temperature_form})"
    source = "stored crops" if run.bank else "maps"
    weights = f"{name} weights from {source} at T = {way}" if name else "no weights"
    for crop in {one.manifest.settings.crop for one in records.sets} if name else ():
        if crop == recipe.size:
            continue
        say(
            f"note: the maps are for crops of {crop} px, the recipe's have {recipe.size}; "
            f"for weights nearer to those of {recipe.size}-px crops, build with --crop "
            f"{recipe.size}"
        )
    say(
        f"{recipe.model}, {parameters / 1e6:.1f} M parameters, {weights}\n"
        f"{hiding}\n"
        f"{counted(selection.epoch, 'record')} x {counted(recipe.epochs, 'epoch')} / batch "
        f"{recipe.batch} = {counted(total, 'step')}; batch = {counted(ranks, 'process', 'es')} x "
        f"{counted(micro_steps, 'micro-step')} x {counted(part, 'image')}, on "
        f"{device_name(device) or device.type}"
    )
    say(*filter(None, [selection.describe()]))
    for one in records.sets:
        if one.copies:
            shards = len(one.shards)
            say(
                f"{one.copies.store.url} by way of {one.folder}, {facts['window'] or shards} of "
                f"{counted(shards, 'shard')} at a time"
            )
    mixture = selection.plan(0).mixture
    if mixture:
        say(*mixed(records, mixture, name))


def write_run(run: Run, facts: dict[str, Any], part: int) -> None:
    """Write run.toml, which repeats the run in micro-steps of `part` images, and run.json."""
    run.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "timm": timm.__version__}
    several = [str(each) for each in run.shards] if isinstance(run.shards, tuple) else None
    place = several or str(run.shards)
    options = {"deterministic": run.deterministic, **facts, "shares": run.shares}
    remarks = {"shards": place, "fingerprint": facts["shards"], **versions}
    if "extended" in facts:
        remarks["extended"] = f"at [step, epochs] {facts['extended']}: this does not repeat the run"
    text = used(replace(run.recipe, micro_batch=part), options, remarks)
    (run.out / RUN_FILE).write_text(text, encoding="utf-8")
    more = {"shards_folder": place, "versions": versions, "deterministic": run.deterministic}
    text = json.dumps(facts | more, indent=2)
    write_atomically(run.out / FACTS, f"{text}\n".encode(), durable=False)


def mixed(records: Records, mixture: Mixture, detector: str) -> list[str]:
    """What an epoch shows of each of several sets, and what is not alike in them."""
    lines = [
        f"{one.copies.store.url if one.copies else one.folder}: {quota:,} of {mixture.total:,} "
        f"samples an epoch, each record {quota / count:.3g} times"
        for one, quota, count in zip(records.sets, mixture.quotas, mixture.counts, strict=True)
    ]
    lines += [
        f"note: {one.folder} has no class names, its labels stay numbers"
        for one in records.sets
        if not one.manifest.classes
    ]
    first, *others = [
        [each for each in one.manifest.settings.detectors if each.name == detector]
        for one in records.sets
    ]
    if any(other != first for other in others):
        lines.append(f"note: {detector} has other options, or another edge rule, from set to set")
    return lines


def say_where(
    run: Run, first: int, last: int, before: int, steps_an_epoch: float, rates: Rates
) -> None:
    """Say where a run goes on, after step `first`; that it is finished; that it warms up for most
    of its steps; or what an extension does to its schedules: they had `before` steps, and now have
    those of `rates`.
    """
    total, warmup, *levels = rates
    if first and before != total:
        was = min(round(run.recipe.warmup * steps_an_epoch), before - 1)
        then = learning_rate(first - 1, before, was, *levels)
        now = learning_rate(min(first, total - 1), total, warmup, *levels)
        line = f"the learning rate goes from {then:.2e} to {now:.2e}"
        degree, later = (temperature(first - 1, n, run.recipe) for n in (before, total))
        if degree and later:
            line += f", T from {degree:.3g} to {later:.3g}"
        say(
            f"extended from {before:,} to {total:,} steps: {line}, as in a run of that length from "
            "its first step on"
        )
    elif not first and warmup > total / 2:
        say(
            f"note: the warm-up takes {warmup:,} of {total:,} steps; shorten it by --set "
            f"warmup={run.recipe.epochs / 10:g} (epochs)"
        )
    recipe = run.recipe
    if not first and recipe.sample_by != "none" and recipe.random_epochs >= recipe.epochs:
        say(
            f"warning: all masks are at random: the first {recipe.random_epochs:g} epochs are, and "
            f"the run has {recipe.epochs:g}; give --epochs, which shortens both, or set "
            "random_epochs and refresh_epochs"
        )
    if first >= total:
        say(
            f"{run.out} is finished, {first:,} of {total:,} steps; try it: kamim probe {run.out} "
            f"TRAIN VAL; keep its encoder: kamim export {run.out} FILE; train it longer: --resume "
            "--extend --epochs with more"
        )
    elif first >= last:
        say(f"{run.out} has done the {last:,} steps of --steps; without, it goes on to {total:,}")
    elif first:
        say(f"going on after step {first}")
