"""A map as a detector: the attention of a frozen timm encoder, which AttG-MAE weighs by as
exp(M / T). kamim shards build SOURCE OUT --detector examples.attention:attention, in the folder
that holds examples/; the encoder's weights are fetched on first use.
"""

from functools import lru_cache

import cv2
import numpy as np

MODEL, SIDE = "vit_small_patch16_224.dino", 224


@lru_cache(maxsize=1)
def encoder(pretrained: bool):
    """The model, and the list that the last block's queries, keys and values are put into."""
    import timm  # when it is needed: the parent of a build does not need it
    import torch

    torch.set_num_threads(1)  # processes are the parallelism
    torch.manual_seed(0)
    model = timm.create_model(MODEL, pretrained=pretrained).eval().requires_grad_(False)
    seen = []
    model.blocks[-1].attn.qkv.register_forward_hook(lambda _, args, out: seen.append(out))
    return model, seen


def attention(rgb: np.ndarray, pretrained: bool = True) -> np.ndarray:
    """What the class token attends to, mean of the heads over its greatest, float32 [14, 14]."""
    import torch

    model, seen = encoder(pretrained)
    square = cv2.resize(rgb, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    pixels = (square / 255.0 - model.default_cfg["mean"]) / model.default_cfg["std"]
    model(torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
    heads = model.blocks[-1].attn.num_heads
    query, key, _ = seen.pop()[0].unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    scores = (query[:, :1] @ key.transpose(1, 2))[:, 0] / query.shape[-1] ** 0.5
    found = scores.softmax(1).mean(0)[1:]
    return (found / found.max()).view(14, 14).numpy()
