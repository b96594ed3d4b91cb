"""A micro-step as one function, and the pace at which a host hands micro-steps to a device."""

import time
import warnings
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shards import Batch, WeightedCrops
from train.loss import effective_share
from train.models import Cells, in_bf16

AHEAD = 2  # micro-steps that the device has before it; the host waits for the one before them
Mark = Any  # a torch.cuda.Event, or seconds of a CPU's clock


class Step(nn.Module):
    """What a micro-step computes of a batch's tensors and its cells: (loss, [mean weight, effective
    share of the weights]).

    Crops, weights, forward and loss in one module, so that torch.compile makes one graph of them.
    Products are in bfloat16 on CUDA; crops, weights and the loss are float32.
    """

    def __init__(self, model: Any, crops: WeightedCrops) -> None:
        super().__init__()
        self.model, self.crops = model, crops

    def forward(self, tensors: dict[str, Any], cells: Cells) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            images, weights, *_ = self.crops(tensors)
        with in_bf16(images.device):
            output = self.model(images, *cells)
        loss = self.model.loss(output, images, cells, weights)
        if weights is None:
            return loss, loss.new_ones(2)
        share = effective_share(weights, self.model.mask_of(cells))
        return loss, torch.stack([weights.mean(), share])


def weighed(temperature: float | None, device: torch.device) -> dict[str, Tensor]:
    """What a batch is given of a temperature that changes: a tensor, or each would be a graph of
    its own; filled on the device, which waits for nothing.
    """
    if temperature is None:
        return {}
    return {"temperature": torch.full((), temperature, device=device)}


def in_parallel(step: nn.Module) -> nn.Module:
    """`step` with its gradients averaged over processes; its buffers are constants."""
    with warnings.catch_warnings():  # torch 2.15 has another name for it, which 2.11 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
        return nn.parallel.DistributedDataParallel(
            step, gradient_as_bucket_view=True, broadcast_buffers=False
        )


def compiled(step: nn.Module) -> Any:
    """`step` as torch.compile makes it, for inputs of one shape."""
    # It advises TF32, which would read weights off the maps wrong by up to 0.34 %.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    return torch.compile(step, dynamic=False)


class Pace:
    """Hands out batches while the host is AHEAD micro-steps before the device, no more.

    waited: seconds in which the device had nothing to do: the host waited for a batch, and the
    device had finished all its work. On a CPU those in which the process waited.
    second: seconds of the second micro-step, once it is known; the first warms up.
    """

    def __init__(
        self, batches: Iterator[tuple[Batch, dict[str, Any]]], device: torch.device
    ) -> None:
        self.batches, self.cuda = batches, device.type == "cuda"
        self.waited = 0.0
        self.second: float | None = None
        self.parts = 0  # of which it is known how long they took
        self._open: deque[tuple[Mark, Mark, float]] = deque()
        self._begun: Mark = None

    def next(self) -> tuple[Batch, dict[str, Any]]:
        """The next batch and its tensors. Ends the micro-step before, and begins another."""
        while len(self._open) >= (AHEAD if self.cuda else 1):
            self._settle(*self._open.popleft())
        ended, asked = self._mark(), time.perf_counter()
        found = next(self.batches)
        self._open.append((ended, self._mark(), time.perf_counter() - asked))
        return found

    def take(self) -> float:
        """`waited` since it was taken last."""
        waited, self.waited = self.waited, 0.0
        return waited

    def _mark(self) -> Mark:
        """Now, on the device: when all that it was given so far is done."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _settle(self, ended: Mark, begun: Mark, host: float) -> None:
        """Account for a wait of `host` seconds between two marks, once the device is past them."""
        if self.cuda:
            begun.synchronize()
        self.waited += min(host, self._between(ended, begun))
        if self._begun is not None:
            self.parts += 1
            if self.parts == 2:
                self.second = self._between(self._begun, ended)
        self._begun = begun

    def _between(self, first: Mark, second: Mark) -> float:
        return first.elapsed_time(second) / 1e3 if self.cuda else second - first
