"""Records of one set or of several, for training: batches, a loader, a Dataset."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards.crops import Ints
from shards.errors import UserError
from shards.order import Plan, pair
from shards.progress import counted
from shards.spec import AREA

if TYPE_CHECKING:
    from shards.dataset import ShardSet
    from shards.ffcv_loader import FfcvLoader
    from shards.loader import Loader
    from shards.record import Record
    from shards.torchdata import RecordDataset
    from shards.weighting import Crops

Decode = Literal["cpu", "gpu"]


class Records:
    """Records 0 to len - 1: of a ShardSet, or of the sets of ShardSets one after the other."""

    @property
    @abstractmethod
    def sets(self) -> "list[ShardSet]":
        """The sets."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, number: int) -> "Record": ...

    @abstractmethod
    def plan(
        self,
        batch: int,
        seed: int = 0,
        *,
        window: int = 0,
        subset: Ints | None = None,
        **crops: Any,
    ) -> Plan:
        """The order of training."""

    @abstractmethod
    def rows(self, samples: Ints) -> NDArray[np.void]:
        """Rows of the index of `samples`."""

    @abstractmethod
    def locate(self, number: int) -> tuple[Path, NDArray[np.void]]:
        """The shard's path and the index row of record `number`."""

    @abstractmethod
    def find_maps(self, names: Sequence[str], bank: bool = False) -> list[int]:
        """Rows of the detectors `names` among the maps of the (first) set."""

    @property
    def set_ends(self) -> Ints:
        """Where each set ends."""
        return np.cumsum([len(each) for each in self.sets], dtype=np.int64)

    def batches(
        self,
        size: int = 192,
        batch: int = 256,
        *,
        epochs: float = 1,
        seed: int = 0,
        weights: str | None = None,
        temperature: float = 0.25,
        w_ps: int = 8,
        normalise: Literal["min", "mean", "batch"] = "min",
        bank: bool = False,
        correct: bool = True,
        area: tuple[float, float] = AREA,
        flips: tuple[float, float] = (0.5, 0.5),
        device: str = "auto",
        decode: Decode = "cpu",
        workers: int = 0,
        first: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> Iterator["Crops"]:
        """Random crops with their loss weights, on `device`, for the steps from `first` on.

        Each is a Crops: images float32 [b, 3, size, size], 0 to 1; weights float32 [b, c, c] with
        c = size / w_ps, or None. size: side of a crop, px. batch: images per step, of all processes
        together. epochs: 1 or more, or a part of one. weights: the name of a detector of the set,
        or None. temperature, w_ps, normalise, correct: as in WeightedCrops. area: least and most
        share of the source in a crop. flips: chances of a horizontal and a vertical flip. bank:
        show the stored crops with their exact densities. device: auto, cpu, cuda or cuda:N. rank,
        ranks: a process gets its part of each batch. decode, workers: as in `loader`. Order, crops
        and weights depend only on seed, epoch and sample. Raises UserError, with the first batch,
        if the set or the arguments do not fit.
        """
        from shards.device import find_device, to_device
        from shards.weighting import WeightedCrops

        horizontal, vertical = pair("flips", flips)
        plan = self.plan(batch, seed, area=area, horizontal=horizontal, vertical=vertical)
        last = steps_of_epoch(plan, epochs)
        where = find_device(device)
        how: dict[str, Any] = {"temperature": temperature, "normalise": normalise}
        how["correct"] = correct
        crops = WeightedCrops(self, weights, size=size, w_ps=w_ps, bank=bank, **how).to(where)
        loader = self.loader(
            plan,
            first,
            last,
            maps=[weights] if weights else [],
            bank=bank,
            workers=workers,
            rank=rank,
            ranks=ranks,
            device=str(where),
            decode=decode,
        )
        for _, tensors in to_device(loader, where):
            yield crops(tensors)

    def loader(
        self,
        plan: Plan,
        first: int = 0,
        last: int | None = None,
        *,
        maps: Sequence[str] = (),
        bank: bool = False,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 0,
        prefetch: int = 3,
        skip: bool = False,
        device: str = "cpu",
        decode: Decode = "cpu",
        processes: bool = False,
    ) -> "Loader | FfcvLoader":
        """The batches of steps `first` to `last` - 1 (all of one epoch by default) of `plan`.

        Each Batch holds uint8 frames and densities, boxes and flips; its arrays are used again for
        later batches. maps: detectors whose densities are loaded; with `bank` those of the stored
        crops. workers: decoding threads; 0: one per core. skip: replace a damaged record by the
        next sound one. device: `cuda` pins the buffers. decode: `gpu` leaves JPEG frames
        undecoded; `to_device` decodes them by torchvision. processes: workers are processes, which
        need less of this one's interpreter lock.
        """
        self._check_frames()
        if prefetch < 1:
            raise UserError(f"prefetch {prefetch} is out of range; give 1 or more")
        last = steps_of_epoch(plan) if last is None else last
        asked: dict[str, Any] = {"maps": maps, "bank": bank, "rank": rank, "ranks": ranks}
        asked |= {"workers": workers, "prefetch": prefetch}
        if decode == "gpu":
            from shards.decoding import check_decoding
            from shards.device import find_device

            check_decoding(self, find_device(device), skip)
        if not plan.in_order and [each.manifest.container for each in self.sets] == ["ffcv"]:
            from shards.ffcv_loader import FfcvLoader

            if skip:
                raise UserError("FFCV decodes damaged frames without an error: skipping needs tars")
            return FfcvLoader(self.sets[0], plan, first, last, **asked)
        from shards.loader import Loader

        allocate, shared = None, None
        if processes and decode == "cpu":  # what only reads needs none
            from shards.processes import Shared

            shared = Shared()
        if device.startswith("cuda"):
            from shards.device import pin, pinned

            allocate = pinned
            if shared:
                shared.pin = pin
        asked |= {"shared": shared, "allocate": allocate}
        return Loader(self, plan, first, last, skip=skip, coded=decode == "gpu", **asked)

    def dataset(
        self, plan: Plan, *, maps: Sequence[str] = (), bank: bool = False
    ) -> "RecordDataset":
        """A map-style torch Dataset of the frames, densities, boxes and flips.

        The key of an item is (epoch, sample), as PlanSampler gives it, or a sample of epoch 0. It
        is for torch's DataLoader; `loader` is several times as fast.
        """
        from shards.torchdata import RecordDataset

        self._check_frames()
        return RecordDataset(self, plan, maps, bank)

    def _check_frames(self) -> None:
        """UserError if a set has none."""
        for each in self.sets:
            if each.manifest.container == "maps":
                raise UserError(
                    f"{each.folder} holds densities without frames: load images as you do, and "
                    "read each one's by `density`; shards with frames come from kamim shards build"
                )


def steps_of_epoch(plan: Plan, epochs: float = 1) -> int:
    """Whole steps in `epochs`; UserError if there are none, which a loop would not notice."""
    steps = plan.steps(epochs)
    if steps < 1:
        make = f"{counted(epochs, 'epoch')} of {plan.total} records make no batch of {plan.batch}"
        raise UserError(f"{make}; give more epochs or a smaller batch")
    return steps
