"""The first ten minutes on a GPU in one command, `kamim bench --gpu`: what it can do, what we use.

In: photographs, or finished shards. Out: a JSON line a case, written as soon as it is measured, in
docs/results/bench/gpu.jsonl. Cases that are there already, of the same GPU, are left out, so that
the command goes on where it was cut off. docs/gpu.md is rendered from the lines.
"""

import gc
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kamim.bench.provenance import RESULTS, provenance, spread
from preprocess import build_shards, detector_settings, open_source
from preprocess.building import shard_size_for
from preprocess.defaults import default_settings
from shards import ShardSet
from shards.errors import UserError
from shards.files import MANIFEST

# Seconds that a part may take, on one H100; what is not begun by then is left for the next call.
BUDGETS = {"ceilings": 20.0, "attention": 30.0, "step": 240.0, "kernels": 30.0, "decode": 30.0}
PARTS = tuple(BUDGETS)
DETECTORS = ("fast", "frequency")


class Case(NamedTuple):
    """One line of results: `work` gives its figures."""

    part: str
    name: str
    work: Callable[[], dict[str, Any]]


@dataclass
class Bench:
    """What the parts measure on. seconds: about what one timing takes; repeats: of each."""

    where: str
    folder: Path  # for what is built
    device: torch.device
    seconds: float = 1.0
    repeats: int = 5
    micro_batch: int = 0  # 0: what the trainer chooses
    recipes: tuple[str, ...] = ("vit_base", "vit_small", "vit_tiny", "swin_tiny", "swin_base")

    @cached_property
    def records(self) -> ShardSet:
        """The finished set at `where`, or one built of the photographs there."""
        if (Path(self.where) / MANIFEST).exists():
            return ShardSet(self.where)
        source = open_source(self.where, partial=True)
        detectors = tuple(detector_settings(name) for name in DETECTORS)
        settings = default_settings(detectors, shard_size_for(len(source.entries)))
        build_shards(source, self.folder / "set", settings, max_rejected=1)
        return ShardSet(self.folder / "set")

    @cached_property
    def origin(self) -> dict[str, Any]:
        """What each line says of its circumstances."""
        return {"gpu": gpu_name(self.device), "driver": driver(), "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(), **provenance()}  # fmt: skip

    def needs_cuda(self) -> None:
        if self.device.type != "cuda":
            raise UserError("needs a CUDA device")


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def driver() -> str:
    """The version of NVIDIA's driver, or nothing."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.split("\n")[0].strip()


def ceilings(bench: Bench) -> Iterator[Case]:
    """What the device can do at best: bytes within it and to it, bf16 products."""

    def copy() -> dict[str, Any]:
        bench.needs_cuda()
        one = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=bench.device)
        two = torch.empty_like(one)
        return rates(bench, lambda: two.copy_(one), 2 * one.numel() / 1e9, "gb_per_s")

    def across(up: bool) -> dict[str, Any]:
        bench.needs_cuda()
        host = torch.ones(1 << 28, dtype=torch.uint8).pin_memory()
        there = host.to(bench.device)
        target, source = (there, host) if up else (host, there)
        work = lambda: target.copy_(source, non_blocking=True)  # noqa: E731
        return rates(bench, work, host.numel() / 1e9, "gb_per_s")

    def product(m: int, n: int, k: int) -> dict[str, Any]:
        bench.needs_cuda()
        a, b = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
                for shape in ((m, k), (k, n)))  # fmt: skip
        return rates(bench, lambda: a @ b, 2 * m * n * k / 1e12, "tflop_per_s")

    yield Case("ceilings", "copy on the device", copy)
    yield Case("ceilings", "host to device, pinned", partial(across, True))
    yield Case("ceilings", "device to host, pinned", partial(across, False))
    rows = 256 * 145  # tokens of 256 images of a ViT at 192 px
    for m, n, k in ((8192, 8192, 8192), (rows, 2304, 768), (rows, 768, 768), (rows, 3072, 768),
                    (rows, 768, 3072), (768, 3072, rows)):  # fmt: skip
        yield Case("ceilings", f"bf16 {m} x {n} x {k}", partial(product, m, n, k))


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(bench: Bench) -> Iterator[Case]:
    """Each backend of torch's attention at the shapes of ViT-B at 192 px, as timm calls it."""

    def measure(backend: str, tokens: int) -> dict[str, Any]:
        bench.needs_cuda()
        shape = (256, tokens, 3, 12, 64)
        packed = torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
        above = torch.randn(256, 12, tokens, 64, device=bench.device, dtype=torch.bfloat16)

        def forward() -> Tensor:
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

        def both() -> None:
            packed.grad = None
            forward().backward(above)

        with sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else nullcontext():
            with torch.no_grad():
                found, exact = forward()[:8], packed[:8].double().permute(2, 0, 3, 1, 4)
                want = (exact[0] @ exact[1].transpose(-2, -1) / 8).softmax(-1) @ exact[2]
                ahead = milliseconds(bench, forward)
            total = milliseconds(bench, both)
        flops = 4 * 256 * 12 * tokens**2 * 64
        row: dict[str, Any] = {"n": len(total), "tokens": tokens, "forward_ms": spread(ahead)}
        row |= {"forward_backward_ms": spread(total)}
        row |= {"tflop_per_s": round(3.5 * flops / statistics.median(total) / 1e9, 1)}
        error = ((found - want).norm() / want.norm()).item()
        return row | {"relative_error": float(f"{error:.2g}")}

    for tokens in (145, 144):
        for name in ("chosen by torch", *BACKENDS):
            case = f"{name}, {tokens} tokens"
            yield Case("attention", case, partial(measure, name, tokens))


def decode(bench: Bench) -> Iterator[Case]:
    """nvJPEG, by torchvision, of the shards' frames as they are; and its pixels."""

    def measure(batch: int) -> dict[str, Any]:
        bench.needs_cuda()
        import simplejpeg
        from torchvision.io import ImageReadMode, decode_jpeg

        frames = jpegs(bench.records, batch)
        whole = [torch.from_numpy(np.frombuffer(frame, np.uint8).copy()) for frame in frames]

        def work() -> list[Tensor]:
            return decode_jpeg(whole, mode=ImageReadMode.RGB, device=bench.device)

        expected = np.stack([simplejpeg.decode_jpeg(frame, "RGB") for frame in frames])
        found = torch.stack(work()).permute(0, 2, 3, 1).cpu().numpy()
        apart = np.abs(found.astype(int) - expected)
        row = rates(bench, work, batch, "images_per_s")
        begin = time.perf_counter()
        for frame in frames:
            simplejpeg.decode_jpeg(frame, "RGB")
        alone = batch / (time.perf_counter() - begin)
        return {**row, "batch": batch, "largest_difference": int(apart.max()),
                "mean_difference": round(float(apart.mean()), 4),
                "share_of_equal_pixels": round(float((apart == 0).mean()), 4),
                "one_thread_of_simplejpeg": round(alone, 1)}  # fmt: skip

    for batch in (64, 256, 1024):
        yield Case("decode", f"nvJPEG, {batch} at once", partial(measure, batch))


def jpegs(records: ShardSet, count: int) -> list[bytes]:
    """`count` frames of a set, its own in turn. Raises UserError if they are raw."""
    if records.manifest.settings.quality == 0:
        raise UserError(f"{records.folder} holds raw frames, no JPEGs")
    return [records[number % len(records)].frame for number in range(count)]


def milliseconds(bench: Bench, work: Callable[[], Any]) -> list[float]:
    """Device times of `work`, by events around several calls, once it is warm."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    calls = max(1, min(100, int(bench.seconds / bench.repeats / (time.perf_counter() - begin))))
    found = []
    for _ in range(bench.repeats):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(calls):
            work()
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / calls)
    return found


def rates(bench: Bench, work: Callable[[], Any], amount: float, unit: str) -> dict[str, Any]:
    """`amount` a second of `work`, as a row."""
    found = [amount / ms * 1e3 for ms in milliseconds(bench, work)]
    return {"n": len(found), unit: spread(found, 1)}


def cases(bench: Bench) -> Iterator[Case]:
    """All there is to measure, in order."""
    from kamim.bench import gpu_train

    yield from ceilings(bench)
    yield from attention(bench)
    yield from gpu_train.training(bench)
    yield from decode(bench)


def run(bench: Bench, out: Path, parts: Iterable[str] = PARTS, again: bool = False) -> int:
    """Measure what `out` does not have, and append it. Returns how many cases failed."""
    gpu, wanted = bench.origin["gpu"], set(parts)
    found = {(row["part"], row["case"]) for row in rows_of(out) if row["gpu"] == gpu and not again}
    spent, failed = dict.fromkeys(BUDGETS, 0.0), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases(bench):
        if case.part not in wanted or (case.part, case.name) in found:
            continue
        begin, title = time.perf_counter(), f"{case.part}, {case.name}"
        try:
            with no_later(BUDGETS[case.part] - spent[case.part]):
                row = case.work()
        except Exception as error:  # the others are measured all the same
            failed += 1
            reason = (str(error).strip().splitlines() or [""])[0]
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            print(f"{title}: {kind}{reason}"[:300], file=sys.stderr, flush=True)
        else:
            took = round(time.perf_counter() - begin, 1)
            row = {"bench": "gpu", "part": case.part, "case": case.name, **row, "took_s": took}
            with out.open("a") as file:
                file.write(json.dumps(row | bench.origin, sort_keys=True) + "\n")
            print(f"{title}: {plain(row)}", file=sys.stderr, flush=True)
        spent[case.part] += time.perf_counter() - begin
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return failed


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of results in `path`, if there are any."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plain(row: dict[str, Any]) -> str:
    """A row's figures for a person to follow: medians alone."""
    shown = {k: v for k, v in row.items() if k not in {"bench", "part", "case", "n", "kernels"}}
    middle = {k: v["median"] if isinstance(v, dict) and "median" in v else v
              for k, v in shown.items()}  # fmt: skip
    return "  ".join(f"{key} {value}" for key, value in middle.items())


@contextmanager
def no_later(seconds: float) -> Iterator[None]:
    """Raise TimeoutError where the body is after `seconds`; at once if there are none."""

    def late(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError("the part's time is spent; the same command goes on with it")

    if seconds <= 0:
        late(0, None)
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(where: str, out: Path | None, only: str, again: bool, micro_batch: int = 0) -> int:
    """`kamim bench --gpu`; returns how many cases failed. Raises UserError without a GPU."""
    parts = only.split(",") if only else list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"--only {unknown[0]!r}: with --gpu there are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise UserError("--gpu: torch sees no CUDA device; `kamim doctor` says why")
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(where, Path(folder), device, micro_batch=micro_batch)
        return run(bench, out or RESULTS / "gpu.jsonl", parts, again)
