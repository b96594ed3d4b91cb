"""Hugging Face's ViT tensors by timm's names and back.

In: a state dict with the layout of ViTForMaskedImageModeling or ViTModel (transformers
models/vit/modeling_vit.py), as KAMIM's authors published theirs. Out: one for a timm ViT, or back.
"""

import re
from typing import Any

import torch
from torch import Tensor

EPS = 1e-12  # of its LayerNorms; timm's is 1e-6
HEAD = 64  # channels of an attention head in every published ViT
# (theirs, ours), for a block; query, key and value are one tensor in timm.
BLOCK = {
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
WHOLE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
POSITIONS = "embeddings.position_embeddings"


def is_huggingface(tensors: dict[str, Any]) -> bool:
    """Whether these are tensors of a Hugging Face ViT."""
    return any(name.removeprefix("vit.") == POSITIONS for name in tensors)


def options_of(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], int, float]:
    """(options for timm's ViT, image side in px, eps of its norms), read off the shapes."""
    plain = _plain(tensors)
    embed, _, patch, _ = plain["embeddings.patch_embeddings.projection.weight"].shape
    depth = 1 + max(int(n.split(".")[2]) for n in plain if n.startswith("encoder.layer."))
    hidden = plain["encoder.layer.0.intermediate.dense.weight"].shape[0]
    side = round((plain[POSITIONS].shape[1] - 1) ** 0.5)
    options = {
        "embed_dim": embed,
        "depth": depth,
        "num_heads": embed // HEAD,
        "patch_size": patch,
        "mlp_ratio": hidden / embed,
    }
    return options, side * patch, EPS


def to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors by timm's names; mask token, decoder and pooler are left out."""
    plain = _plain(tensors)
    found = {ours: plain[theirs] for theirs, ours in WHOLE.items()}
    depth = options_of(tensors)[0]["depth"]
    for number in range(depth):
        theirs, ours = f"encoder.layer.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = [plain[f"{theirs}.attention.attention.{part}.{kind}"]
                     for part in ("query", "key", "value")]  # fmt: skip
            found[f"{ours}.attn.qkv.{kind}"] = torch.cat(parts)
            for name, other in BLOCK.items():
                found[f"{ours}.{other}.{kind}"] = plain[f"{theirs}.{name}.{kind}"]
    return found


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm ViT's tensors by Hugging Face's names, as ViTModel inside `vit.`.

    Its configuration must say layer_norm_eps 1e-6, which timm's encoders are trained with.
    """
    found = {f"vit.{theirs}": tensors[ours] for theirs, ours in WHOLE.items()}
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    for number in sorted(numbers):
        theirs, ours = f"vit.encoder.layer.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = tensors[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for part, tensor in zip(("query", "key", "value"), parts, strict=True):
                found[f"{theirs}.attention.attention.{part}.{kind}"] = tensor.contiguous()
            for name, other in BLOCK.items():
                found[f"{theirs}.{name}.{kind}"] = tensors[f"{ours}.{other}.{kind}"]
    return found


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
