"""A ViT run on some of its patches: those that are left out cost nothing.

timm's modules, called in the order of its forward_features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.patch_embed import PatchEmbed
from timm.models import checkpoint_seq
from torch import Tensor, nn

from shards.errors import UserError
from train.loss import take


def check_plain(encoder: Any, name: str) -> None:
    """UserError unless `encoder` embeds each patch by itself, and its blocks take tokens alone."""
    stem, is_swin = encoder.patch_embed, hasattr(encoder, "layers")
    if not isinstance(stem, PatchEmbed):
        raise UserError(
            f"{name}: a network runs before its patches, and mixes them; use a plain ViT"
        )
    if not is_swin and not stem.flatten:
        raise UserError(
            f"{name} keeps its patches in a grid, for images of any size; use a plain ViT"
        )
    if not is_swin and not isinstance(encoder.blocks, nn.Sequential):
        raise UserError(f"{name}: its blocks take more than tokens, as positions; use a plain ViT")


def check_tokens(encoder: Any, name: str) -> None:
    """UserError unless `encoder` can be run on some of its patches."""
    check_plain(encoder, name)
    if hasattr(encoder, "layers"):
        raise UserError(f"{name}: Swin's windows need every patch; none can be left out, use a ViT")
    if not isinstance(getattr(encoder, "pos_embed", None), Tensor):
        raise UserError(f"{name} has no absolute positions; patches cannot be left out of it")
    if hasattr(encoder, "dist_token"):
        raise UserError(f"{name} has a token of distillation; patches cannot be left out of it")


def embed(encoder: Any, patches: Tensor) -> Tensor:
    """The encoder's patch embedding of some patches, [b, k, d]: its convolution as a product."""
    stem = encoder.patch_embed
    tokens: Tensor = stem.norm(F.linear(patches, stem.proj.weight.flatten(1), stem.proj.bias))
    return tokens


def encode(encoder: Any, tokens: Tensor, index: Tensor, bf16_residual: bool = False) -> Tensor:
    """What the encoder makes of `tokens` [b, k, d] at patches `index` [b, k], [b, prefix + k, d].

    As timm's forward_features with the other patches left out; `bf16_residual` as SimMIM's.
    """
    prefix = [t for t in (encoder.cls_token, getattr(encoder, "reg_token", None)) if t is not None]
    count = sum(t.shape[1] for t in prefix)
    # Some models have no position for class and register tokens.
    ahead = 0 if encoder.no_embed_class else count
    positions = encoder.pos_embed
    tokens = tokens + take(positions[:, ahead:].expand(len(tokens), -1, -1), index)
    if prefix:
        first = torch.cat(prefix, dim=1)
        first = first + positions[:, :ahead] if ahead else first
        tokens = torch.cat([first.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
    tokens = encoder.norm_pre(encoder.pos_drop(tokens))
    out: Tensor = encoder.norm(
        through_blocks(encoder, as_autocast(tokens) if bf16_residual else tokens)
    )
    return out


def through_blocks(encoder: Any, tokens: Tensor) -> Tensor:
    """`tokens` after the blocks of a ViT. What they compute is kept for the backward pass, or
    computed again there, as set_grad_checkpointing says. (Swin's layers see to it themselves.)
    """
    again = torch.is_grad_enabled() and getattr(encoder, "grad_checkpointing", False)
    out: Tensor = checkpoint_seq(encoder.blocks, tokens) if again else encoder.blocks(tokens)
    return out


def as_autocast(tokens: Tensor) -> Tensor:
    """`tokens` in the type that autocast computes products in; as they are where it is off."""
    device = tokens.device.type
    return (
        tokens.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else tokens
    )
