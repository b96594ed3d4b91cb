"""What throwing saves: steps of MAE and SimMIM with and without it, in one run, interleaved.

In: model sizes. Out: a table and results/throw.jsonl: the time of a step with cells drawn by
attention and frequency and thrown over that of the published masks, what an attention pass costs,
and both over a run as AMT published its phases. Run by `make bench-throw`; needs no data.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from kamim.bench.provenance import append, spread
from preprocess import detector_settings
from shards import Settings
from shards.order import Plan
from shards.weighting import crop_frames
from train.attention import class_attention
from train.masking import Masking
from train.models import in_bf16, make_model, normalised
from train.recipes import Recipe, find_recipe
from train.setup import device_name, find_device, weighted_crops
from train.step import Step, compiled

SIZES = {"vit_tiny": 16, "vit_base": 8}  # batch of each on a CPU
CUDA_BATCH, CUDA_STEPS, REPEATS, WARM = 256, 20, 7, 2
FRAME, GRID = 256, 54
# (title, recipe with throwing, recipe without), of a backbone at 224 px.
PAIRS = (("MAE", "mae_famt", "mae"), ("SimMIM", "simmim_famt", "simmim"))
PHASES = {"MAE": (400, 40, 40), "SimMIM": (200, 40, 40)}  # AMT's epochs: run, random, refresh


@dataclass(frozen=True)
class Facts:
    """What Masking asks of a manifest."""

    settings: Any
    detectors: list[str]
    count: int


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


def step_of(recipe: Recipe, tensors: dict[str, Any], device: torch.device) -> tuple[
        Callable[[], None], Callable[[], None]]:  # fmt: skip
    """(a training step, an attention pass) of `recipe` on a batch, as training does them."""
    recipe = replace(recipe, batch=len(tensors["frames"]), random_epochs=0)
    torch.manual_seed(0)
    model = make_model(recipe).to(device)
    settings = Settings(
        detectors=(detector_settings("frequency"),), shard_size=1000, crop=recipe.size
    )
    facts: Any = Facts(settings, ["frequency"], recipe.batch)
    masking = Masking(recipe, 0, facts, model.encoder, 1, device)
    crops = weighted_crops(recipe, facts, None).to(device)
    patches = masking.patches_a_side**2
    levels = torch.randint(256, (recipe.batch, patches), dtype=torch.uint8)
    masking.attention = levels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    cuda = device.type == "cuda"
    micro: Any = compiled(Step(model, crops)) if cuda else Step(model, crops)

    def train() -> None:
        loss, _ = micro(tensors, masking.hidden(masking.noise(1), 1, tensors))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
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
    work: dict[str, Callable[[], None]] = {}
    for title, throwing, plain in PAIRS:
        of_plain = find_recipe(f"{backbone}_224_{plain}")
        work[title], _ = step_of(of_plain, tensors, device)
        work[f"{title} throwing"], work[f"{title} look"] = step_of(
            find_recipe(f"{backbone}_224_{throwing}"), tensors, device
        )
    spent: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(WARM + repeats):
        for name, each in work.items():
            begin = time.perf_counter()
            for _ in range(steps):
                each()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= WARM:
                spent[name].append(time.perf_counter() - begin)
    row: dict[str, Any] = {"bench": "throw", "recipe": backbone, "batch": batch, "n": repeats,
                           "device": device_name(device) or device.type}  # fmt: skip
    for title, _, _ in PAIRS:
        whole = spent[title]
        steps_of = [a / b for a, b in zip(spent[f"{title} throwing"], whole, strict=True)]
        looks = [a / b for a, b in zip(spent[f"{title} look"], whole, strict=True)]
        epochs, random, refresh = PHASES[title]
        passes = len(range(random, epochs, refresh))
        runs = [(random + (epochs - random) * step + passes * look) / epochs
                for step, look in zip(steps_of, looks, strict=True)]  # fmt: skip
        row[title] = {"step": spread(steps_of), "look": spread(looks), "run": spread(runs)}
    return row


def costs(names: list[str], batch: int, repeats: int = REPEATS) -> dict[str, dict[str, float]]:
    """CPU milliseconds on one core that a step of each recipe takes, and a look at its attention.

    Medians of interleaved repeats; what other work a machine does changes them least of all times.
    """
    torch.set_num_threads(1)
    tensors = made_up(batch, torch.device("cpu"))
    work = {name: step_of(find_recipe(name), tensors, torch.device("cpu")) for name in names}
    spent = {(name, part): list[float]() for name in names for part in ("step", "look")}
    for _ in range(repeats):
        for (name, part), times in spent.items():
            train, look = work[name]
            begin = time.process_time()
            (train if part == "step" else look)()
            times.append(time.process_time() - begin)
    return {name: {f"{part}_ms": round(1000 * spread(spent[name, part], 6)["median"], 1)
                   for part in ("step", "look")} for name in names}  # fmt: skip


def main(backbones: list[str], repeats: int, save: bool) -> None:
    """Measure each backbone, print a table, and append the rows if asked to."""
    cuda = torch.cuda.is_available()
    rows = []
    for name in backbones:
        batch, steps = (CUDA_BATCH, CUDA_STEPS) if cuda else (SIZES.get(name, 8), 1)
        row = measure(name, batch, steps, repeats)
        rows.append(row)
        for title, _, _ in PAIRS:
            found = row[title]
            print(f"{name}, {title}, batch {batch} on {row['device']}: a step with throwing takes "
                  f"{found['step']['median']:.2f} ({found['step']['min']:.2f} to "
                  f"{found['step']['max']:.2f}) of one without, an attention pass "
                  f"{found['look']['median']:.2f} of an epoch, a run of {PHASES[title][0]} epochs "
                  f"{found['run']['median']:.2f}")  # fmt: skip
    if save:
        print(append("throw", rows), file=sys.stderr)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--quick"]
    quick = len(words) < len(sys.argv) - 1
    main(words or list(SIZES), 1 if quick else REPEATS, save=not quick)
