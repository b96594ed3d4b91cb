"""What an experiment trains and is measured on, in one small file each, and on a device.

`pack` writes photos.npz from a finished set of shards, and cifar.npz from CIFAR-10's tars.
"""

from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import shards
from preprocess import detector_settings, open_source
from shards.crops import visible_cells
from shards.errors import UserError

HELD = 8  # every eighth photo is kept out of pretraining


class Photos(NamedTuple):
    """Photos on a device: frames uint8 [n, F, F, 3]; maps float32 [n, G, G], 0 to 1, by detector;
    edges: what a detector finds of its marks by distance from the edge of a crop, float32 [cells].
    heights, widths: of the sources, int64 [n], on the CPU.
    """

    frames: Tensor
    maps: dict[str, Tensor]
    edges: dict[str, Tensor]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]

    def split(self) -> tuple["Photos", "Photos"]:
        """(those to train on, those kept out)."""
        held = np.arange(len(self.frames)) % HELD == HELD - 1
        return self._only(~held), self._only(held)

    def _only(self, chosen: NDArray[np.bool_]) -> "Photos":
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(self.frames.device)
        maps = {name: each[rows] for name, each in self.maps.items()}
        sizes = self.heights[chosen], self.widths[chosen]
        return Photos(self.frames[rows], maps, self.edges, *sizes)


class Labelled(NamedTuple):
    """Images uint8 [n, 32, 32, 3] and labels int64 [n], on a device."""

    images: Tensor
    labels: Tensor


def pack(photos: Path, cifar: Path, out: Path, train: int, test: int) -> list[Path]:
    """Write photos.npz and cifar.npz into `out`: the first `train` and `test` images of a class."""
    out.mkdir(parents=True, exist_ok=True)
    records = shards.open(photos)
    every = [records[number] for number in range(len(records))]
    files = {
        "frames": joined([np.frombuffer(each.frame, np.uint8) for each in every]),
        "maps": np.stack([np.stack([*each.maps.values()]) for each in every]),
        "detectors": np.array(records.manifest.detectors),
        "sizes": np.array([(each.height, each.width) for each in every]),
        "sources": np.array([each.source for each in every]),
    }
    np.savez_compressed(out / "photos.npz", **flat(files))
    files = {}
    for split, count in (("train", train), ("test", test)):
        images, labels = first_of_each(cifar / f"{split}.tar", count)
        files |= {split: joined(images), f"{split}_labels": np.array(labels, np.uint8)}
    np.savez_compressed(out / "cifar.npz", **flat(files))
    return [out / "photos.npz", out / "cifar.npz"]


def first_of_each(path: Path, count: int) -> tuple[list[NDArray[np.uint8]], list[int]]:
    """(JPEG files, labels) of the first `count` of each class folder in a tar, by name."""
    source = open_source(str(path))
    labels = range(len(source.classes))
    chosen = [[e for e in source.entries if e.label == label][:count] for label in labels]
    entries = list(chain.from_iterable(chosen))
    files = [np.frombuffer(source.read(entry), np.uint8) for entry in entries]
    return files, [entry.label for entry in entries]


def joined(files: list[NDArray[np.uint8]]) -> dict[str, NDArray[Any]]:
    """Files one after the other, with the places where each ends."""
    return {"bytes": np.concatenate(files), "ends": np.cumsum([len(each) for each in files])}


def flat(files: dict[str, Any]) -> dict[str, Any]:
    """Arrays by one name each."""
    plain: dict[str, Any] = {}
    for name, value in files.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        plain |= {f"{name}_{part}".rstrip("_"): array for part, array in parts}
    return plain


def decoded(data: Any, name: str) -> NDArray[np.uint8]:
    """The JPEG files `name` of an archive as RGB, uint8 [n, height, width, 3]."""
    whole, ends = data[f"{name}_bytes"], data[f"{name}_ends"]
    files = np.split(whole, ends[:-1])
    return np.stack([cv2.imdecode(each, cv2.IMREAD_COLOR)[..., ::-1] for each in files])


def load_photos(folder: Path, size: int, cells: int, device: torch.device) -> Photos:
    """All photos of `folder`, to be cropped at `size` px and weighed in cells x cells parts."""
    data = opened(folder / "photos.npz")
    maps = torch.from_numpy(data["maps"]).to(device).float() / 255
    named = {str(name): maps[:, row] for row, name in enumerate(data["detectors"])}
    edges = {}
    for name in named:
        # ORB's margin of 31 px would leave 34 of 96 px: it is read as on the whole photo.
        keeps = (
            np.ones(cells) if name == "orb" else visible_cells(detector_settings(name), size, cells)
        )
        edges[name] = torch.from_numpy(keeps).float().to(device)
    frames = torch.from_numpy(decoded(data, "frames")).to(device)
    heights, widths = data["sizes"].astype(np.int64).T
    return Photos(frames, named, edges, heights, widths)


def load_cifar(folder: Path, device: torch.device) -> tuple[Labelled, Labelled]:
    """(training, test) images of CIFAR-10."""
    data = opened(folder / "cifar.npz")
    sets = []
    for split in ("train", "test"):
        labels = torch.from_numpy(data[f"{split}_labels"].astype(np.int64)).to(device)
        sets.append(Labelled(torch.from_numpy(decoded(data, split)).to(device), labels))
    return sets[0], sets[1]


def opened(path: Path) -> Any:
    """The arrays in `path`. UserError, with the command that makes it, if there is none."""
    if not path.is_file():
        raise UserError(f"there is no {path}; make it with `python -m kamim.experiment pack`")
    return np.load(path, allow_pickle=False)


def few(images: Labelled, count: int) -> Labelled:
    """`count` images, spread over all; 0: all."""
    step = max(1, len(images.labels) // count) if count else 1
    return Labelled(images.images[::step], images.labels[::step])
