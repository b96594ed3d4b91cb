"""Where source images come from: a dataset by its name, or a folder or tar by path or URL.

A dataset is looked for in its published layouts, at the given place or in the usual folders.
"""

import os
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from itertools import compress
from pathlib import PurePosixPath
from typing import NamedTuple

from preprocess.files import join, kind_of
from preprocess.layouts import cifar, demo, imagenet, inaturalist, places365
from preprocess.layouts.ffcv import list_ffcv
from preprocess.layouts.folder import list_folder
from preprocess.layouts.parquet import list_parquet
from preprocess.layouts.shards import list_shards
from preprocess.layouts.tar import list_tar
from preprocess.layouts.webdataset import list_webdataset
from preprocess.source import SPLITS, SUFFIXES, Source, inside, names_in
from shards.errors import UserError
from shards.remote.storage import is_url

Lister = Callable[[str, str], Source | None]
FAR = 0.02  # share of its images that a dataset may lack: many downloads lose some
# Where people keep datasets; the folder that the variable KAMIM_DATA names comes before.
BASES = ("data", ".", "~/data", "~/datasets", "/data", "/datasets")
TORONTO = "www.cs.toronto.edu/~kriz/cifar.html (no licence is given; cite the report there)"


class Dataset(NamedTuple):
    """How one dataset is read.

    splits: published number of images per split, the default split first. classes: their number.
    names: names of a split's folder or file. lister: lists the published layouts. origin: where to
    get it. folders: usual names of its class folders, if it is published in another form.
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
        return list_tar(where)
    if kind_of(join(where, split)) != "folder":
        there = ", ".join(name for name in names_in(where) if name in SPLITS)
        how = f"by --split there is {there}" if there else "leave --split out"
        raise UserError(f"{where} has no folder {split} for --split {split}; {how}")
    return list_folder(join(where, split))


NAMED = {
    "imagenet": Dataset(
        {"train": 1_281_167, "val": 50_000},
        1000,
        imagenet.places_of,
        imagenet.list_imagenet,
        "image-net.org (on request, for research that is not commercial) or Kaggle's "
        "imagenet-object-localization-challenge",
    ),
    "cifar10": Dataset(
        {"train": 50_000, "test": 10_000},
        10,
        partial(cifar.places_of, cifar.CIFAR10),
        partial(cifar.list_cifar, cifar.CIFAR10),
        TORONTO,
        cifar.NAMES10,
    ),
    "cifar100": Dataset(
        {"train": 50_000, "test": 10_000},
        100,
        partial(cifar.places_of, cifar.CIFAR100),
        partial(cifar.list_cifar, cifar.CIFAR100),
        TORONTO,
        cifar.NAMES100,
    ),
    "inaturalist": Dataset(
        {"train": 2_686_843, "val": 100_000, "train_mini": 500_000},
        10_000,
        inaturalist.places_of,
        inaturalist.list_inaturalist,
        "github.com/visipedia/inat_comp (2021; for research that is not commercial, each photo "
        "under its own licence)",
    ),
    "places365": Dataset(
        {"train": 1_803_460, "val": 36_500, "train-challenge": 8_026_628},
        365,
        places365.places_of,
        places365.list_places365,
        "places2.csail.mit.edu (for research that is not commercial)",
    ),
}
# Layouts of anybody's images; these have no usual place.
PLACED: dict[str, Lister] = {
    "folder": _list_split,
    "webdataset": list_webdataset,
    "parquet": list_parquet,
    "shards": list_shards,
    "ffcv": list_ffcv,
}
NAMES = ("demo", *NAMED, *PLACED)


def open_source(where: str | os.PathLike[str], split: str = "", partial: bool = False) -> Source:
    """List the source `where`: a dataset as `imagenet` or `imagenet:PATH`, or the path or URL of a
    folder or an uncompressed tar of class folders.

    Sub-folders, in byte order, are the classes 0, 1, ...; images beside them get label -1. split: a
    split of a dataset; empty: its training set. Raises UserError if there is no such place, or no
    image in it; OSError if a store cannot be reached. Without `partial`, also raises UserError if a
    folder cannot be listed, or if classes or images are far from those published.
    """
    where = os.fspath(where)
    name, colon, given = where.partition(":")
    if where == "demo":
        source = demo.list_demo(split)
    elif name in NAMED and (given or not colon):
        source = _list_named(name, _in_full(given), split_of(name, split))
    elif name in PLACED and given:
        source = _list_placed(name, _in_full(given), split)
    elif name in NAMED:
        raise UserError(f"{name}: has no path; give {name}:PATH, or {name} alone to look for it")
    elif name in PLACED:
        line = f"{name} needs the path or URL of images; give {name}:PATH (make: DATA=PATH)"
        beside = os.path.isdir(name)
        raise UserError(f"{line}, or ./{name} for the folder of that name" if beside else line)
    else:
        source = _list_place(where, split)
    if not partial:
        _check_listed(source)
        if name in NAMED:
            _check_counts(source, name, split_of(name, split))
    if not source.entries:
        raise UserError(
            f"no images under {source.root}; expected class folders of files named "
            f"{', '.join(SUFFIXES[:4])} ... ({source.ignored} other files){_hint(source.root)}"
        )
    return source


def split_of(name: str, split: str) -> str:
    """What the dataset `name` calls `split`. Raises UserError if it has no such split."""
    splits = NAMED[name].splits
    split = {"val": "test"}.get(split, split) if "test" in splits else split
    if split and split not in splits:
        raise UserError(f"{name} has no split {split}; it has {', '.join(splits)}")
    return split or next(iter(splits))


def check_outside(source: Source, out: str) -> None:
    """Raise UserError if `out` is in the source's folder, whose next listing would be another."""
    root = source.root
    if is_url(root):
        within = f"{out}/".startswith(f"{root}/")
    else:
        within = not is_url(out) and os.path.isdir(root) and inside(out, os.path.realpath(root))
    if within:
        raise UserError(
            f"{out} lies in the source's folder {root}, and its files would be inputs of the next "
            "build; name a folder outside of it (make: OUT=folder)"
        )


def _in_full(where: str) -> str:
    """`where` with links and ~ resolved, or a URL as it is."""
    where = where.removeprefix("file://")
    if is_url(where) or not where:
        return where.rstrip("/")
    return os.path.realpath(os.path.expanduser(where))


def _list_named(name: str, given: str, split: str) -> Source:
    """The `split` of the dataset `name` at the place `given`, or at the first place where it is
    found: in its published layouts, or in class folders that are called as its classes are.
    """
    dataset = NAMED[name]
    if given and not kind_of(given):
        raise UserError(f"there is no {given} to read {name} from; name where it lies")
    for base in filter(kind_of, [given] if given else _usual_places(name)):
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


def _usual_places(name: str) -> list[str]:
    """Folders where `name` is looked for, in this order, when no place is given."""
    bases = [os.environ.get("KAMIM_DATA", ""), *map(os.path.expanduser, BASES)]
    return [place for base in filter(None, bases) for place in (os.path.join(base, name), base)]


def _is_closed(base: str, name: str) -> bool:
    """Whether a usual place cannot be read, and is passed over. One that is called as the dataset
    is not: its error is shown.
    """
    closed = not is_url(base) and not os.access(base, os.R_OK | os.X_OK)
    return closed and os.path.basename(base) != name


def _class_folders(where: str, dataset: Dataset, given: bool, top: bool) -> Source | None:
    """Class folders, or a tar of them, of a dataset that is published in another form; None if
    there are none.

    In a place that nobody gave they must have the published names. `top`: whether it is the place
    itself, not a split's folder below it.
    """
    if kind_of(where) == "folder":
        names = set(names_in(where))
        if not given and not names >= set(dataset.folders):
            return None
        if top and names <= SPLITS.keys():  # the split that was asked for is not among them
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
        bases = ", ".join(_usual_places(name))
        others = "; class folders of other names are taken only where PATH gives them"
        return (
            f"{name} (split {split}) was not found: looked for {looked} in {bases}"
            f"{others if dataset.folders else ''}; {get}"
        )
    if kind_of(given) == "file":
        return f"{given} is a file that is no {name} (split {split}); give its folder, or {looked}"
    ours = {*dataset.names(split)}
    names = [{*dataset.names(other)} - ours for other in dataset.splits]
    found = [any(kind_of(join(given, below)) for below in each) for each in names]
    there = ", ".join(compress(dataset.splits, found))
    if there:
        return f"{given} holds no split {split} of {name}; by --split there is {there}"
    return f"{given} holds no {name} (split {split}): looked for {looked} in it; {get}"


def _list_placed(name: str, given: str, split: str) -> Source:
    split = {"validation": "val", "valid": "val"}.get(split, split)  # the hub's words
    if split and split not in SPLITS:
        raise UserError(f"{name} has no split {split}; it may have {', '.join(SPLITS)}")
    if not kind_of(given):
        raise UserError(f"no {name} source at {given}: there is no such place; give another")
    if split and (name == "shards" or kind_of(given) == "file"):
        one = "set" if name == "shards" else "file"
        raise UserError(f"{given} is one {one} and has no split {split}; leave --split out")
    source = PLACED[name](given, split)
    if source is None:
        raise UserError(f"no {name} source at {given}; give the place of one")
    return source


def _list_place(where: str, split: str) -> Source:
    place = _in_full(where)
    kind = kind_of(place)
    if not kind:
        raise UserError(
            f"no source at {where}: {_nearest(where)}give a folder or a .tar by its path or URL, "
            f"or a dataset as NAME or NAME:PATH; there are {', '.join(NAMES)}"
        )
    if split:
        return _list_placed("folder", place, split)
    if kind == "folder":
        return list_folder(place)
    try:
        return list_tar(place)
    except ValueError:
        if {".tar", ".tgz"} & set(PurePosixPath(place).suffixes):
            raise
        raise UserError(
            f"{where} is a file, and no uncompressed .tar; give a folder of photographs, such a "
            f".tar, or a dataset as NAME:PATH{_hint(place)}"
        ) from None


def _nearest(where: str) -> str:
    """The dataset that was likely meant, as the beginning of a sentence."""
    name, colon, given = where.partition(":")
    near = get_close_matches(name.lower(), NAMES, 1)
    if not near:
        return ""
    place = f":{given or 'PATH'}" if near[0] in PLACED or (colon and near[0] != "demo") else ""
    return f"is it {near[0]}{place}? Else "


def _check_listed(source: Source) -> None:
    """UserError at a folder that could not be listed: nobody knows how many images are in it."""
    for entry in source.entries:
        if entry.flaw == "unreadable" and entry.name.endswith("/"):
            raise UserError(
                f"{join(source.root, entry.name)!r} cannot be listed, and its images would be left "
                "out; make it readable for this user (chmod -R u+rX), or take what is there by "
                "--partial (make: FLAGS=--partial)"
            )


def _check_counts(source: Source, name: str, split: str) -> None:
    """UserError if `source` is far from the dataset `name` as published: with another number of
    classes, or with a number of images that differs by more than FAR (2 %).
    """
    published, classes = NAMED[name].splits[split], NAMED[name].classes
    images = sum(entry.flaw != "vanished" for entry in source.entries)
    if abs(images - published) > FAR * published or len(source.classes) != classes:
        raise UserError(
            f"{source.root} holds {images:,} images of {len(source.classes):,} classes, and {name} "
            f"(split {split}) has {published:,} images of {classes:,} classes; name "
            "where all of it lies, or take what is there by --partial (make: FLAGS=--partial)"
        )


def _hint(root: str) -> str:
    """What else may lie at a place without images, as the end of a sentence."""
    names = names_in(root) if kind_of(root) == "folder" else [root]
    for suffix, kind in ((".tar", "webdataset"), (".parquet", "parquet")):
        if any(name.endswith(suffix) for name in names):
            return f"; if it holds a {kind} set, say {kind}:{root}"
    return ""
