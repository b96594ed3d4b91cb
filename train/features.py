"""What a frozen encoder makes of whole images: the tokens of any of its blocks, and features.

The run's own encoder while it trains; any other by kamim/evaluate.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shards import Batch, crop_frames, to_device
from shards.progress import progress
from train.models import MEAN, STD, Colour, in_bf16, normalised

Pool = Literal["mean", "cls"]
Bar = Callable[[str, float], Any]  # (title, total) in, something with update() and a `with` out


@dataclass(frozen=True, slots=True)
class Encoder:
    """A timm ViT or Swin without a head, in evaluation mode; `size` is the image side in px.

    mean, std: what it was trained to have images normalised by, of 0 to 1; ImageNet's is ours.
    """

    title: str
    model: Any
    size: int
    mean: Colour = MEAN
    std: Colour = STD

    @property
    def is_swin(self) -> bool:
        return hasattr(self.model, "layers")

    @property
    def blocks(self) -> int:
        """Blocks of a ViT, stages of a Swin."""
        return len(self.model.layers if self.is_swin else self.model.blocks)

    @property
    def default_block(self) -> int:
        """The published probe's: block 8 of 12, two thirds of any ViT; a Swin's last stage."""
        return self.blocks if self.is_swin else max(1, round(self.blocks * 2 / 3))

    def normalised(self, images: Tensor) -> Tensor:
        """`images`, float32 [..., 3, H, W] of 0 to 255, as the model takes them."""
        return normalised(images, self.mean, self.std)


def tokens(
    encoder: Encoder, images: Tensor, block: int, norm: bool = True
) -> tuple[Tensor, Tensor]:
    """(patch tokens [b, n, d], class token [b, d]) after `block`, counted from 1.

    After the last block, the final norm is applied unless `norm` is false: timm's `norm`, or its
    `fc_norm` where that is none. The class token of a model without one is its mean token.
    """
    model = encoder.model
    last = norm and block == encoder.blocks
    options = {"indices": [block - 1], "norm": last, "stop_early": True, "intermediates_only": True}
    if encoder.is_swin:
        (out,) = model.forward_intermediates(images, **options)
        patches = out.flatten(2).transpose(1, 2)
        return patches, patches.mean(1)
    has_prefix = model.num_prefix_tokens > 0
    options |= {"output_fmt": "NLC", "return_prefix_tokens": has_prefix}
    (out,) = model.forward_intermediates(images, **options)
    final = model.fc_norm if last and isinstance(model.norm, nn.Identity) else nn.Identity()
    if not has_prefix:
        patches = final(out)
        return patches, patches.mean(1)
    patches, prefix = out
    patches = final(patches)
    if getattr(model, "cls_token", None) is None:  # registers alone
        return patches, patches.mean(1)
    return patches, final(prefix[:, 0])


def frames_of(
    batches: Iterable[Batch], size: int, device: torch.device, cropped: bool = False
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """(frames float32 [b, 3, size, size] of 0 to 255, the batch's tensors) of a loader's batches.

    Whole frames, squeezed without antialias as the published validation does it, with the boxes and
    flips of that, or `cropped`: the plan's crops.
    """
    for _, tensors in to_device(batches, device):
        if not cropped:
            tensors["boxes"] = torch.ones_like(tensors["boxes"])
            tensors["boxes"][:, :2] = 0
            tensors["flips"] = torch.zeros_like(tensors["flips"])
        boxes, flips = tensors["boxes"], tensors["flips"]
        yield crop_frames(tensors["frames"], boxes, flips, size), tensors


def features_of(
    encoder: Encoder,
    batches: Iterable[Batch],
    count: int,
    block: int,
    pool: Pool,
    device: torch.device,
    title: str,
    bar: Bar = progress,
) -> tuple[Tensor, Tensor]:
    """(features float32 [count, d], labels int64 [count]) of all `batches`, on the CPU.

    Of whole frames; a Swin's are those before its final norm, as in the published probe.
    """
    found, labels = [], []
    with bar(title, count) as shown, torch.inference_mode():
        for frames, rest in frames_of(batches, encoder.size, device):
            with in_bf16(device):
                images = encoder.normalised(frames)
                patches, cls = tokens(encoder, images, block, not encoder.is_swin)
            found.append((patches.mean(1) if pool == "mean" else cls).float().cpu())
            labels.append(rest["labels"].cpu().clone())
            shown.update(len(frames))
    return torch.cat(found), torch.cat(labels)
