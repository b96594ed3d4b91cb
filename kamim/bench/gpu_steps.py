"""Training steps on the GPU, as the trainer does them: rates, memory, launches, kernels.

`Training` is the one place here that knows how train/ makes a step.
"""

import copy
import os
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from typing import Any

import joblib
import torch

from kamim.bench.ceiling import as_many
from kamim.bench.gpu import Bench, Case
from kamim.bench.gpu_device import synchronize
from kamim.bench.gpu_page import IMAGENET
from kamim.bench.provenance import ratio, spread
from shards import Batch, Plan, ShardSet, to_device
from train.cuda import make_deterministic, peak_flops, pin_attention
from train.estimate import largest_part, memory_of
from train.masking import ATTENTION, Masking, wanted_maps
from train.models import make_model, model_flops
from train.recipes import Recipe, find_recipe
from train.setup import (
    clipped,
    count_micro_steps,
    device_name,
    make_optimizer,
    weighted_crops,
)
from train.step import Pace, Step, compiled

QUEUE = 6  # micro-steps that a loader and the copies hold at most
# Kernels by what their names hold, the first that fits.
KINDS = {
    "compiled": ("triton_",),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "convolution": ("conv", "cudnn", "fprop", "wgrad", "dgrad"),
    "products": ("gemm", "nvjet", "cutlass", "xmma"),
    "copies": ("Memcpy", "Memset"),
}


class Training:
    """A recipe's model and its step on `device`, as `pretrain` has them; every benchmark of a step
    is this one.
    """

    def __init__(
        self,
        recipe: Recipe,
        records: ShardSet,
        device: torch.device,
        micro_batch: int = 0,
        eager: bool = False,
        deterministic: bool = False,
    ) -> None:
        self.recipe = recipe = replace(recipe, random_epochs=0)
        self.device, self.eager = device, eager or device.type == "cpu"
        torch.manual_seed(0)
        self.model: Any = make_model(recipe).to(device)
        steps_an_epoch = len(records) / recipe.batch
        encoder = self.model.encoder
        self.masking = Masking(recipe, 0, records, encoder, steps_an_epoch, device)
        if ATTENTION in self.masking.guides:
            shape = len(records), self.masking.patches_a_side**2
            self.masking.attention = torch.randint(256, shape, dtype=torch.uint8, device=device)
        self.optimizer = make_optimizer(self.model, recipe, device)
        self.flops = model_flops(self.model, recipe.size, self.masking.example())
        needed = memory_of(self.model, self.masking.example(early=True), recipe.size, device)
        free = None if deterministic else needed
        most = largest_part(micro_batch or recipe.micro_batch, self.flops, device, free)
        self.micro_steps = count_micro_steps(recipe, 1, most)
        self.part = recipe.batch // self.micro_steps
        self.kernel = pin_attention(self.model, recipe.size, device, timed=not deterministic)
        detector = None if recipe.temperature is None else records.manifest.detectors[0]
        self.maps = wanted_maps(recipe, detector)
        self.micro, self.plain = (self._micro(records, each) for each in (detector, None))
        self.done = 0

    def _micro(self, records: ShardSet, detector: str | None) -> Any:
        """The function of a micro-step with the weights of `detector`; it compiles when called."""
        crops = weighted_crops(self.recipe, records, detector).to(self.device)
        step = Step(self.model, crops)
        return step if self.eager else compiled(step)

    def micro_step(self, number: int, noise: Any, tensors: dict[str, Any], micro: Any) -> None:
        """Forward and backward of micro-step `number` of the step."""
        begin = number * self.part
        cells = self.masking.cells(noise[begin : begin + self.part], self.done, tensors)
        loss, of_weights = micro(tensors, cells)
        (loss / self.micro_steps).backward()
        self.sums += torch.cat([loss.detach()[None], of_weights]) / self.micro_steps

    def step(self, pace: Pace, micro: Any = None) -> None:
        """A whole step on what `pace` gives."""
        self.optimizer.zero_grad(set_to_none=True)
        noise = self.masking.noise(self.done)
        self.sums = torch.zeros(3, device=self.device)
        for number in range(self.micro_steps):
            _, tensors = pace.next()
            self.micro_step(number, noise, tensors, self.micro if micro is None else micro)
        clipped(self.model, self.recipe)
        self.optimizer.step()
        self.done += 1

    def timed(self, pace: Pace, steps: int, micro: Any = None) -> tuple[float, float]:
        """Seconds of steps on what `pace` gives, and those of them in which they waited for it."""
        synchronize(self.device)
        pace.take()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(pace, micro)
        synchronize(self.device)
        return time.perf_counter() - begin, pace.take()

    def stream(self, records: ShardSet) -> Generator[tuple[Batch, dict[str, Any]], None, None]:
        """Micro-steps from `records` by the loader, without end."""
        plan = Plan(len(records), self.recipe.batch, micro_steps=self.micro_steps)
        loader = records.loader(plan, 0, 1 << 30, maps=self.maps, device=self.device.type)
        return to_device(loader, self.device)


def always(batch: Any, device: torch.device) -> Pace:
    """The same batch, over and over."""
    return Pace(iter(lambda: batch, None), device)


class Measured:
    """A Training that is warm, with one micro-step's batch that stays on the device."""

    def __init__(
        self, bench: Bench, name: str, eager: bool = False, deterministic: bool = False
    ) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.bench, self.device = bench, bench.device
        self.cuda = bench.device.type == "cuda"
        self.training = Training(
            find_recipe(name), bench.records, bench.device, bench.micro_batch, eager, deterministic
        )
        stream = self.training.stream(bench.records)
        self.batch = copy.deepcopy(next(stream))
        stream.close()
        self.still = always(self.batch, self.device)
        self.first_step_s, _ = self.training.timed(self.still, 1)
        self.graphs = graphs()

    @cached_property
    def step_s(self) -> float:
        """Seconds of a step, once it is warm."""
        self.training.step(self.still)
        return self.training.timed(self.still, 1)[0]

    def rate(self, pace: Pace, micro: Any = None) -> tuple[float, float]:
        """Images per second of steps on what `pace` gives, and the share of time spent waiting."""
        steps = max(1, round(self.bench.seconds / self.step_s))
        spent, waited = self.training.timed(pace, steps, micro)
        return steps * self.training.recipe.batch / spent, waited / spent


def training(bench: Bench) -> Iterator[Case]:
    """Steps of each recipe on one batch, their kernels, and steps from shards; a model at a time
    is in memory.
    """
    ways = [(name, False) for name in bench.recipes]
    ways.insert(1, (bench.recipes[0], True))
    for name, eager in ways:
        title = _title(bench, name) + (", eager" if eager else "")
        made = lru_cache(1)(partial(Measured, bench, name, eager))
        yield Case("step", title, partial(_with, made, step))
        if not eager:
            yield Case("kernels", title, partial(_with, made, kernels))
            yield Case("end to end", title, partial(_with, made, end_to_end))
            if name == bench.recipes[0]:  # it compiles once more
                yield Case("weights", title, partial(_with, made, weighing))
        made.cache_clear()


def methods(bench: Bench) -> Iterator[Case]:
    """Steps of other methods, which compute fewer patches, or draw cells by maps."""
    for name in bench.methods:
        yield Case("methods", _title(bench, name), lambda name=name: step(Measured(bench, name)))  # type: ignore


def deterministic(bench: Bench) -> Iterator[Case]:
    """Steps with algorithms that give the same bits each time."""

    def work() -> dict[str, Any]:
        make_deterministic()
        try:
            return step(Measured(bench, bench.recipes[0], deterministic=True))
        finally:
            torch.use_deterministic_algorithms(False)
            torch._inductor.config.deterministic = False
            os.environ.pop("TORCHINDUCTOR_DETERMINISTIC", None)

    yield Case("deterministic", _title(bench, bench.recipes[0]), work)


def _title(bench: Bench, name: str) -> str:
    """What a case of the recipe `name` is called, with the micro-batch that was asked for."""
    return f"{name} at {bench.micro_batch}" if bench.micro_batch else name


def _with(
    made: Callable[[], "Measured"], work: Callable[["Measured"], dict[str, Any]]
) -> dict[str, Any]:
    return work(made())


def step(measured: Measured) -> dict[str, Any]:
    """One row of steps on a batch that stays."""
    bench, training = measured.bench, measured.training
    rates: list[float] = [measured.rate(measured.still)[0] for _ in range(bench.repeats)]
    rate, recipe = statistics.median(rates), training.recipe
    row: dict[str, Any] = {
        "n": bench.repeats,
        "batch": recipe.batch,
        "micro_batch": training.part,
        "images_per_s": spread(rates, 1),
        "gflop_per_image": round(training.flops / 1e9, 2),
        "first_step_s": round(measured.first_step_s, 1),
        "kernel": training.kernel,
    }
    peak = peak_flops(device_name(bench.device))
    row |= {"mfu": round(rate * training.flops / peak, 4)} if peak else {}
    if measured.cuda:
        row |= memory(measured) | times(measured)
        row |= {"synchronisations_of_a_step": synchronisations(measured)}
        broken = sum(torch._dynamo.utils.counters["graph_break"].values())
        row |= {
            "graphs": measured.graphs,
            "graph_breaks": broken,
            "recompiles": graphs() - measured.graphs,
        }
    return row


def weighing(measured: Measured) -> dict[str, Any]:
    """One row of weighted steps in turn with those of the same model without weights."""
    bench, training = measured.bench, measured.training
    training.step(measured.still, training.plain)  # compiles
    weighted, plain = [], []
    for _ in range(bench.repeats):
        weighted.append(measured.rate(measured.still)[0])
        plain.append(measured.rate(measured.still, training.plain)[0])
    return {
        "n": bench.repeats,
        "images_per_s": spread(weighted, 1),
        "images_per_s_unweighted": spread(plain, 1),
        "weighted_over_unweighted": ratio(plain, weighted),
    }


def end_to_end(measured: Measured) -> dict[str, Any]:
    """One row of steps from shards, by the loader with all cores, in turn with one batch's."""
    bench, training = measured.bench, measured.training
    source = training.stream(as_many(bench.records, IMAGENET))
    streamed = Pace(source, bench.device)
    ends, stills, waits = [], [], []
    for _ in range(bench.repeats):
        stills.append(measured.rate(measured.still)[0])
        for _ in range(1 + QUEUE // training.micro_steps):  # what was read ahead meanwhile
            training.step(streamed)
        rate, wait = measured.rate(streamed)
        ends.append(rate)
        waits.append(wait)
    source.close()
    return {
        "n": bench.repeats,
        "batch": training.recipe.batch,
        "micro_batch": training.part,
        "threads": joblib.cpu_count(),
        "images_per_s": spread(ends, 1),
        "end_to_end_over_synthetic": ratio(ends, stills),
        "waiting": spread(waits, 4),
    }


def graphs() -> int:
    """Graphs that were compiled so far."""
    return int(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))


def memory(measured: Measured) -> dict[str, Any]:
    """Bytes at most, in a step and of it by image of a micro-step."""
    training = measured.training
    training.optimizer.zero_grad(set_to_none=True)
    synchronize(measured.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    training.step(measured.still)
    synchronize(measured.device)
    peak = torch.cuda.max_memory_allocated()
    return {
        "peak_gb": round(peak / 1e9, 2),
        "resident_gb": round(before / 1e9, 2),
        "peak_mb_per_image": round((peak - before) / 1e6 / training.part, 2),
    }


def times(measured: Measured) -> dict[str, Any]:
    """Milliseconds of a micro-step: whole, and of the host alone to launch it into an empty queue;
    and of the update of a step.
    """
    training, found = measured.training, []
    noise, (_, tensors) = training.masking.noise(0), measured.batch
    for _ in range(2 * measured.bench.repeats):
        synchronize(measured.device)
        begin = time.perf_counter()
        training.micro_step(0, noise, tensors, training.micro)
        launched = time.perf_counter() - begin
        synchronize(measured.device)
        found.append((launched * 1e3, (time.perf_counter() - begin) * 1e3))
    host, whole = zip(*found, strict=True)
    updates = []
    for _ in range(measured.bench.repeats):
        synchronize(measured.device)
        begin = time.perf_counter()
        clipped(training.model, training.recipe)
        training.optimizer.step()
        synchronize(measured.device)
        updates.append((time.perf_counter() - begin) * 1e3)
    return {
        "host_ms": spread(list(host)),
        "micro_step_ms": spread(list(whole)),
        "update_ms": spread(updates),
    }


def kernels(measured: Measured) -> dict[str, Any]:
    """Where the device's time goes in a micro-step: its sum, by kind, and the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    training = measured.training
    noise, (_, tensors) = training.masking.noise(0), measured.batch
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        training.micro_step(0, noise, tensors, training.micro)
        synchronize(measured.device)
    rows = [
        (e.self_device_time_total / 1e3, e.count, e.key)
        for e in trace.key_averages()
        if e.self_device_time_total
    ]
    kinds: dict[str, float] = {}
    for ms, _, name in rows:
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "eager")
        kinds[kind] = round(kinds.get(kind, 0.0) + ms, 3)
    longest = [[round(ms, 3), count, name[:100]] for ms, count, name in sorted(rows)[:-16:-1]]
    return {
        "n": 1,
        "device_ms": round(sum(ms for ms, _, _ in rows), 3),
        "device_ms_by_kind": kinds,
        "launches": sum(count for _, count, _ in rows),
        "kernels": longest,
    }


def synchronisations(measured: Measured) -> int:
    """How often a step waits for the device, where torch can tell."""
    synchronize(measured.device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            measured.training.step(measured.still)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in found)
