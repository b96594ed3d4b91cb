"""What a run will cost, said before it costs it: time, memory, and how large its parts may be.

In: a model, a recipe, a device. Out: numbers, and lines for stderr.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

CPU_PART = 200e9  # operations a micro-step may take on a CPU: seconds, and little memory
PER_PARAMETER = 16  # bytes: weight, gradient and AdamW's two means, float32
LONG = 3600  # seconds on a CPU that deserve a warning


def largest_part(micro_batch: int, flops: float, device: torch.device) -> int:
    """Most images of a micro-step: the recipe's `micro_batch`, on a CPU fewer of a large model.

    There a step of ViT-B would be silent for minutes and take 15 GB, and a micro-step of two
    images is no slower by the image. Depends on the model alone, not on the machine, so that
    losses do not. `flops`: of forward and backward, an image.
    """
    return max(1, min(micro_batch, int(CPU_PART / flops))) if device.type == "cpu" else micro_batch


def memory_needed(
    model: nn.Module, hidden: tuple[Tensor, ...], size: int, part: int, device: torch.device
) -> float:
    """Bytes that training takes with `part` images a micro-step, from what one image leaves for
    its backward pass. `hidden` is what the model takes beside one image.

    Changes neither gradients nor random state.
    """
    image = torch.zeros(1, 3, size, size, device=device)
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        output = model(image, *hidden)
    del output
    return PER_PARAMETER * sum(p.numel() for p in model.parameters()) + part * sum(kept.values())


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


def memory_lines(needed: float, part: int, device: torch.device) -> list[str]:
    """A warning if `needed` bytes are more than there are."""
    free = memory_free(device)
    if needed <= free:
        return []
    name = "the GPU" if device.type == "cuda" else "this machine"
    smaller = f"--micro-batch {part // 2} takes less" if part > 1 else "take a smaller model"
    return [f"warning: training needs about {needed / 1e9:.1f} GB and {name} has "
            f"{free / 1e9:.1f} GB free; {smaller}"]  # fmt: skip


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was told, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_lines(seconds: float, micro_steps: int, steps: int, device: torch.device) -> list[str]:
    """What a step and all `steps` will take, where one of `micro_steps` took `seconds`."""
    step = seconds * micro_steps
    lines = [f"a step takes about {duration(step)}, all {steps:,} about {duration(step * steps)}"]
    if device.type == "cpu" and step * steps > LONG:
        lines.append("warning: that is long for a CPU: use a machine with a GPU, --recipe demo, or "
                     "fewer --epochs; Ctrl-C saves and stops")  # fmt: skip
    return lines


def duration(seconds: float) -> str:
    """`seconds` as a person says it."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
