"""Datasets by name: in which layouts each is found, where it is looked for, how people get it.

In: a name, a place or none, and a split. Out: its Source, or one error that says where it looked.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

from preprocess.entry import Source
from preprocess.files import join, kind_of
from preprocess.layouts import cifar, imagenet, inaturalist, places365
from preprocess.layouts.finished import list_finished
from preprocess.layouts.folder import list_folder
from preprocess.layouts.parquet import list_parquet
from preprocess.layouts.tar import list_tar
from preprocess.layouts.webdataset import list_webdataset
from preprocess.listing import names_in
from preprocess.splits import SPLITS
from shards.errors import UserError
from shards.remote.storage import is_url

Lister = Callable[[str, str], Source | None]
FAR = 0.02  # share of its images that a dataset may lack: some are lost in many a download


class Dataset(NamedTuple):
    """How one dataset is read: its splits (the first is the default) with their published numbers
    of images, the number of classes, the names that a split may have below its folder, what lists
    its published layouts there, and where people get it. Where it is not published as class
    folders, `folders` are what people call them.
    """

    splits: dict[str, int]
    classes: int
    names: Callable[[str], tuple[str, ...]]
    lister: Lister
    origin: str
    folders: tuple[str, ...] = ()


def _list_split(where: str, split: str) -> Source | None:
    """Class folders or a tar of them, or the class folders in a sub-folder named as the split."""
    if kind_of(where) == "file":
        if split:
            raise UserError(f"{where} is one file and has no split {split}; leave --split out")
        return list_tar(where)
    if kind_of(join(where, split)) != "folder":
        there = ", ".join(name for name in names_in(where) if name in SPLITS)
        how = f"by --split there is {there}" if there else "leave --split out"
        raise UserError(f"{where} has no folder {split} for --split {split}; {how}")
    return list_folder(join(where, split))


NAMED = {
    "imagenet": Dataset(
        {"train": 1_281_167, "val": 50_000}, 1000, imagenet.places_of, imagenet.list_imagenet,
        "image-net.org (on request, for research that is not commercial) or Kaggle's "
        "imagenet-object-localization-challenge",
    ),
    "cifar10": Dataset(
        {"train": 50_000, "test": 10_000}, 10, cifar.places10, cifar.list_cifar10,
        "www.cs.toronto.edu/~kriz/cifar.html (no licence is given; cite the report there)",
        cifar.NAMES10,
    ),
    "cifar100": Dataset(
        {"train": 50_000, "test": 10_000}, 100, cifar.places100, cifar.list_cifar100,
        "www.cs.toronto.edu/~kriz/cifar.html (no licence is given; cite the report there)",
        cifar.NAMES100,
    ),
    "inaturalist": Dataset(
        {"train": 2_686_843, "val": 100_000, "train_mini": 500_000}, 10_000,
        inaturalist.places_of, inaturalist.list_inaturalist,
        "github.com/visipedia/inat_comp (2021; for research that is not commercial, each photo "
        "under its own licence)",
    ),
    "places365": Dataset(
        {"train": 1_803_460, "val": 36_500, "train-challenge": 8_026_628}, 365,
        places365.places_of, places365.list_places365,
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
    is found first: there in its published layouts, or in class folders called as its classes are.

    Raises UserError, with all places that were looked at, if it is nowhere.
    """
    if name in PLACED:
        return _list_placed(name, given, split)
    dataset, split = NAMED[name], split_of(name, split)
    if given and not kind_of(given):
        raise UserError(f"there is no {given} to read {name} from; name where it lies")
    for base in filter(kind_of, [given] if given else usual_places(name)):
        if not given and _is_closed(base, name):
            continue
        for below in dataset.names(split):
            where = join(base, below)
            if kind_of(where):
                where = where if is_url(where) else os.path.realpath(where)
                source = dataset.lister(where, split)
                if source is None and dataset.folders:
                    source = _class_folders(where, dataset, bool(given), not below)
                if source is not None:
                    return source
    raise UserError(_not_found(name, given, split))


def _is_closed(base: str, name: str) -> bool:
    """Whether a usual place is not for us to look into; of one called as the dataset, we say so."""
    closed = not is_url(base) and not os.access(base, os.R_OK | os.X_OK)
    return closed and os.path.basename(base) != name


def split_of(name: str, split: str) -> str:
    """What the dataset `name` calls `split`. Raises UserError if it has no such split."""
    splits = NAMED[name].splits
    split = {"val": "test"}.get(split, split) if "test" in splits else split
    if split and split not in splits:
        raise UserError(f"{name} has no split {split}; it has {', '.join(splits)}")
    return split or next(iter(splits))


def check_counts(source: Source, name: str, split: str) -> None:
    """UserError if `source` is far from the dataset `name` as published: with another number of
    classes, or with a number of images that differs by more than FAR (2 %).
    """
    dataset, split = NAMED[name], split_of(name, split)
    images, published = sum(entry.flaw != "vanished" for entry in source.entries), dataset.splits
    far = abs(images - published[split]) > FAR * published[split]
    if far or len(source.classes) != dataset.classes:
        raise UserError(
            f"{source.root} holds {images:,} images of {len(source.classes):,} classes, and {name} "
            f"(split {split}) has {published[split]:,} images of {dataset.classes:,} classes; name "
            "where all of it lies, or take what is there by --partial (make: FLAGS=--partial)"
        )


def _class_folders(where: str, dataset: Dataset, given: bool, top: bool) -> Source | None:
    """Class folders, or a tar of them, of a dataset that is published otherwise; None if not.

    In a place that nobody gave they have the published names. `top` is the place itself, not what
    is called as a split below it.
    """
    if kind_of(where) == "folder":
        names = set(names_in(where))
        if not given and not names >= set(dataset.folders):
            return None
        if top and names <= set(SPLITS):  # the split that was asked for is not among them
            return None
        source = list_folder(where)
    elif where.endswith(".tar") or top:
        try:
            source = list_tar(where)
        except ValueError:
            if given:
                raise
            return None  # a train.tar of somebody's
        if not given and source.classes != sorted(dataset.folders):
            return None
    else:
        return None
    return source if source.classes else None  # a class called train has none


def _not_found(name: str, given: str, split: str) -> str:
    dataset = NAMED[name]
    looked = ", ".join(filter(None, dataset.names(split)))
    get = f"get it from {dataset.origin}, then give its place as {name}:PATH (make: DATA=PATH)"
    if not given:
        bases = ", ".join(usual_places(name))
        others = "; class folders of other names are taken only where PATH gives them"
        return (
            f"{name} (split {split}) was not found: looked for {looked} in {bases}"
            f"{others if dataset.folders else ''}; {get}"
        )
    if kind_of(given) == "file":
        return f"{given} is a file that is no {name} (split {split}); give its folder, or {looked}"
    there = [
        other
        for other in dataset.splits
        if any(kind_of(join(given, below)) for below in {*dataset.names(other)}
               - {*dataset.names(split)})
    ]  # fmt: skip
    if there:
        return f"{given} holds no split {split} of {name}; by --split there is {', '.join(there)}"
    return f"{given} holds no {name} (split {split}): looked for {looked} in it; {get}"


def _list_placed(name: str, given: str, split: str) -> Source:
    if split and split not in SPLITS:
        raise UserError(f"{name} has no split {split}; it may have {', '.join(SPLITS)}")
    if not kind_of(given):
        raise UserError(f"no {name} source at {given}: there is no such place; give another")
    source = PLACED[name](given, split)
    if source is None:
        raise UserError(f"no {name} source at {given}; give the place of one")
    return source
