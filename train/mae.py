"""MAE on a timm ViT: the visible patches in, the pixels of the masked ones out.

Equations and layout: arXiv 2111.06377 and facebookresearch/mae models_mae.py. The encoder is
timm's own, so an exported one loads into timm unchanged.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from train.loss import masked_mse
from train.models import make_encoder
from train.tokens import check_tokens, embed, encode, patchify, sincos, take, unpatchify


class MAE(nn.Module):
    """A timm ViT that sees visible patches only, and a narrower decoder that sees all but thrown.

    `decoder` is (width, blocks, heads); published: (512, 8, 16). `norm_pix`: targets are each
    patch's pixels by their own mean and spread. Positions are sines and cosines, and fixed.
    """

    def __init__(
        self,
        name: str,
        size: int,
        options: Mapping[str, Any] | None = None,
        decoder: tuple[int, int, int] = (512, 8, 16),
        norm_pix: bool = False,
    ) -> None:
        super().__init__()
        encoder = make_encoder(name, size, options)
        check_tokens(encoder, name)
        self.encoder: Any = encoder
        self.patch: int = encoder.patch_embed.patch_size[0]
        self.side, self.norm_pix = size // self.patch, norm_pix
        width, blocks, heads = decoder
        self.widen = nn.Linear(encoder.num_features, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions: Tensor
        self.register_buffer("positions", sincos(self.side, width)[None], persistent=False)
        self.decoder = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3 * self.patch**2)
        self._start()

    def _start(self) -> None:
        """The published initialisation, of the encoder too."""
        encoder = self.encoder
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        weight = encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.data.flatten(1))
        nn.init.normal_(self.mask_token, std=0.02)
        if encoder.cls_token is not None:
            nn.init.normal_(encoder.cls_token, std=0.02)
        fixed = torch.zeros_like(encoder.pos_embed)
        fixed[:, -(self.side**2) :] = sincos(self.side, fixed.shape[-1])
        encoder.pos_embed.data.copy_(fixed)
        encoder.pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, masked: Tensor, visible: Tensor) -> Tensor:
        """Pixels of the masked patches, [b, m, 3 * patch**2], by channel, row, column.

        `images` are [b, 3, S, S], normalised; `masked` [b, m] and `visible` [b, v] number their
        patches, row by row. Patches in neither are thrown: nothing is computed for them.
        """
        patches = take(patchify(images, self.patch), visible)
        tokens = encode(self.encoder, embed(self.encoder, patches), visible)
        tokens = self.widen(tokens)
        prefix = tokens.shape[1] - visible.shape[1]
        places = self.positions.expand(len(images), -1, -1)
        seen = tokens[:, prefix:] + take(places, visible)
        hidden = self.mask_token + take(places, masked)
        tokens = torch.cat([tokens[:, :prefix], seen, hidden], dim=1)
        pixels: Tensor = self.head(self.norm(self.decoder(tokens)[:, -masked.shape[1] :]))
        return pixels

    def loss(self, output: Tensor, images: Tensor, hidden: tuple[Tensor, ...],
             weights: Tensor | None) -> Tensor:  # fmt: skip
        """masked_mse of what forward gave for `hidden`, (masked, visible)."""
        return masked_mse(output, patchify(images, self.patch), hidden[0], weights, self.norm_pix)

    def picture(
        self, output: Tensor, images: Tensor, hidden: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstructions [b, 3, S, S], masked and visible, bool [b, side, side]).

        A model of norm_pix is given each patch's own mean and spread.
        """
        masked, _ = hidden
        patches = patchify(images, self.patch).float()
        pixels = output.float()
        if self.norm_pix:
            own = take(patches, masked)
            pixels = pixels * (own.var(2, keepdim=True) + 1e-6).sqrt() + own.mean(2, keepdim=True)
        index = masked[:, :, None].expand_as(pixels)
        whole = torch.zeros_like(patches).scatter(1, index, pixels)
        none = torch.zeros(len(images), self.side**2, dtype=torch.bool, device=images.device)
        shown, seen = (none.scatter(1, cells, True).unflatten(1, (self.side, self.side))
                       for cells in hidden)  # fmt: skip
        return unpatchify(whole, self.patch), shown, seen
