"""What the device can do, whatever the model: bytes, products, attention, JPEGs.

These are the ceilings that steps are held to.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kamim.bench.gpu import Bench, Case
from kamim.bench.measuring import in_turn
from kamim.bench.provenance import ratio, spread
from shards import Plan, ShardSet, WeightedCrops, to_device
from shards.decoding import decode_files
from shards.device import pinned
from shards.errors import UserError
from shards.loader import Loader


def ceilings(bench: Bench) -> Iterator[Case]:
    """What the device can do at best: bytes within it and to it, bf16 products."""

    def copy() -> dict[str, Any]:
        one = torch.randint(256, (1 << 30,), dtype=torch.uint8, device=bench.device)
        two = torch.empty_like(one)
        return rates(bench, lambda: two.copy_(one), 2 * one.numel() / 1e9, "gb_per_s")

    def across(up: bool) -> dict[str, Any]:
        host = torch.ones(1 << 28, dtype=torch.uint8).pin_memory()
        there = host.to(bench.device)
        target, source = (there, host) if up else (host, there)
        work = lambda: target.copy_(source, non_blocking=True)  # noqa: E731
        return rates(bench, work, host.numel() / 1e9, "gb_per_s")

    def product(m: int, n: int, k: int) -> dict[str, Any]:
        a, b = (
            torch.randn(shape, device=bench.device, dtype=torch.bfloat16)
            for shape in ((m, k), (k, n))
        )
        return rates(bench, lambda: a @ b, 2 * m * n * k / 1e12, "tflop_per_s")

    yield Case("ceilings", "copy on the device", copy)
    yield Case("ceilings", "host to device, pinned", partial(across, True))
    yield Case("ceilings", "device to host, pinned", partial(across, False))
    rows = 256 * 145  # tokens of 256 images of a ViT at 192 px
    for m, n, k in (
        (8192, 8192, 8192),
        (rows, 2304, 768),
        (rows, 768, 768),
        (rows, 3072, 768),
        (rows, 768, 3072),
        (768, 3072, rows),
    ):
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
        like: Any = {"device": bench.device, "dtype": torch.bfloat16}
        packed = torch.randn(256, tokens, 3, 12, 64, **like).permute(2, 0, 3, 1, 4)
        query, key, value = (each.detach().requires_grad_() for each in packed)
        above = torch.randn(256, 12, tokens, 64, **like)

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(query, key, value)

        def both() -> Any:
            return torch.autograd.grad(forward(), (query, key, value), above)

        with sdpa_kernel(BACKENDS[backend]) if backend in BACKENDS else nullcontext():
            with torch.no_grad():
                found, (q, k, v) = forward()[:8], packed[:, :8].double()
                want = (q @ k.transpose(-2, -1) / 8).softmax(-1) @ v
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
        frames = jpegs(bench.records, batch)
        whole = [np.frombuffer(bytearray(frame), np.uint8) for frame in frames]
        expected = np.stack([simplejpeg.decode_jpeg(frame, "RGB") for frame in frames])
        found = decode_files(whole, bench.device).cpu().numpy()
        apart = np.abs(found.astype(int) - expected)
        row = rates(bench, lambda: decode_files(whole, bench.device), batch, "images_per_s")
        begin = time.perf_counter()
        for frame in frames:
            simplejpeg.decode_jpeg(frame, "RGB")
        alone = batch / (time.perf_counter() - begin)
        return {
            **row,
            "batch": batch,
            "largest_difference": int(apart.max()),
            "mean_difference": round(float(apart.mean()), 4),
            "share_of_equal_pixels": round(float((apart == 0).mean()), 4),
            "share_by_more_than_2": round(float((apart > 2).mean()), 6),
            "one_thread_of_simplejpeg": round(alone, 1),
        }

    for batch in (64, 256, 1024):
        yield Case("decode", f"nvJPEG, {batch} at once", partial(measure, batch))
    yield Case("decode", "weighted crops", partial(crops_by_decoder, bench))


def crops_by_decoder(bench: Bench, batch: int = 256) -> dict[str, Any]:
    """Weighted crops of frames that the device decodes, in turn with those of the loader's threads,
    with nothing else to do.
    """
    records, name = bench.records, bench.records.manifest.detectors[0]
    crops = WeightedCrops(records, name, size=192).to(bench.device)
    plan, allocate = Plan(len(records), batch), pinned if bench.device.type == "cuda" else None

    def rate(coded: bool) -> float:
        how: Any = {"maps": [name], "coded": coded, "allocate": allocate}
        stream = to_device(Loader(records, plan, 0, 1 << 30, **how), bench.device)
        for _ in range(4):  # those in the queue, and one more
            crops(next(stream)[1])
        synchronize(bench.device)
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < bench.seconds:
            images += len(crops(next(stream)[1]).images)
        synchronize(bench.device)
        stream.close()
        return images / (time.perf_counter() - begin)

    found = in_turn({"threads": partial(rate, False), "device": partial(rate, True)}, bench.repeats)
    row: dict[str, Any] = {"n": bench.repeats, "batch": batch}
    row |= {"images_per_s": spread(found["device"], 1)}
    row |= {"images_per_s_by_threads": spread(found["threads"], 1)}
    return row | {"device_over_threads": ratio(found["device"], found["threads"])}


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was told, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
