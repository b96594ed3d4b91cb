"""The torch side of the contract: boxes and flips applied to frames and maps alike, and weights.

In: uint8 batches on any device, boxes in the unit square. Out: float crops [b, 3, S, S],
densities [b, c, c] and weights [b, c, c]. Import it by name; `import shards` stays without torch.
"""

from collections.abc import Generator, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from shards.bank import BANK_CELL
from shards.batch import Batch


def crop_frames(frames: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Crops of `frames` (uint8 [b, F, F, 3]) as float32 [b, 3, size, size], 0 to 255.

    Bilinear without antialias, as torchvision's crop then resize: sampling positions stay within
    the box. boxes: [b, 4] (top, left, height, width); flips: bool [b, 2] (horizontal, vertical).
    """
    pixels = frames.permute(0, 3, 1, 2).float()
    side = frames.shape[1]
    places = (torch.arange(size, device=frames.device) + 0.5) / size
    axes = []
    for axis in (1, 0):  # x, then y: the order that grid_sample wants
        begin, length = boxes[:, axis, None] * side, boxes[:, axis + 2, None] * side
        along = torch.where(flips[:, 1 - axis, None], 1 - places, places)
        at = torch.clamp(begin + length * along, begin + 0.5, begin + length - 0.5)
        axes.append(at * (2 / side) - 1)
    x, y = axes
    grid = torch.stack(
        [x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1
    )
    return F.grid_sample(pixels, grid, "bilinear", "border", align_corners=False)


def crop_maps(
    maps: Tensor, boxes: Tensor, flips: Tensor, cells: int, visible: Tensor | None = None
) -> Tensor:
    """Mean density of each of cells x cells parts of a crop, float32 [b, cells, cells], 0 to 1.

    `maps` is uint8 [b, G, G / 2], packed as in a batch (shards.record.packed). The mean over a part
    is exact: map cells count by their overlap. `visible` [cells] is the share of its marks that the
    detector finds at each distance from the crop's edge (shards.visibility.visible_cells).
    """
    density = torch.stack([maps & 15, maps >> 4], dim=-1).flatten(-2) / 15
    return crop_grid(density, boxes, flips, cells, visible)


def crop_grid(
    values: Tensor, boxes: Tensor, flips: Tensor, cells: int, visible: Tensor | None = None
) -> Tensor:
    """crop_maps of any `values` over the unit square, float32 [b, G, G], of attention say."""
    grid = values.shape[-1]
    lower = torch.arange(grid, device=values.device, dtype=torch.float32)
    edges = torch.arange(cells + 1, device=values.device) / cells
    shares = []
    for axis in (0, 1):
        at = (boxes[:, axis, None] + boxes[:, axis + 2, None] * edges) * grid
        low, high = at[:, :-1, None], at[:, 1:, None]
        overlap = torch.clamp(torch.minimum(high, lower + 1) - torch.maximum(low, lower), min=0)
        share = overlap / (high - low)
        if visible is not None:
            share = share * visible[:, None]
        shares.append(torch.where(flips[:, 1 - axis, None, None], share.flip(1), share))
    rows, columns = shares
    return rows @ values @ columns.transpose(1, 2)


def pool_counts(counts: Tensor, cells: int) -> Tensor:
    """Density of each of cells x cells parts of a stored crop, float32 [b, cells, cells].

    `counts` is uint8 [b, c, c] of a bank, as flipped; exact. `cells` must divide c.
    """
    part = counts.shape[-1] // cells
    return F.avg_pool2d(counts[:, None].float(), part)[:, 0] / BANK_CELL**2


def loss_weights(
    density: Tensor, temperature: float, normalise: Literal["min", "mean"] = "min"
) -> Tensor:
    """exp(clip(density / T, -20, 20)) of `density` [b, c, c], by each image's least or mean.

    `min` is the published form (KAMIM utils/KAMIM.py): at least 1, so that detectors and
    temperatures differ in the scale of the loss. `mean` keeps the mean weight of an image at 1.
    """
    raw = torch.exp(torch.clamp(density.float() / temperature, -20, 20))
    flat = raw.flatten(1)
    base = flat.amin(1) if normalise == "min" else flat.mean(1)
    return raw / base[:, None, None]


def to_device(
    batches: Iterable[Batch], device: torch.device
) -> Generator[tuple[Batch, dict[str, Tensor]], None, None]:
    """Each batch with its tensors on `device`: (batch, {field: tensor}).

    On CUDA the copies run beside the computation, from pinned buffers; the loader gets a buffer
    back only when its copy is done.
    """
    cuda = device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None
    for batch in batches:
        arrays = {name: torch.from_numpy(array) for name, array in batch._asdict().items()
                  if name != "step"}  # fmt: skip
        if stream is None:
            yield batch, arrays
            continue
        with torch.cuda.stream(stream):
            tensors = {name: t.to(device, non_blocking=True) for name, t in arrays.items()}
        done = stream.record_event()
        torch.cuda.current_stream(device).wait_event(done)
        for tensor in tensors.values():
            tensor.record_stream(torch.cuda.current_stream(device))
        yield batch, tensors
        done.synchronize()  # long since true: the copy is a small part of a step


def pinned(shape: tuple[int, ...]) -> Any:
    """A page-locked uint8 NumPy buffer, for Loader's `allocate` when training on CUDA."""
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
