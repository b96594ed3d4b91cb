"""What attention does, block by block: distance, mutual information, and the frequencies it keeps.

Measures as in Park et al., What Do Self-Supervised Vision Transformers Learn?, arXiv 2305.00729.
"""

from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def is_readable(model: Any) -> bool:
    """Whether the attention of `model` can be read: all blocks are those of a plain ViT of timm."""
    stem, blocks = (getattr(model, name, None) for name in ("patch_embed", "blocks"))
    if not isinstance(stem, PatchEmbed) or not isinstance(blocks, nn.Sequential):
        return False
    kinds = {type(each.attn).__name__ if isinstance(each, Block) else "" for each in blocks}
    return kinds == {"Attention"}


def queries_and_keys(block: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of a timm ViT's `block` for what it gets, [b, heads, n, d / heads] each."""
    attn = block.attn
    parts = attn.qkv(block.norm1(inputs)).unflatten(2, (3, attn.num_heads, -1))
    query, key, _ = parts.permute(2, 0, 3, 1, 4)
    return attn.q_norm(query), attn.k_norm(key)


def attention_of(block: Any, inputs: Tensor, prefix: int) -> Tensor:
    """Attention among patch tokens in `block` of a timm ViT, float32 [b, heads, n, n], rows sum 1.

    `inputs` [b, prefix + n, d] is what the block gets; attention to prefix tokens is left out.
    """
    query, key = queries_and_keys(block, inputs)
    scores = (query @ key.transpose(-2, -1)) * block.attn.scale
    return scores[..., prefix:, prefix:].float().softmax(-1)


def pixel_distances(side: int, patch: int) -> Tensor:
    """Distances in px between the centres of side x side patches, [n, n]."""
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1)
    at = at.reshape(-1, 2).float() * patch
    return torch.cdist(at, at)


def mean_distance(attention: Tensor, distances: Tensor) -> float:
    """Mean distance in px that attention reaches, over images, heads and queries."""
    return float((attention * distances.to(attention.device)).sum(-1).mean())


def mutual_information(attention: Tensor) -> float:
    """Mutual information of query and key, over the root of their entropies, mean over heads.

    0: every query attends alike, whatever it is; 1: each attends to one key of its own.
    """
    n = attention.shape[-1]
    joint = attention / n
    keys = joint.sum(-2, keepdim=True)
    ratio = torch.log(joint.clamp_min(1e-30)) - torch.log((keys / n).clamp_min(1e-30))
    information = (joint * ratio).sum((-1, -2))
    entropy = -(keys * torch.log(keys.clamp_min(1e-30))).sum((-1, -2))
    whole = torch.sqrt(entropy.clamp_min(1e-12) * torch.log(torch.tensor(float(n))))
    return float((information / whole).mean())


def high_frequency(tokens: Tensor, side: int) -> float:
    """log amplitude of the highest frequency of token maps against the lowest, mean over channels.

    `tokens` [b, n, d]. Lower means smoother: shapes rather than texture.
    """
    maps = tokens.float().transpose(1, 2).unflatten(2, (side, side))
    amplitude = torch.fft.fft2(maps).abs().clamp_min(1e-9).log().mean((0, 1))
    return float(amplitude[side // 2, side // 2] - amplitude[0, 0])


def diagnose(model: Any, images: Tensor) -> list[dict[str, float]]:
    """A row per block of a timm ViT: distance, nmi, frequency, and uniform attention's distance."""
    patch, prefix = model.patch_embed.patch_size[0], model.num_prefix_tokens
    side = images.shape[-1] // patch
    distances = pixel_distances(side, patch)
    rows = []
    with torch.inference_mode():
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for number, block in enumerate(model.blocks, start=1):
            attention = attention_of(block, tokens, prefix)
            tokens = block(tokens)
            rows.append(
                {
                    "block": number,
                    "distance": round(mean_distance(attention, distances), 2),
                    "uniform": round(float(distances.mean()), 2),
                    "nmi": round(mutual_information(attention), 4),
                    "frequency": round(high_frequency(tokens[:, prefix:], side), 3),
                }
            )
    return rows
