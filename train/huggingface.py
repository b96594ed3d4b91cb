"""Hugging Face's ViT tensors by timm's names and back.

Theirs have the layout of ViTForMaskedImageModeling or ViTModel (transformers
models/vit/modeling_vit.py), as KAMIM's authors published them.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from train.models import Colour

EPS = 1e-12  # of its LayerNorms; timm's is 1e-6
HEAD = 64  # channels of an attention head in every published ViT
QKV = ("query", "key", "value")  # one tensor in timm
# Theirs to ours, of a block.
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
OURS = re.compile(
    rf"blocks\.\d+\.({'|'.join(re.escape(name) for name in ('attn.qkv', *BLOCK.values()))})\."
)
POSITIONS = "embeddings.position_embeddings"


def is_huggingface(tensors: dict[str, Any]) -> bool:
    """Whether these are tensors of a Hugging Face ViT."""
    return any(str(name).removeprefix("vit.") == POSITIONS for name in tensors)


def options_of(
    tensors: dict[str, Tensor], config: dict[str, Any] | None = None
) -> tuple[dict[str, Any], int, float]:
    """(options for timm's ViT, image side in px, eps of its norms), read off the shapes.

    Heads and eps are in no shape: they are those of `config`, its config.json, or as published.
    """
    config = config or {}
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"its activation is {config['hidden_act']}, of which we know gelu alone")
    plain = _plain(tensors)
    embed, _, patch, _ = plain["embeddings.patch_embeddings.projection.weight"].shape
    depth = 1 + max(int(n.split(".")[2]) for n in plain if n.startswith("encoder.layer."))
    hidden = plain["encoder.layer.0.intermediate.dense.weight"].shape[0]
    side = round((plain[POSITIONS].shape[1] - 1) ** 0.5)
    options = {
        "embed_dim": embed,
        "depth": depth,
        "num_heads": int(config.get("num_attention_heads", embed // HEAD)),
        "patch_size": patch,
        "mlp_ratio": hidden / embed,
    }
    return options, side * patch, float(config.get("layer_norm_eps", EPS))


def config_of(model: Any) -> dict[str, Any]:
    """The config.json of a timm ViT: what makes ViTModel compute the same.

    Raises UserError if ViTModel has no place for some of the model's tensors.
    """
    block, tensors = model.blocks[0], model.state_dict()
    left = sorted(name for name in tensors if name not in WHOLE.values() and not OURS.match(name))
    if left or set(WHOLE.values()) - set(tensors):
        raise UserError(f"Hugging Face's ViT has no place for this model: {(left or ['?'])[0]}")
    if (
        not isinstance(block.mlp.act, nn.GELU)
        or block.attn.qkv.bias is None
        or model.pos_embed.shape[1] != model.patch_embed.num_patches + 1
    ):
        raise UserError(
            "Hugging Face's ViT is only for models with gelu, qkv_bias and a position of the class "
            "token; --to timm"
        )
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": model.norm.eps,
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": 3,
        "qkv_bias": True,
        "encoder_stride": model.patch_embed.patch_size[0],
    }


def preprocessor_of(size: int, mean: Colour, std: Colour) -> dict[str, Any]:
    """The preprocessor_config.json of a ViT for `size` px: what ViTImageProcessor is to do."""
    side = {"height": size, "width": size}
    return {
        "image_processor_type": "ViTImageProcessor",
        "size": side,
        "image_mean": mean,
        "image_std": std,
    }


def to_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors by timm's names; mask token, decoder and pooler are left out."""
    plain = _plain(tensors)
    found = {ours: plain[theirs] for theirs, ours in WHOLE.items()}
    depth = options_of(tensors)[0]["depth"]
    for number in range(depth):
        theirs, ours = f"encoder.layer.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = (plain[f"{theirs}.attention.attention.{part}.{kind}"] for part in QKV)
            found[f"{ours}.attn.qkv.{kind}"] = torch.cat(list(parts))
            for name, other in BLOCK.items():
                found[f"{ours}.{other}.{kind}"] = plain[f"{theirs}.{name}.{kind}"]
    return found


def from_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A timm ViT's tensors by Hugging Face's names, as ViTModel inside `vit.`; see config_of."""
    found = {f"vit.{theirs}": tensors[ours] for theirs, ours in WHOLE.items()}
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    for number in sorted(numbers):
        theirs, ours = f"vit.encoder.layer.{number}", f"blocks.{number}"
        for kind in ("weight", "bias"):
            parts = tensors[f"{ours}.attn.qkv.{kind}"].chunk(3)
            for part, tensor in zip(QKV, parts, strict=True):
                found[f"{theirs}.attention.attention.{part}.{kind}"] = tensor.contiguous()
            for name, other in BLOCK.items():
                found[f"{theirs}.{name}.{kind}"] = tensors[f"{ours}.{other}.{kind}"]
    return found


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}
