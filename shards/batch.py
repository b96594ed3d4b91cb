"""What both loaders give, and how they ask for it: a part of a plan in, a Batch to fill out.

In: a set, a plan, names of detectors. Out: Batch, with boxes, flips and labels in place.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.dataset import ShardSet
from shards.order import InOrder, Plan


class Batch(NamedTuple):
    """One process's part of a step, or of a micro-step, in arrays that the loader reuses.

    step; frames uint8 [b, F, F, 3] RGB; maps uint8 [b, D, G, G / 2], packed, of the chosen
    detectors; labels, samples, epochs int64 [b]; boxes float32 [b, 4] (top, left, height, width in
    the unit square); flips bool [b, 2] (horizontal, vertical). From the bank instead: boxes and
    flips are those stored, counts uint8 [b, D, c, c] are the crops' as flipped, and there are no
    maps (D is 0).
    """

    step: int
    frames: NDArray[np.uint8]
    maps: NDArray[np.uint8]
    labels: NDArray[np.int64]
    samples: NDArray[np.int64]
    epochs: NDArray[np.int64]
    boxes: NDArray[np.float32]
    flips: NDArray[np.bool_]
    counts: NDArray[np.uint8]


def planned(
    records: ShardSet,
    plan: Plan | InOrder,
    part: tuple[int, Any, Any],
    arrays: tuple[Any, Any, Any],
) -> tuple[Batch, NDArray[np.void]]:
    """The batch of `part` (step, epochs, samples) around its (frames, maps, counts), with the
    plan's boxes, and its rows of the index.
    """
    (step, epochs, samples), (frames, maps, counts) = part, arrays
    rows = records.index[samples]
    size = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    boxes, flips = plan.boxes(epochs, samples, *size)
    labels = rows["label"].astype(np.int64)
    return Batch(step, frames, maps, labels, samples, epochs, boxes, flips, counts), rows


def wanted_rows(
    records: ShardSet, plan: Plan | InOrder, detectors: list[str] | None, bank: bool = False
) -> list[int]:
    """Which of the set's maps `detectors` are (None: all). ValueError if one is not there."""
    if plan.count != len(records):
        raise ValueError(f"the plan is for {plan.count} samples, the set has {len(records)}")
    if bank and not records.manifest.settings.bank:
        raise ValueError(
            f"{records.folder} has no bank; add one by `kamim shards build SOURCE NEW --bank 4 "
            f"--reuse {records.folder}`"
        )
    known = records.manifest.detectors
    for name in detectors or []:
        if name not in known:
            raise ValueError(
                f"{records.folder} has no maps of {name!r}, only of {', '.join(known)}; "
                f"build it with --detector {name}"
            )
    return list(range(len(known))) if detectors is None else [known.index(d) for d in detectors]
