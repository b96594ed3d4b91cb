"""SimMIM and MAE on timm backbones: images and cells in, pixels of what is masked out.

Equations and layout: SimMIM, arXiv 2111.09886 and microsoft/SimMIM models/simmim.py; MAE, arXiv
2111.06377 and facebookresearch/mae models_mae.py. The encoders are timm's own, so an exported one
loads into timm unchanged.
"""

from collections.abc import Mapping
from functools import cache, partial
from inspect import signature
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from shards.errors import UserError, nearest
from train.loss import masked_l1, masked_mse, take
from train.patches import patchify, sincos, unpatchify
from train.recipes import Recipe
from train.tokens import as_autocast, check_plain, check_tokens, embed, encode, through_blocks

CELL = 32  # px of a mask cell, SimMIM's own; of a token after Swin's last stage
# No option of a model: what a recipe or a frame decides, and what has timm fetch or read weights,
# as options come with files of others too.
NO_OPTIONS = {*signature(timm.create_model).parameters, "img_size", "dynamic_img_size", "in_chans"}
NO_OPTIONS |= {"num_classes", "features_only", "out_indices"}
Colour = tuple[float, ...]  # of red, green and blue
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as published


class Cells(NamedTuple):
    """What a model is shown of some images. Cells are numbered row by row; SimMIM's have `cell` px,
    MAE's are patches. A cell that is in neither field is thrown.

    masked: cells to reconstruct. SimMIM: bool [b, g, g], True where masked. MAE: int64 [b, m].
    encoded: cells that the encoder computes, int64 [b, k]. SimMIM: all but the thrown, the masked
    as mask tokens; None if none is thrown. MAE: the visible.
    """

    masked: Tensor
    encoded: Tensor | None = None

    def first(self, count: int) -> "Cells":
        """The cells of the first `count` images."""
        encoded = None if self.encoded is None else self.encoded[:count]
        return Cells(self.masked[:count], encoded)


def make_model(recipe: Recipe) -> "SimMIM | MAE":
    """The recipe's model, untrained. Raises UserError if its encoder cannot serve."""
    model: SimMIM | MAE
    if recipe.method == "mae":
        options = recipe.options, recipe.decoder, recipe.norm_pix, recipe.bf16_residual
        model = MAE(recipe.model, recipe.size, *options)
    else:
        model = SimMIM(recipe.model, recipe.size, recipe.options, recipe.bf16_residual, recipe.cell)
        if recipe.throw_ratio:
            check_tokens(model.encoder, recipe.model)
    if recipe.checkpoint:
        model.encoder.set_grad_checkpointing(True)
    return model


class SimMIM(nn.Module):
    """A timm ViT or Swin encoder, a mask token and a one-layer decoder.

    `name` is a timm model name, `size` the image side in px, a multiple of `cell`, a mask cell's;
    `options` go to timm.create_model. `bf16_residual`: patches are embedded and decoded by
    products, and tokens between blocks are in autocast's type: less to move, other rounding.
    """

    def __init__(
        self,
        name: str,
        size: int,
        options: Mapping[str, Any] | None = None,
        bf16_residual: bool = False,
        cell: int = CELL,
    ) -> None:
        super().__init__()
        self.bf16_residual, self.cell = bf16_residual, cell
        encoder = make_encoder(name, size, options)
        check_plain(encoder, name)
        self.is_swin = hasattr(encoder, "layers")
        self.patch: int = encoder.patch_embed.patch_size[0]
        if size % cell:
            raise UserError(f"crop size {size} is no multiple of the mask cell, {cell} px")
        if cell % self.patch:
            raise UserError(
                f"the mask cell, {cell} px, is no multiple of the patches of {name}, "
                f"{self.patch} px; set cell to one that is"
            )
        reduction = encoder.feature_info[-1]["reduction"] if self.is_swin else self.patch
        if size % reduction:
            raise UserError(f"crop size {size} is no multiple of a token's {reduction} px")
        self.stride: int = reduction
        embed: int = encoder.patch_embed.proj.out_channels
        self.encoder: Any = encoder
        self.mask_token = nn.Parameter(torch.zeros(embed))
        self.decoder: Any = nn.Sequential(
            nn.Conv2d(encoder.num_features, 3 * self.stride**2, kernel_size=1),
            nn.PixelShuffle(self.stride),
        )
        self._start()

    def _start(self) -> None:
        """The published initialisation, where timm's and torch's differ from it."""
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        if getattr(self.encoder, "cls_token", None) is not None:
            nn.init.trunc_normal_(self.encoder.cls_token, std=0.02)
        for convolution in (self.encoder.patch_embed.proj, self.decoder[0]):
            nn.init.trunc_normal_(convolution.weight, std=0.02)
            if convolution.bias is not None:
                nn.init.zeros_(convolution.bias)

    def forward(self, images: Tensor, mask: Tensor, encoded: Tensor | None = None) -> Tensor:
        """Reconstructions [b, 3, S, S] of `images` [b, 3, S, S], normalised as they are.

        `mask` and `encoded` are Cells. Nothing is computed for thrown cells: they come out as 0.
        """
        if encoded is not None:
            return self._some(images, mask, encoded)
        encode = self._swin if self.is_swin else self._vit
        return self._decoded(encode(images, mask))

    def _decoded(self, features: Tensor) -> Tensor:
        """Pixels [b, 3, S, S] of `features` [b, d, h, w]."""
        if not self.bf16_residual:
            pixels: Tensor = self.decoder(features)
            return pixels
        widen: Any = self.decoder[0]
        by_place = F.linear(features.permute(0, 2, 3, 1), widen.weight.flatten(1), widen.bias)
        out: Tensor = self.decoder[1](by_place.permute(0, 3, 1, 2))
        return out

    def _vit(self, images: Tensor, mask: Tensor) -> Tensor:
        encoder = self.encoder
        tokens = self._hide(self._embedded(images), self._cells(mask))
        tokens = self._residual(encoder.norm_pre(encoder._pos_embed(tokens)))
        tokens = encoder.norm(through_blocks(encoder, tokens))[:, encoder.num_prefix_tokens :]
        side = images.shape[-1] // self.patch
        return tokens.transpose(1, 2).unflatten(2, (side, side))

    def _some(self, images: Tensor, mask: Tensor, encoded: Tensor) -> Tensor:
        """As _vit and the decoder, on the patches of the encoded cells alone."""
        side, times = images.shape[-1] // self.patch, self.cell // self.patch
        numbers = torch.arange(side**2, device=images.device).view(1, side, side)
        # Patches of each cell: [cells, times**2].
        table = patchify(numbers[:, None].expand(-1, 3, -1, -1), times)[0, :, : times**2]
        index = table[encoded].flatten(1)
        hidden = self._cells(mask).gather(1, index)
        tokens = embed(self.encoder, take(patchify(images, self.patch), index))
        tokens = encode(self.encoder, self._hide(tokens, hidden), index, self.bf16_residual)
        tokens = tokens[:, -index.shape[1] :]
        widen, arrange = self.decoder
        pixels = widen(tokens.transpose(1, 2)[..., None])[..., 0]  # [b, 3 * patch**2, k]
        none = pixels.new_zeros(len(images), pixels.shape[1], side**2)
        whole = none.scatter(2, index[:, None].expand_as(pixels), pixels)
        out: Tensor = arrange(whole.unflatten(2, (side, side)))
        return out

    def loss(self, output: Tensor, images: Tensor, cells: Cells, weights: Tensor | None) -> Tensor:
        """masked_l1 of what forward gave for `cells`."""
        return masked_l1(output, images, cells.masked, weights)

    def mask_of(self, cells: Cells) -> Tensor:
        """Where `cells` are masked, bool [b, g, g]."""
        return cells.masked

    def picture(
        self, output: Tensor, images: Tensor, cells: Cells
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstructions [b, 3, S, S], masked and visible, bool [b, g, g])."""
        mask, encoded = cells
        visible = ~mask
        if encoded is not None:
            none = torch.zeros_like(mask).flatten(1)
            visible = visible & none.scatter(1, encoded, True).view_as(mask)
        return output, mask, visible

    def _swin(self, images: Tensor, mask: Tensor) -> Tensor:
        encoder, side = self.encoder, images.shape[-1] // self.patch
        tokens = self._hide(self._embedded(images), self._cells(mask))
        tokens = self._residual(tokens).unflatten(1, (side, side))
        return encoder.norm(encoder.layers(tokens)).permute(0, 3, 1, 2)

    def _embedded(self, images: Tensor) -> Tensor:
        """The encoder's embedding of all patches, [b, n, d]."""
        if self.bf16_residual:
            return embed(self.encoder, patchify(images, self.patch))
        tokens: Tensor = self.encoder.patch_embed(images)  # Swin's [b, h, w, d]
        return tokens.flatten(1, 2) if self.is_swin else tokens

    def _residual(self, tokens: Tensor) -> Tensor:
        return as_autocast(tokens) if self.bf16_residual else tokens

    def _cells(self, mask: Tensor) -> Tensor:
        """The mask on the patch grid, bool [b, patches]."""
        times = self.cell // self.patch
        return mask.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)

    def _hide(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        return torch.where(hidden[:, :, None], self.mask_token.to(tokens.dtype), tokens)


class MAE(nn.Module):
    """A timm ViT that sees visible patches only, and a narrower decoder that sees all but thrown.

    `decoder` is (width, blocks, heads); published: (512, 8, 16). `norm_pix`: targets are each
    patch's pixels by their own mean and spread. Positions are sines and cosines, and fixed.
    `bf16_residual` as SimMIM's.
    """

    def __init__(
        self,
        name: str,
        size: int,
        options: Mapping[str, Any] | None = None,
        decoder: tuple[int, int, int] = (512, 8, 16),
        norm_pix: bool = False,
        bf16_residual: bool = False,
    ) -> None:
        super().__init__()
        self.bf16_residual = bf16_residual
        encoder = make_encoder(name, size, options)
        check_tokens(encoder, name)
        self.encoder: Any = encoder
        self.patch: int = encoder.patch_embed.patch_size[0]
        self.side, self.norm_pix = size // self.patch, norm_pix
        width, blocks, heads = decoder
        if width % heads:
            raise UserError(f"decoder {decoder}: a width of {width} has no {heads} equal heads")
        self.widen = nn.Linear(encoder.num_features, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions: Tensor
        self.register_buffer("positions", sincos(self.side, width)[None], persistent=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, width, heads, qkv_bias=True, norm_layer=norm)
        self.decoder = nn.Sequential(*(block() for _ in range(blocks)))
        self.norm = norm(width)
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
        tokens = encode(self.encoder, embed(self.encoder, patches), visible, self.bf16_residual)
        tokens = self.widen(tokens)
        prefix = tokens.shape[1] - visible.shape[1]
        places = self.positions.expand(len(images), -1, -1)
        seen = tokens[:, prefix:] + take(places, visible)
        hidden = self.mask_token + take(places, masked)
        tokens = torch.cat([tokens[:, :prefix], seen, hidden], dim=1)
        tokens = as_autocast(tokens) if self.bf16_residual else tokens
        pixels: Tensor = self.head(self.norm(self.decoder(tokens)[:, -masked.shape[1] :]))
        return pixels

    def loss(self, output: Tensor, images: Tensor, cells: Cells, weights: Tensor | None) -> Tensor:
        """masked_mse of what forward gave for `cells`."""
        patches = patchify(images, self.patch)
        return masked_mse(output, patches, cells.masked, weights, self.norm_pix)

    def mask_of(self, cells: Cells) -> Tensor:
        """Where `cells` are masked, bool [b, side, side]."""
        return self._grid(cells.masked)

    def _grid(self, index: Tensor) -> Tensor:
        """True at the patches of `index` [b, k], bool [b, side, side]."""
        none = torch.zeros(len(index), self.side**2, dtype=torch.bool, device=index.device)
        return none.scatter(1, index, True).unflatten(1, (self.side, self.side))

    def picture(
        self, output: Tensor, images: Tensor, cells: Cells
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(reconstructions [b, 3, S, S], masked and visible, bool [b, side, side]).

        A model of norm_pix is given each patch's own mean and spread.
        """
        masked = cells.masked
        patches = patchify(images, self.patch).float()
        pixels = output.float()
        if self.norm_pix:
            own = take(patches, masked)
            pixels = pixels * (own.var(2, keepdim=True) + 1e-6).sqrt() + own.mean(2, keepdim=True)
        index = masked[:, :, None].expand_as(pixels)
        whole = torch.zeros_like(patches).scatter(1, index, pixels)
        shown, seen = (self._grid(each) for each in cells if each is not None)
        return unpatchify(whole, self.patch), shown, seen


def make_encoder(name: str, size: int, options: Mapping[str, Any] | None = None) -> Any:
    """The timm model `name` without a head at `size` px. UserError if it has no whole patches."""
    if "swin" in name and size % CELL:
        raise UserError(f"crop size {size} is no multiple of a Swin's {CELL} px; use 192")
    if name not in timm.list_models():
        some = ", ".join(timm.list_models(f"*{name.split('_')[0]}*patch*")[:5])
        near = nearest(name, timm.list_models()) or f"; it has {some} ..."
        raise UserError(f"timm has no model {name!r}{near}")
    for option in map(str, options or {}):
        if option in NO_OPTIONS or option.startswith("pretrained"):
            raise UserError(f"options: {option} is not to be set for {name!r}; leave it out")
    try:
        encoder: Any = timm.create_model(name, **encoder_options(name, size, options))
    except (
        ArithmeticError,
        AssertionError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if options:
            raise UserError(f"timm makes no {name!r} with {dict(options)}: {error}") from None
        raise UserError(f"timm's {name!r} takes no img_size; use a ViT or Swin") from None
    if not is_known(encoder) or size % encoder.patch_embed.patch_size[0]:
        raise UserError(f"{name!r} is no ViT or Swin whose patches divide {size} px")
    for unused in ("attn_pool", "fc_norm"):  # for whose gradients several processes would wait
        part = getattr(encoder, unused, None)
        if part is not None:
            part.requires_grad_(False)
    return encoder


def is_known(encoder: Any) -> bool:
    """Whether it is of a kind that we know the parts of: a ViT or Swin of timm."""
    return hasattr(encoder, "layers") or hasattr(encoder, "_pos_embed")


def encoder_options(
    name: str, size: int, options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The arguments that make timm build our encoder of `name` at `size` px."""
    # Windows of 6 at 192 px, of 7 at 224: Swin's last stage is one window. timm's Swin drops 0.1 of
    # its paths, as in supervised training; pretraining none, as published.
    swin = {"window_size": size // CELL, "drop_path_rate": 0.0} if "swin" in name else {}
    return {"img_size": size, "num_classes": 0, **swin, **(options or {})}


def model_flops(model: nn.Module, size: int, cells: Cells | tuple[()] | None = None) -> float:
    """Floating-point operations of forward and backward for one image: three times forward's.

    cells: of one image; None is SimMIM's mask.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    image = torch.zeros(1, 3, size, size, device=device)
    if cells is None:
        side = size // CELL
        cells = Cells(torch.ones(1, side, side, dtype=torch.bool, device=device))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image, *cells)
    return 3.0 * counter.get_total_flops()


def in_bf16(device: torch.device) -> torch.autocast:
    """The precision that models run in: bfloat16 where it pays on CUDA, on a CPU float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def normalised(images: Tensor, mean: Colour = MEAN, std: Colour = STD) -> Tensor:
    """float32 [..., 3, H, W] of 0 to 255 by `mean` and deviation, of 0 to 1."""
    shift, scale = _constants(images.device, mean, std)
    return (images - shift) / scale


@cache
def _constants(device: torch.device, *colours: Colour) -> list[Tensor]:
    """`colours` of 0 to 255, [3, 1, 1]; once a device: a copy from the host waits for it."""
    with torch.inference_mode(False):
        return [(torch.tensor(each).view(3, 1, 1) * 255).to(device) for each in colours]
