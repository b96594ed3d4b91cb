"""The learning rate as a pure function of the optimizer step; nothing to save or to restore.

Cosine over all epochs with a linear warm-up inside it, as published (KAMIM utils/config.py), but
advanced per optimizer step: the published code advances per micro-batch, which is a bug.
"""

import math

Rates = tuple[int, int, float, float, float]  # steps, warm-up, peak, floor, start


def learning_rate(
    step: int, steps: int, warmup: int, peak: float, floor: float, start: float
) -> float:
    """The rate at `step` of `steps`: linear from `start` to `peak`, then cosine to `floor`."""
    if step < warmup:
        return start + (peak - start) * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2
