"""Datasets by name: in which layouts each is found, where it is looked for, how people get it.

In: a name, a place or none, and a split. Out: its Source, or one error that says where it looked.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from preprocess.entry import Source
from preprocess.layouts import cifar, imagenet, inaturalist, places365
from preprocess.layouts.finished import list_finished
from preprocess.layouts.folder import list_folder
from preprocess.layouts.parquet import list_parquet
from preprocess.layouts.webdataset import list_webdataset
from preprocess.places import join, kind_of
from preprocess.splits import SPLITS
from shards.remote import is_url

Lister = Callable[[str, str], Source | None]


class Dataset(NamedTuple):
    """How one dataset is read: its splits (the first is the default), the names that a split may
    have below its folder, what lists it there, and where people get it.
    """

    splits: tuple[str, ...]
    names: Callable[[str], tuple[str, ...]]
    lister: Lister
    origin: str


def _list_split(where: str, split: str) -> Source | None:
    """Class folders, or those of a sub-folder that is named as the split."""
    where = join(where, split)
    return list_folder(where) if kind_of(where) == "folder" else None


NAMED = {
    "imagenet": Dataset(
        ("train", "val"), imagenet.places_of, imagenet.list_imagenet,
        "image-net.org (on request, for research that is not commercial) or Kaggle's "
        "imagenet-object-localization-challenge",
    ),
    "cifar10": Dataset(
        ("train", "test"), cifar.places10, cifar.list_cifar10,
        "www.cs.toronto.edu/~kriz/cifar.html (no licence is given; cite the report there)",
    ),
    "cifar100": Dataset(
        ("train", "test"), cifar.places100, cifar.list_cifar100,
        "www.cs.toronto.edu/~kriz/cifar.html (no licence is given; cite the report there)",
    ),
    "inaturalist": Dataset(
        ("train", "val", "train_mini"), inaturalist.places_of, inaturalist.list_inaturalist,
        "github.com/visipedia/inat_comp (2021; for research that is not commercial, each photo "
        "under its own licence)",
    ),
    "places365": Dataset(
        ("train", "val", "train-challenge"), places365.places_of, places365.list_places365,
        "places2.csail.mit.edu (for research that is not commercial)",
    ),
}  # fmt: skip
# Layouts of anybody's images; these have no usual place.
PLACED: dict[str, Lister] = {
    "folder": _list_split,
    "webdataset": list_webdataset,
    "parquet": list_parquet,
    "shards": list_finished,
}


# Where people keep datasets; the folder that the variable KAMIM_DATA names comes before.
BASES = ("data", ".", "~/data", "~/datasets", "/data", "/datasets")


def usual_places(name: str) -> list[str]:
    """Folders that `name` is looked for in, in turn, when no place is given."""
    bases = [os.environ.get("KAMIM_DATA", ""), *map(os.path.expanduser, BASES)]
    return [place for base in filter(None, bases) for place in (os.path.join(base, name), base)]


def list_dataset(name: str, given: str, split: str) -> Source:
    """The `split` (its first, if empty) of the dataset `name` at the place `given`, or wherever it
    is found first. Raises ValueError, with all places that were looked at, if it is nowhere.
    """
    if name in PLACED:
        return _list_placed(name, given, split)
    dataset = NAMED[name]
    split = {"val": "test"}.get(split, split) if "test" in dataset.splits else split
    split = split or dataset.splits[0]
    if split not in dataset.splits:
        raise ValueError(f"{name} has no split {split}; it has {', '.join(dataset.splits)}")
    names = dataset.names(split)
    if given and not kind_of(given):
        raise ValueError(f"there is no {given} to read {name} from; name where it lies")
    bases = [given] if given else usual_places(name)
    for base in filter(kind_of, bases):
        for below in names:
            where = join(base, below)
            if kind_of(where):
                source = dataset.lister(where if is_url(where) else os.path.realpath(where), split)
                if source is not None:
                    return source
    looked = ", ".join(filter(None, names))
    raise ValueError(
        f"{name} (split {split}) was not found: looked for {looked} in {', '.join(bases)}; get it "
        f"from {dataset.origin}, then give its place as {name}:PATH (make: DATA=PATH)"
    )


def _list_placed(name: str, given: str, split: str) -> Source:
    if not given:
        raise ValueError(
            f"{name} is read from a place of yours; give {name}:PATH (make: DATA=PATH)"
        )
    if split and split not in SPLITS:
        raise ValueError(f"{name} has no split {split}; it may have {', '.join(SPLITS)}")
    source = PLACED[name](given, split) if kind_of(given) else None
    if source is None:
        raise ValueError(f"no {name} source at {given}; give the place of one")
    return source
