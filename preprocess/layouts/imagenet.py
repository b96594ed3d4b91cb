"""ImageNet-1K as people have it: the tar of class tars, extracted folders, Kaggle's CLS-LOC.

Images are labelled by sorted wnid. The inner tars are uncompressed, so an image is a range of the
outer file, and nothing is unpacked.
"""

import csv
import os
import re
from dataclasses import replace

from preprocess.files import join, kind_of, opened, read_all
from preprocess.layouts.folder import list_folder
from preprocess.layouts.tar import by_class, images_of, list_tar, members
from preprocess.source import Entry, Source, names_in
from shards.errors import UserError

WNID = re.compile(r"n\d{8}")
ANSWERS = "LOC_val_solution.csv"
TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}


def places_of(split: str) -> tuple[str, ...]:
    """Where a split lies below the folder of the dataset."""
    return TARS[split], f"ILSVRC/Data/CLS-LOC/{split}", f"Data/CLS-LOC/{split}", split, ""


def list_imagenet(where: str, split: str) -> Source | None:
    """The split in the tar or folder `where`, or None if it holds nothing of ImageNet's.

    Raises UserError at a folder that is no class, a damaged inner tar, or a validation image
    that Kaggle's LOC_val_solution.csv, looked for above it, gives no class.
    """
    if kind_of(where) == "file":
        return _list_train(where) if split == "train" else _list_val(where)
    names = names_in(where)
    if any(WNID.fullmatch(name) for name in names):
        return _by_wnid(list_folder(where))
    flat = any(name.startswith("ILSVRC2012_val_") for name in names)
    return _list_val(where) if flat and split == "val" else None


def _by_wnid(source: Source) -> Source:
    strange = next((name for name in source.classes if not WNID.fullmatch(name)), None)
    if strange is not None:
        raise UserError(
            f"{source.root} holds the folder {strange!r} among ImageNet's classes and labels would "
            f"shift; move it away, or take every folder as a class by folder:{source.root}"
        )
    return source


def _list_train(where: str) -> Source:
    """The tar of class tars; a plain tar of class folders is taken as such."""
    found: list[Entry] = []
    ignored, inner = 0, 0
    with opened(where) as file:
        for outer in members(file, where):
            wnid, suffix = os.path.splitext(os.path.basename(outer.name))
            if not WNID.fullmatch(wnid) or suffix != ".tar" or not outer.isreg():
                continue
            inner += 1
            begin, end = outer.offset_data, outer.offset_data + outer.size
            infos = members(file, f"{outer.name!r} in {where}", begin, end)
            images, others = images_of(infos, f"{wnid}/")
            found += images
            ignored += others
    if not inner:
        return _by_wnid(list_tar(where))
    found.sort()
    return by_class(where, found, [entry.name.partition("/")[0] for entry in found], ignored)


def _list_val(where: str) -> Source:
    """Validation images in one flat folder or tar, labelled by Kaggle's list of answers."""
    source = list_tar(where) if kind_of(where) == "file" else list_folder(where)
    if source.classes:
        return _by_wnid(source)
    folder, answers = where, ""
    while not answers and os.path.basename(folder):
        folder = folder.rpartition("/")[0]
        answers = join(folder, ANSWERS) if kind_of(join(folder, ANSWERS)) else ""
    if not answers:
        raise UserError(
            f"{where} holds validation images without classes; put Kaggle's {ANSWERS} beside it, "
            "or sort the images into folders by wnid"
        )
    try:
        rows = csv.DictReader(read_all(answers).decode("utf-8").splitlines())
        wnids = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (ValueError, KeyError, IndexError, AttributeError, csv.Error):
        raise UserError(f"{answers} is not Kaggle's list of ImageId,PredictionString") from None
    classes = sorted(set(wnids.values()))
    labels = {wnid: label for label, wnid in enumerate(classes)}
    entries = []
    for entry in source.entries:
        stem = os.path.splitext(os.path.basename(entry.name))[0]
        if stem not in wnids:
            raise UserError(f"{answers} gives {entry.name!r} no class; take the complete file")
        entries.append(entry._replace(label=labels[wnids[stem]]))
    return replace(source, entries=entries, classes=classes)
