"""SimMIM on a timm backbone: images and a mask in, reconstructed images out.

Equations and layout: arXiv 2111.09886 and microsoft/SimMIM models/simmim.py; the backbones are
timm's own, so an exported encoder loads into timm unchanged.
"""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.loss import masked_l1
from train.tokens import embed, encode, patchify, take
from train.words import nearest

CELL = 32  # px of a mask cell, SimMIM's


class SimMIM(nn.Module):
    """A timm ViT or Swin encoder, a mask token and a one-layer decoder.

    `name` is a timm model name, `size` the image side in px, a multiple of CELL; `options` go to
    timm.create_model.
    """

    def __init__(self, name: str, size: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        encoder = make_encoder(name, size, options)
        self.is_swin = hasattr(encoder, "layers")
        self.patch: int = encoder.patch_embed.patch_size[0]
        self.stride = CELL if self.is_swin else self.patch
        embed: int = encoder.patch_embed.proj.out_channels
        self.encoder: Any = encoder
        self.mask_token = nn.Parameter(torch.zeros(embed))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.num_features, 3 * self.stride**2, kernel_size=1),
            nn.PixelShuffle(self.stride),
        )

    def forward(self, images: Tensor, mask: Tensor, kept: Tensor | None = None) -> Tensor:
        """Reconstructions [b, 3, S, S] of `images` [b, 3, S, S], normalised as they are.

        `mask` is bool [b, S / 32, S / 32], True where the model does not see the image. `kept`
        [b, k] numbers the cells that are not thrown, row by row: nothing is computed for others,
        and they come out as 0. None: all are kept.
        """
        if kept is not None:
            return self._some(images, mask, kept)
        encode = self._swin if self.is_swin else self._vit
        pixels: Tensor = self.decoder(encode(images, mask))
        return pixels

    def _vit(self, images: Tensor, mask: Tensor) -> Tensor:
        encoder = self.encoder
        tokens = encoder.patch_embed(images)
        tokens = self._hide(tokens, self._cells(mask))
        tokens = encoder.norm_pre(encoder._pos_embed(tokens))
        tokens = encoder.norm(encoder.blocks(tokens))[:, encoder.num_prefix_tokens :]
        side = images.shape[-1] // self.patch
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def _some(self, images: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
        """As _vit and the decoder, on the patches of the kept cells alone."""
        side, times = images.shape[-1] // self.patch, CELL // self.patch
        numbers = torch.arange(side**2, device=images.device).view(1, side, side)
        # Patches of each cell: [cells, times**2].
        table = patchify(numbers[:, None].expand(-1, 3, -1, -1), times)[0, :, : times**2]
        index = table[kept].flatten(1)
        hidden = self._cells(mask).gather(1, index)
        tokens = embed(self.encoder, take(patchify(images, self.patch), index))
        tokens = encode(self.encoder, self._hide(tokens, hidden), index)
        tokens = tokens[:, -index.shape[1] :]
        widen, arrange = self.decoder
        pixels = widen(tokens.transpose(1, 2)[..., None])[..., 0]  # [b, 3 * patch**2, k]
        none = pixels.new_zeros(len(images), pixels.shape[1], side**2)
        whole = none.scatter(2, index[:, None].expand_as(pixels), pixels)
        out: Tensor = arrange(whole.unflatten(2, (side, side)))
        return out

    def loss(self, output: Tensor, images: Tensor, hidden: tuple[Tensor, ...],
             weights: Tensor | None) -> Tensor:  # fmt: skip
        """masked_l1 of what forward gave for `hidden`, (mask,) or (mask, kept)."""
        return masked_l1(output, images, hidden[0], weights)

    def picture(
        self, output: Tensor, images: Tensor, hidden: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstructions [b, 3, S, S], masked and visible, bool [b, S / 32, S / 32])."""
        mask, *kept = hidden
        visible = ~mask
        if kept:
            all_of_them = torch.zeros_like(mask).flatten(1).scatter(1, kept[0], True).view_as(mask)
            visible = visible & all_of_them
        return output, mask, visible

    def _swin(self, images: Tensor, mask: Tensor) -> Tensor:
        encoder = self.encoder
        tokens = encoder.patch_embed(images)  # [b, h, w, c]
        hidden = self._hide(tokens.flatten(1, 2), self._cells(mask)).view_as(tokens)
        return encoder.norm(encoder.layers(hidden)).permute(0, 3, 1, 2)

    def _cells(self, mask: Tensor) -> Tensor:
        """The mask on the patch grid, bool [b, patches]."""
        times = CELL // self.patch
        return mask.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)

    def _hide(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        return torch.where(hidden[:, :, None], self.mask_token.to(tokens.dtype), tokens)


def make_encoder(name: str, size: int, options: Mapping[str, Any] | None = None) -> Any:
    """The timm model `name` without a head at `size` px. Raises UserError if it cannot serve."""
    if size % CELL:
        raise UserError(f"crop size {size} is no multiple of the mask cell, {CELL} px; use 192")
    if name not in timm.list_models():
        some = ", ".join(timm.list_models(f"*{name.split('_')[0]}*patch*")[:5])
        near = nearest(name, timm.list_models()) or f"; it has {some} ..."
        raise UserError(f"timm has no model {name!r}{near}")
    try:
        encoder: Any = timm.create_model(name, **encoder_options(name, size, options))
    except TypeError:
        raise UserError(f"timm's {name!r} takes no img_size; use a ViT or Swin") from None
    known = hasattr(encoder, "layers") or hasattr(encoder, "_pos_embed")
    if not known or CELL % encoder.patch_embed.patch_size[0]:
        raise UserError(f"{name!r} is no ViT or Swin whose patches divide {CELL} px")
    return encoder


def encoder_options(
    name: str, size: int, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments that make timm build our encoder of `name` at `size` px."""
    # Windows of 6 at 192 px, of 7 at 224: Swin's last stage is one window.
    window = {"window_size": size // CELL} if "swin" in name else {}
    return {"img_size": size, "num_classes": 0, **window, **(options or {})}


def model_flops(model: nn.Module, size: int, hidden: tuple[Tensor, ...] | None = None) -> float:
    """Floating-point operations of forward and backward for one image: three times forward's.

    `hidden` is what the model takes beside one image; None is SimMIM's mask.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    image = torch.zeros(1, 3, size, size, device=device)
    if hidden is None:
        hidden = (torch.ones(1, size // CELL, size // CELL, dtype=torch.bool, device=device),)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image, *hidden)
    return 3.0 * counter.get_total_flops()
