"""For torch's DataLoader: a map-style dataset, and the batch sampler that follows a plan."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from shards.crops import unit_boxes
from shards.loader import check_plan, check_steps
from shards.order import Plan
from shards.record import decode_frame
from shards.records import Records, steps_of_epoch


class RecordDataset(Dataset[dict[str, Any]]):
    """Frames, densities, boxes and flips of a set or several, as `ShardSet.dataset` says.

    An item is a mapping as WeightedCrops takes it, without the first dimension: frames uint8
    [F, F, 3], maps or counts by detector, boxes float32 [4], flips bool [2], labels, samples,
    epochs. DataLoader's own collation makes the batch.
    """

    def __init__(
        self, records: Records, plan: Plan, maps: Sequence[str] = (), bank: bool = False
    ) -> None:
        check_plan(records, plan)
        self.records, self.plan, self.bank = records, plan, bank
        records.find_maps(maps, bank)
        self.names = list(maps)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int | tuple[int, int]) -> dict[str, Any]:
        epoch, sample = place if isinstance(place, tuple) else (0, place)
        record = self.records[sample]
        epochs, samples = np.array([epoch]), np.array([sample])
        size = np.array([record.height]), np.array([record.width])
        maps, counts = {}, {}
        if self.bank and record.bank:
            slot = int(self.plan.slots(epochs, samples, len(record.bank.boxes))[0])
            boxes = unit_boxes(record.bank.boxes[[slot]], *size)
            flips = record.bank.flips[[slot]]
            counts = {name: record.bank.counts[name][slot] for name in self.names}
        else:
            boxes, flips = self.plan.boxes(epochs, samples, *size)
            maps = {name: record.maps[name] for name in self.names}
        return {
            "frames": torch.from_numpy(np.array(decode_frame(record.frame))),
            "maps": {name: torch.from_numpy(np.array(a)) for name, a in maps.items()},
            "counts": {name: torch.from_numpy(np.array(a)) for name, a in counts.items()},
            "boxes": torch.from_numpy(boxes[0]),
            "flips": torch.from_numpy(flips[0]),
            "labels": record.label,
            "samples": sample,
            "epochs": epoch,
        }


class PlanSampler(Sampler[list[tuple[int, int]]]):
    """The batches of steps `first` to `last` - 1 of a plan, for DataLoader's `batch_sampler`.

    Each is a list of (epoch, sample). last: by default the end of the first epoch. rank, ranks: a
    process gets its part of each batch.
    """

    def __init__(
        self, plan: Plan, first: int = 0, last: int | None = None, rank: int = 0, ranks: int = 1
    ) -> None:
        self.plan, self.place = plan, (rank, ranks)
        self.first, self.last = first, steps_of_epoch(plan) if last is None else last
        check_steps(first, self.last)

    def __len__(self) -> int:
        return (self.last - self.first) * self.plan.micro_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for _, epochs, samples in self.plan.parts(self.first, self.last, *self.place):
            yield list(zip(epochs.tolist(), samples.tolist(), strict=True))
