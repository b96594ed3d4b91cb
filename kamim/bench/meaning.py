"""What the measured rates mean for ImageNet-1K: computed, and said to be.

Images per second that each backbone asks for, what 16 cores deliver, and hours.
"""

from typing import Any

import torch

from kamim.bench.gpu_page import IMAGENET, RECIPES
from train.models import SimMIM, model_flops
from train.recipes import find_recipe

EPOCHS, CORES = 100, 16
# What one process of our loader gave of JPEG frames on 16 cores, by docs/results/bench/gpu.jsonl: a
# test holds it to that. Cores are multiplied up to it and no further.
ONE_PROCESS = 20_313
PEAK, SHARE = 989e12, 0.15  # bf16 FLOP/s of one H200 or H100, and the share assumed of Swin
WAYS = {
    "published": "online, published: fast",
    "optimised": "online, optimised: fast",
    "WebDataset": "offline, WebDataset: fast",
}


def rows_of(
    found: dict[str, float], cores: int, measured: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """A row per backbone. `found`: images per second of each loader on `cores` cores; `measured`:
    images per second of a GPU's synthetic steps by recipe, in place of the assumed ones. Online
    loaders are processes, and are multiplied by cores; ours is one process, which has a ceiling.
    """
    ways = {way: found[name] * CORES / cores for way, name in WAYS.items() if name in found}
    if "WebDataset" in ways:
        ways["WebDataset"] = min(ways["WebDataset"], ONE_PROCESS)
    rows = []
    for name in RECIPES:
        recipe = find_recipe(name)
        with torch.device("meta"):  # its shapes are enough
            flops = model_flops(SimMIM(recipe.model, recipe.size), recipe.size)
        wanted = (measured or {}).get(name)
        gpu = wanted or SHARE * PEAK / flops
        rows.append(
            {
                "bench": "meaning",
                "recipe": name,
                "gflops_an_image": round(flops / 1e9, 2),
                "gpu_images_per_s": round(gpu),
                "gpu_is": "measured" if wanted else f"computed at {SHARE:.0%} of an H200's peak",
                "delivered_by_16_cores": {way: round(rate) for way, rate in ways.items()},
                "hours_100_epochs": {
                    way: round(hours(min(gpu, rate)), 1) for way, rate in ways.items()
                },
                "hours_if_never_waiting": round(hours(gpu), 1),
            }
        )
    return rows


def hours(images_per_s: float) -> float:
    """Hours of EPOCHS epochs of ImageNet-1K."""
    return IMAGENET * EPOCHS / images_per_s / 3600
