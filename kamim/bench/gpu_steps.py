"""Training steps on the GPU, as the trainer does them: rates, memory, launches, kernels.

In: the set and the device of a Bench. Out: cases of `kamim bench --gpu`. `Training` is the one
place here that knows how train/ makes a step.
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
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from kamim.bench.gpu import Bench, Case, as_many
from kamim.bench.gpu_page import IMAGENET
from kamim.bench.provenance import ratio, spread
from shards import Plan, ShardSet, to_device
from shards.weighting import WeightedCrops
from train.estimate import largest_part, synchronize
from train.loop import PEAK_FLOPS
from train.masking import Masking, wanted_maps
from train.models import make_model, model_flops
from train.recipes import find_recipe
from train.setup import count_micro_steps, device_name, make_optimizer, weighted_crops

Part = tuple[NDArray[Any], dict[str, Any]]  # samples and tensors of a micro-step
QUEUE = 4  # micro-steps that a loader holds at most
# Kernels by what their names hold, the first that fits.
KINDS = {
    "compiled": ("triton_",),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "convolution": ("conv", "cudnn", "fprop", "wgrad", "dgrad"),
    "products": ("gemm", "nvjet", "cutlass", "xmma"),
    "copies": ("Memcpy", "Memset"),
}


class Training:
    """A recipe's model and its step on `device`, as `pretrain` has them, compiled unless eager."""

    def __init__(
        self,
        name: str,
        records: ShardSet,
        device: torch.device,
        micro_batch: int = 0,
        eager: bool = False,
    ) -> None:
        recipe = find_recipe(name)
        recipe = replace(recipe, micro_batch=micro_batch or recipe.micro_batch, random_epochs=0)
        self.recipe, self.device = recipe, device
        torch.manual_seed(0)
        self.model: Any = make_model(recipe).to(device)
        steps_an_epoch = len(records) / recipe.batch
        encoder = self.model.encoder
        self.masking = Masking(recipe, 0, records.manifest, encoder, steps_an_epoch, device)
        if "attention" in self.masking.guides:
            shape = len(records), self.masking.patches_a_side**2
            self.masking.attention = np.random.default_rng(0).integers(256, size=shape, dtype="u1")
        self.optimizer = make_optimizer(self.model, recipe, device)
        self.flops = model_flops(self.model, recipe.size, self.masking.example())
        most = largest_part(recipe.micro_batch, self.flops, device)
        self.micro_steps = count_micro_steps(recipe, 1, most)
        self.part = recipe.batch // self.micro_steps
        detector = None if recipe.temperature is None else records.manifest.detectors[0]
        self.crops, self.plain = (
            weighted_crops(recipe, records, each).to(device) for each in (detector, None)
        )
        self.maps = wanted_maps(recipe, detector)
        cuda = device.type == "cuda"
        self.forward: Any = self.model
        if cuda and not eager:
            self.forward = torch.compile(self.model, dynamic=False)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=cuda)
        self.done = 0

    def micro_step(self, number: int, noise: Any, part: Part, crops: WeightedCrops) -> None:
        """Forward and backward of micro-step `number` of the step."""
        samples, tensors = part
        images, weights, *_ = crops(tensors)
        begin = number * self.part
        noise = noise[begin : begin + self.part]
        cells = self.masking.hidden(noise, self.done, samples, tensors)
        with self.autocast:
            output = self.forward(images, *cells)
        loss = self.model.loss(output, images, cells, weights) / self.micro_steps
        loss.backward()
        mean_weight = weights.mean() if weights is not None else torch.ones_like(loss)
        self.sums += torch.stack([loss.detach(), mean_weight / self.micro_steps])

    def step(self, parts: Callable[[], Part], crops: WeightedCrops | None = None) -> None:
        """A whole step on what `parts` gives."""
        self.optimizer.zero_grad(set_to_none=True)
        self.sums = torch.zeros(2, device=self.device)
        noise = self.masking.noise(self.done)
        for number in range(self.micro_steps):
            self.micro_step(number, noise, parts(), crops or self.crops)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.done += 1

    def stream(self, records: ShardSet) -> Generator[Part, None, None]:
        """Micro-steps from `records` by the loader, without end."""
        plan = Plan(len(records), self.recipe.batch, micro_steps=self.micro_steps)
        loader = records.loader(plan, 0, 1 << 30, maps=self.maps, device=self.device.type)
        for batch, tensors in to_device(loader, self.device):
            yield batch.samples, tensors


class Measured:
    """A Training that is warm, with one micro-step's batch that stays on the device."""

    def __init__(self, bench: Bench, name: str, eager: bool = False) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        self.bench, self.device = bench, bench.device
        self.cuda = bench.device.type == "cuda"
        self.training = Training(name, bench.records, bench.device, bench.micro_batch, eager)
        stream = self.training.stream(bench.records)
        samples, tensors = next(stream)
        self.part = samples.copy(), copy.deepcopy(tensors)
        stream.close()
        begin = time.perf_counter()
        self.training.step(self.still)
        synchronize(self.device)
        self.first_step_s = time.perf_counter() - begin
        self.training.step(self.still, self.training.plain)
        self.graphs = graphs()

    def still(self) -> Part:
        return self.part

    @cached_property
    def step_s(self) -> float:
        """Seconds of a step, once."""
        self.training.step(self.still)
        synchronize(self.device)
        begin = time.perf_counter()
        self.training.step(self.still)
        synchronize(self.device)
        return time.perf_counter() - begin

    def rate(self, parts: Callable[[], Part], crops: WeightedCrops | None = None) -> float:
        """Images a second of steps on what `parts` gives."""
        steps = max(1, round(self.bench.seconds / self.step_s))
        synchronize(self.device)
        begin = time.perf_counter()
        for _ in range(steps):
            self.training.step(parts, crops)
        synchronize(self.device)
        return steps * self.training.recipe.batch / (time.perf_counter() - begin)


def training(bench: Bench) -> Iterator[Case]:
    """Steps of each recipe on one batch, their kernels, and steps from shards; a model at a time
    is in memory.
    """
    ways = [(name, False) for name in bench.recipes]
    ways.insert(1, (bench.recipes[0], True))
    for name, eager in ways:
        title = f"{name} at {bench.micro_batch}" if bench.micro_batch else name
        title += ", eager" if eager else ""
        made = lru_cache(1)(partial(Measured, bench, name, eager))
        yield Case("step", title, partial(_with, made, step))
        if not eager:
            yield Case("kernels", title, partial(_with, made, kernels))
            yield Case("end to end", title, partial(_with, made, end_to_end))
        made.cache_clear()


def methods(bench: Bench) -> Iterator[Case]:
    """Steps of other methods, which compute fewer patches, or draw cells by maps."""
    for name in bench.methods:
        yield Case("methods", name, lambda name=name: step(Measured(bench, name)))  # type: ignore


def deterministic(bench: Bench) -> Iterator[Case]:
    """Steps with algorithms that give the same bits each time."""

    def work() -> dict[str, Any]:
        deterministically(True)
        try:
            return step(Measured(bench, bench.recipes[0]))
        finally:
            deterministically(False)

    yield Case("deterministic", bench.recipes[0], work)


def deterministically(on: bool) -> None:
    """As `--deterministic` sets torch."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch._inductor.config.deterministic = on


def _with(
    made: Callable[[], "Measured"], work: Callable[["Measured"], dict[str, Any]]
) -> dict[str, Any]:
    return work(made())


def step(measured: Measured) -> dict[str, Any]:
    """One row of steps on a batch that stays."""
    bench, training = measured.bench, measured.training
    measured.step_s  # noqa: B018  (warms up)
    rates: list[float] = []
    plain: list[float] = []
    for _ in range(bench.repeats):
        rates.append(measured.rate(measured.still))
        if training.recipe.temperature is not None:
            plain.append(measured.rate(measured.still, training.plain))
    rate = statistics.median(rates)
    row: dict[str, Any] = {"n": bench.repeats, "batch": training.recipe.batch,
           "micro_batch": training.part, "images_per_s": spread(rates, 1),
           "gflop_per_image": round(training.flops / 1e9, 2),
           "first_step_s": round(measured.first_step_s, 1)}  # fmt: skip
    row |= {"weighted_over_unweighted": ratio(plain, rates)} if plain else {}  # in time
    peak = next((p for n, p in PEAK_FLOPS.items() if n in device_name(bench.device)), None)
    row |= {"mfu": round(rate * training.flops / peak, 4)} if peak else {}
    if measured.cuda:
        row |= memory(measured) | times(measured)
        row |= {"synchronisations_of_a_step": synchronisations(measured)}
        broken = sum(torch._dynamo.utils.counters["graph_break"].values())
        row |= {"graphs": measured.graphs, "graph_breaks": broken,
                "recompiles": graphs() - measured.graphs}  # fmt: skip
    return row


def end_to_end(measured: Measured) -> dict[str, Any]:
    """One row of steps from shards, by the loader with all cores, in turn with one batch's."""
    bench, training = measured.bench, measured.training
    source = training.stream(as_many(bench.records, IMAGENET))
    waited = 0.0

    def streamed() -> Part:
        nonlocal waited
        asked = time.perf_counter()
        found = next(source)
        waited += time.perf_counter() - asked
        return found

    measured.step_s  # noqa: B018  (warms up)
    ends, stills, waits = [], [], []
    for _ in range(bench.repeats):
        stills.append(measured.rate(measured.still))
        for _ in range(1 + QUEUE // training.micro_steps):  # what was read ahead meanwhile
            training.step(streamed)
        waited, begin = 0.0, time.perf_counter()
        ends.append(measured.rate(streamed))
        waits.append(waited / (time.perf_counter() - begin))
    source.close()
    return {"n": bench.repeats, "batch": training.recipe.batch, "micro_batch": training.part,
            "threads": joblib.cpu_count(), "images_per_s": spread(ends, 1),
            "end_to_end_over_synthetic": ratio(ends, stills),
            "waiting": spread(waits, 4)}  # fmt: skip


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
    return {"peak_gb": round(peak / 1e9, 2), "resident_gb": round(before / 1e9, 2),
            "peak_mb_per_image": round((peak - before) / 1e6 / training.part, 2)}  # fmt: skip


def times(measured: Measured) -> dict[str, Any]:
    """Milliseconds of a micro-step: whole, and of the host alone to launch it into an empty queue;
    and of the update of a step.
    """
    training, found = measured.training, []
    noise = training.masking.noise(0)
    for _ in range(2 * measured.bench.repeats):
        synchronize(measured.device)
        begin = time.perf_counter()
        training.micro_step(0, noise, measured.part, training.crops)
        launched = time.perf_counter() - begin
        synchronize(measured.device)
        found.append((launched * 1e3, (time.perf_counter() - begin) * 1e3))
    host, whole = zip(*found, strict=True)
    updates = []
    for _ in range(measured.bench.repeats):
        synchronize(measured.device)
        begin = time.perf_counter()
        nn.utils.clip_grad_norm_(training.model.parameters(), training.recipe.clip)
        training.optimizer.step()
        synchronize(measured.device)
        updates.append((time.perf_counter() - begin) * 1e3)
    return {"host_ms": spread(list(host)), "micro_step_ms": spread(list(whole)),
            "update_ms": spread(updates)}  # fmt: skip


def kernels(measured: Measured) -> dict[str, Any]:
    """Where the device's time goes in a micro-step: its sum, by kind, and the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    training = measured.training
    noise = training.masking.noise(0)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        training.micro_step(0, noise, measured.part, training.crops)
        synchronize(measured.device)
    rows = [(e.self_device_time_total / 1e3, e.count, e.key) for e in trace.key_averages()
            if e.self_device_time_total]  # fmt: skip
    kinds: dict[str, float] = {}
    for ms, _, name in rows:
        kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), "eager")
        kinds[kind] = round(kinds.get(kind, 0.0) + ms, 3)
    longest = [[round(ms, 3), count, name[:100]] for ms, count, name in sorted(rows)[:-16:-1]]
    return {"n": 1, "device_ms": round(sum(ms for ms, _, _ in rows), 3), "device_ms_by_kind": kinds,
            "launches": sum(count for _, count, _ in rows), "kernels": longest}  # fmt: skip


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
