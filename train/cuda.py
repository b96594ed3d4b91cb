"""What a CUDA card is and how it is set for a run: peak, attention kernel, determinism."""

import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from train.progress import say
from train.request import compiler_missing

# Dense bfloat16 FLOP/s by words of a card's name, as NVIDIA's data sheets have them; the first line
# whose words are all there counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
PARTS = {"MIG", "GRID", "Ti", "D", "Laptop"}  # words of a part of a card, or of another
ATTENTION = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TRIED = 512  # images that attention is timed on: of 64 the launches are timed, not the kernels


def peak_flops(name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the card that torch calls `name`; None if it is not known."""
    words = set(re.split(r"[^A-Za-z0-9]+", name))
    if words & PARTS:
        return None
    return next((peak for card, peak in PEAK_FLOPS.items() if set(card.split()) <= words), None)


def warn_of_what_is_missing(device: torch.device, compiles: bool = True) -> None:
    """Warn if training on `device` is not what one would expect of this machine."""
    if device.type == "cuda":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            name = torch.cuda.get_device_name(device)
            say(f"warning: {name} has no bfloat16, which training computes in: it is emulated")
        if compiles and compiler_missing():
            say(f"warning: training is not compiled, and slow; type: {compiler_missing()}")
    elif any(Path("/dev").glob("nvidia[0-9]*")) and not torch.cuda.is_available():
        say(
            f"warning: there is an NVIDIA device, and torch sees no CUDA: its driver may be older "
            f"than the CUDA {torch.version.cuda} of this torch. Training on the CPU; see nvidia-smi"
        )


def make_deterministic() -> None:
    """Have torch use only algorithms that give the same bits each time, or raise.

    Before the first operation on a device, and before anything is compiled.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ["TORCHINDUCTOR_DETERMINISTIC"] = "1"
    import torch._inductor.config as inductor

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
    torch.use_deterministic_algorithms(True)
    # No memory is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def pin_attention(model: Any, size: int, device: torch.device, timed: bool = True) -> str:
    """Choose the attention kernel of `model` by its time on crops of `size` px, for this process;
    returns a line about it, or nothing where attention is not torch's.

    Not `timed`, it is flash: what is fastest may differ from start to start. Where the chosen one
    cannot serve (the heads of a decoder, say), torch takes the efficient one.
    """
    blocks = getattr(model.encoder, "blocks", None)
    attention: Any = None if blocks is None else getattr(blocks[0], "attn", None)
    if device.type != "cuda" or not getattr(attention, "fused_attn", False):
        return ""
    heads = attention.num_heads
    tokens = (size // model.patch) ** 2 + model.encoder.num_prefix_tokens
    shape = TRIED, tokens, 3, heads, model.encoder.num_features // heads
    if not timed:
        _allow("flash")
        return "attention by flash, untimed"
    spent = {kernel: _time_attention(kernel, shape, device) for kernel in ATTENTION}
    best = min(spent, key=lambda kernel: spent[kernel])
    _allow(best)
    times = ", ".join(f"{kernel} {each:.2f}" for kernel, each in spent.items())
    return f"attention by {best}: ms for forward and backward of {TRIED} images, a layer: {times}"


def _allow(kernel: str) -> None:
    """Leave torch the attention `kernel`, and the efficient one for what that cannot do."""
    torch.backends.cuda.enable_cudnn_sdp(kernel == "cuDNN")
    torch.backends.cuda.enable_flash_sdp(kernel == "flash")


def _time_attention(kernel: str, shape: tuple[int, ...], device: torch.device) -> float:
    """Milliseconds of one layer, forward and backward; infinite where `kernel` cannot serve."""
    packed = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    def layer() -> None:
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # as timm has them
        output = F.scaled_dot_product_attention(query, key, value)
        output.backward(output.detach())

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    try:
        with sdpa_kernel(ATTENTION[kernel]):
            for mark in marks:  # the first ten warm up
                for _ in range(10):
                    layer()
                mark.record()
        marks[1].synchronize()
    except RuntimeError:
        return float("inf")
    return marks[0].elapsed_time(marks[1]) / 10
