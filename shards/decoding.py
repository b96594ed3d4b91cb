"""JPEG frames decoded by the device, by torchvision, in place of the loader's threads."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.dataset import ShardSet
from shards.errors import UserError
from shards.record import encode_frame


def decode_files(files: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """JPEG `files` of one size as pixels on `device`, uint8 [b, F, F, 3]: on CUDA by nvJPEG.

    Its pixels are not those of the CPU's decoder to the last bit (docs/decisions.md). Raises
    UserError if a file does not decode, or if torchvision or CUDA's decoder is missing.
    """
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError as error:
        raise UserError(
            f"decoding on the GPU needs torchvision ({error}); decode on the CPU, or type: pip "
            "install torchvision"
        ) from None
    tensors = [torch.from_numpy(file) for file in files]
    try:
        found = decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device)
        return torch.stack(found).permute(0, 2, 3, 1)
    except RuntimeError as error:
        problem = str(error).strip().splitlines()[0]
        raise UserError(
            f"torchvision does not decode these frames on {device} ({problem}); decode on the "
            "CPU, or find damage with `kamim shards verify --level decode`"
        ) from None


def check_decoding(records: ShardSet, device: torch.device, skip: bool) -> None:
    """UserError unless the set's frames can be decoded on `device`."""
    where = f"{records.folder} cannot be decoded on the GPU"
    if records.manifest.container != "webdataset":
        raise UserError(f"{where}: FFCV decodes its frames; leave decode at cpu")
    if records.manifest.settings.quality == 0:
        raise UserError(f"{where}: its frames are raw pixels; leave decode at cpu")
    if skip:
        raise UserError(f"{where} if damage is to be skipped; leave decode at cpu")
    if device.type != "cuda":
        raise UserError(f"{where}: this runs on {device}; leave decode at cpu")
    side = records.manifest.settings.frame
    trial = encode_frame(np.zeros((side, side, 3), np.uint8), 90)
    decode_files([np.frombuffer(bytearray(trial), np.uint8)], device)
