"""What throwing saves: steps of MAE and SimMIM with and without it, in turn; `make bench-throw`.

The time of a step with cells drawn by attention and frequency and thrown over that of the published
masks, what an attention pass costs, and both over a run as AMT published its phases. No data.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from kamim.bench.measuring import in_turn
from kamim.bench.provenance import append, check_checkout, spread
from preprocess import detector_settings
from shards import Plan, Settings, crop_frames
from train.attention import class_attention
from train.masking import Masking
from train.models import in_bf16, make_model, normalised
from train.recipes import Recipe, find_recipe
from train.setup import clipped, device_name, find_device, weighted_crops
from train.step import Step, compiled

SIZES = {"vit_tiny": 16, "vit_base": 8}  # batch of each on a CPU
CUDA_BATCH, CUDA_STEPS, REPEATS, WARM = 256, 20, 7, 2
FRAME, GRID = 256, 54
# (title, recipe with throwing, recipe without), of a backbone at 224 px.
PAIRS = (("MAE", "mae_famt", "mae"), ("SimMIM", "simmim_famt", "simmim"))
PHASES = {"MAE": (400, 41, 40), "SimMIM": (200, 41, 40)}  # AMT's epochs: run, random, refresh


@dataclass(frozen=True)
class Facts:
    """What crops and masking ask of a set."""

    settings: Settings
    count: int

    @property
    def sets(self) -> list[Any]:
        return [self]

    @property
    def manifest(self) -> Any:
        return self

    @property
    def set_ends(self) -> Any:
        return np.array([self.count])

    def __len__(self) -> int:
        return self.count

    def find_maps(self, names: Sequence[str], bank: bool = False) -> list[int]:
        known = [detector.name for detector in self.settings.detectors]
        return [known.index(name) for name in names]


def made_up(batch: int, device: torch.device) -> dict[str, Any]:
    """A batch as a loader gives it, of noise: a step's time does not depend on what it shows."""
    noise = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (batch, FRAME, FRAME, 3), generator=noise, dtype=torch.uint8)
    levels = torch.randint(256, (batch, GRID, GRID), generator=noise, dtype=torch.uint8)
    plan = Plan(batch, batch)
    epochs, samples = plan.samples(0)
    boxes, flips = plan.boxes(epochs, samples, *[samples * 0 + 400] * 2)
    numbers = torch.from_numpy(samples).to(device)
    return {
        "frames": frames.to(device),
        "maps": {"frequency": levels.to(device)},
        "counts": {},
        "boxes": torch.from_numpy(boxes).to(device),
        "flips": torch.from_numpy(flips).to(device),
        "labels": numbers,
        "samples": numbers,
        "epochs": numbers * 0,
    }


Work = Callable[[], None]


def step_of(recipe: Recipe, tensors: dict[str, Any], device: torch.device) -> tuple[Work, Work]:
    """(a training step, an attention pass) of `recipe` on a batch, as training does them."""
    recipe = replace(recipe, batch=len(tensors["frames"]), random_epochs=0)
    torch.manual_seed(0)
    model = make_model(recipe).to(device)
    settings = Settings(
        detectors=(detector_settings("frequency"),), shard_size=1000, crop=recipe.size
    )
    facts: Any = Facts(settings, recipe.batch)
    masking = Masking(recipe, 0, facts, model.encoder, 1, device)
    crops = weighted_crops(recipe, facts, None).to(device)
    patches = masking.patches_a_side**2
    levels = torch.randint(256, (recipe.batch, patches), dtype=torch.uint8)
    masking.attention = levels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    cuda = device.type == "cuda"
    micro: Any = compiled(Step(model, crops)) if cuda else Step(model, crops)

    def train() -> None:
        loss, _ = micro(tensors, masking.cells(masking.noise(1), 1, tensors))
        loss.backward()
        clipped(model, recipe)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def look() -> None:
        whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device).expand(recipe.batch, 4)
        straight = torch.zeros_like(tensors["flips"])
        with torch.no_grad(), in_bf16(device):
            images = crop_frames(tensors["frames"], whole, straight, recipe.size)
            class_attention(model.encoder, normalised(images)).cpu()

    return train, look


def measure(backbone: str, batch: int, steps: int, repeats: int) -> dict[str, Any]:
    """One row: medians and extremes of ratios within a repeat, and shares of a published run."""
    device = find_device("auto")
    tensors = made_up(batch, device)
    works: dict[str, Work] = {}
    for title, throwing, plain in PAIRS:
        of_plain = find_recipe(f"{backbone}_224_{plain}")
        works[title], _ = step_of(of_plain, tensors, device)
        works[f"{title} throwing"], works[f"{title} look"] = step_of(
            find_recipe(f"{backbone}_224_{throwing}"), tensors, device
        )

    def seconds(work: Work) -> float:
        begin = time.perf_counter()
        for _ in range(steps):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    spent = in_turn({name: partial(seconds, work) for name, work in works.items()}, repeats, WARM)
    facts = {"recipe": backbone, "batch": batch, "device": device_name(device) or device.type}
    row: dict[str, Any] = {"bench": "throw", "n": repeats, **facts}
    for title, _, _ in PAIRS:
        steps_of, looks = (
            [a / b for a, b in zip(spent[f"{title} {part}"], spent[title], strict=True)]
            for part in ("throwing", "look")
        )
        epochs, random, refresh = PHASES[title]
        passes = len(range(random, epochs, refresh))
        runs = [
            (random + (epochs - random) * step + passes * look) / epochs
            for step, look in zip(steps_of, looks, strict=True)
        ]
        row[title] = {"step": spread(steps_of), "look": spread(looks), "run": spread(runs)}
    return row


def costs(names: list[str], batch: int, repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """CPU milliseconds on one core that a step of each recipe takes, and a look at its attention.

    Medians of repeats in turn; what other work a machine does changes them least of all times.
    """
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    tensors = made_up(batch, cpu)

    def seconds(work: Work) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    works: dict[str, Callable[[], float]] = {}
    for name in names:
        step, look = step_of(find_recipe(name), tensors, cpu)
        works |= {f"{name} step": partial(seconds, step), f"{name} look": partial(seconds, look)}
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for key, each in in_turn(works, repeats).items():
        name, _, part = key.partition(" ")
        found[name][f"{part}_ms"] = round(1000 * spread(each, 6)["median"], 1)
    return found


def main(backbones: list[str], repeats: int, save: bool) -> None:
    """Measure each backbone, print a table, and append the rows if asked to."""
    if save:
        check_checkout()
    cuda = torch.cuda.is_available()
    rows = []
    for name in backbones:
        batch, steps = (CUDA_BATCH, CUDA_STEPS) if cuda else (SIZES.get(name, 8), 1)
        rows.append(measure(name, batch, steps, repeats))
        for title, _, _ in PAIRS:
            step, look, run = (rows[-1][title][part] for part in ("step", "look", "run"))
            print(
                f"{name}, {title}, batch {batch} on {rows[-1]['device']}: a step with throwing "
                f"takes {step['median']:.2f} ({step['min']:.2f} to {step['max']:.2f}) of one "
                f"without, an attention pass {look['median']:.2f} of an epoch, a run of "
                f"{PHASES[title][0]} epochs {run['median']:.2f}"
            )
    if save:
        print(append("throw", rows), file=sys.stderr)


if __name__ == "__main__":
    names = [word for word in sys.argv[1:] if word != "--quick"]
    quick = "--quick" in sys.argv[1:]
    main(names or list(SIZES), 1 if quick else REPEATS, save=not quick)
