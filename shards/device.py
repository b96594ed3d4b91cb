"""Batches on their way to a device: copies beside the computation, from pinned buffers."""

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.decoding import decode_files
from shards.errors import UserError
from shards.loader import Batch

Moved = Generator[tuple[Batch, dict[str, Any], torch.cuda.Event], None, None]


def to_device(
    batches: Iterable[Batch], device: torch.device | str
) -> Generator[tuple[Batch, dict[str, Any]], None, None]:
    """Each batch with its tensors on `device`: (batch, {field: tensor, or tensors by detector}).

    On CUDA the copies run beside the computation, from pinned buffers; the loader gets a buffer
    back only when its copy is done. Frames that are still files are decoded on the device.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield batch, _tensors(batch, device)
        return
    source = iter(batches)
    first = list(islice(source, 1))
    moved = _moved(chain(first, source), device, torch.cuda.Stream(device))
    if first and isinstance(first[0].frames, list):
        moved = _ahead(moved)  # decoding keeps its thread waiting
    try:
        for batch, tensors, done in moved:
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            _each(partial(_used_on, current), tensors)
            yield batch, tensors
    finally:
        moved.close()


def _moved(batches: Iterator[Batch], device: torch.device, stream: torch.cuda.Stream) -> Moved:
    """Each batch with its tensors, and the event of `stream` after which they are there."""
    for batch in batches:
        with torch.cuda.stream(stream):
            tensors = _tensors(batch, device)
        done = stream.record_event()
        yield batch, tensors, done
        done.synchronize()  # long since true: the copy is a small part of a step


def _ahead(items: Moved) -> Moved:
    """`items`, each made in a thread while the one before it is used."""
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
            coming = pool.submit(next, items, None)
            while item := coming.result():
                coming = pool.submit(next, items, None)
                yield item
    finally:
        items.close()


def _tensors(batch: Batch, device: torch.device) -> dict[str, Any]:
    def move(leaf: Any) -> Tensor:
        if isinstance(leaf, list):
            return decode_files(leaf, device)
        return torch.from_numpy(leaf).to(device, non_blocking=True)

    return _each(move, {k: v for k, v in batch._asdict().items() if k != "step"})


def _used_on(stream: torch.cuda.Stream, tensor: Tensor) -> None:
    """Keep the tensor's memory until `stream` has done all that it was given so far."""
    tensor.record_stream(stream)


def _each(call: Callable[[Any], Any], tree: dict[str, Any]) -> dict[str, Any]:
    """`call` of each leaf of a dictionary, which may hold others."""
    return {k: _each(call, v) if isinstance(v, dict) else call(v) for k, v in tree.items()}


def find_device(name: str) -> torch.device:
    """The device called `name`; auto: CUDA if there is one. Raises UserError if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name}: torch sees no CUDA device; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UserError(f"device {name}: torch sees {count} CUDA devices, from cuda:0 on")
    return device


def pinned(shape: tuple[int, ...]) -> Any:
    """A page-locked uint8 NumPy buffer, for Loader's `allocate` when training on CUDA."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()


def pin(array: NDArray[np.uint8]) -> None:
    """Lock an array's pages for as long as it lives, so that CUDA copies from them by itself."""
    cuda: Any = torch.cuda.cudart()
    at = array.ctypes.data
    if cuda.cudaHostRegister(at, array.nbytes, 0) == cuda.cudaError.success:
        weakref.finalize(array, cuda.cudaHostUnregister, at)
