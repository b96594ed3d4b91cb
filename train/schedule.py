"""Learning rate and temperature as pure functions of the optimizer step; nothing to save.

The rate: cosine over all epochs with a linear warm-up inside it, as published (KAMIM
utils/config.py), but advanced per optimizer step: the published code advances per micro-batch,
which is a bug.
"""

import math

from train.recipes import Recipe

Rates = tuple[int, int, float, float, float]  # steps, warm-up, peak, floor, start


def learning_rate(
    step: int, steps: int, warmup: int, peak: float, floor: float, start: float
) -> float:
    """The rate at `step` of `steps`: linear from `start` to `peak`, then cosine to `floor`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


def temperature(step: int, steps: int, recipe: Recipe) -> float | None:
    """T at `step` of `steps`, from the recipe's at the first to its end at the last; None if T
    does not change.
    """
    first, last = recipe.temperature, recipe.temperature_end
    if first is None or last is None:
        return None
    done = min(1.0, step / max(1, steps - 1))
    if recipe.temperature_form == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return first + (last - first) * done
