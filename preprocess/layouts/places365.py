"""Places365, small and large: its own lists of files beside folders of images, or class folders.

Labels are those of the list, their names those of categories_places365.txt.
"""

import os

from preprocess.files import join, kind_of, read_all
from preprocess.layouts.folder import list_folder, list_labelled
from preprocess.source import Source, names_in
from shards.errors import UserError

LISTS = {
    "train": ("places365_train_standard.txt", "places365_train_challenge.txt"),
    "train-challenge": ("places365_train_challenge.txt",),
    "val": ("places365_val.txt",),
}
CATEGORIES = "categories_places365.txt"


def places_of(split: str) -> tuple[str, ...]:
    """Where a split lies below the folder of the dataset: small images before large ones."""
    if split == "val":
        return "val_256", "val_large", "places365_standard/val", "val", ""
    variant = "challenge" if split == "train-challenge" else "standard"
    sizes = "data_256", f"data_256_{variant}", "data_large", f"data_large_{variant}"
    return *sizes, f"places365_{variant}/train", "train", ""


def list_places365(where: str, split: str) -> Source | None:
    """The split in the folder of images `where`, or None if it is none.

    Raises UserError if its list is not beside it, or gives a label that is no category.
    """
    if kind_of(where) != "folder":
        return None
    name = os.path.basename(where.rstrip("/"))
    if not name.startswith(("data_256", "data_large", "val_256", "val_large")):
        # The "easy" archive has class folders, as airfield and zen_garden.
        return list_folder(where) if "airfield" in names_in(where) else None
    above = where.rstrip("/").rpartition("/")[0]
    listing = next((path for file in LISTS[split] if (path := _beside(above, file))), None)
    if listing is None:
        raise UserError(
            f"{above} holds {name} without its list; put {' or '.join(LISTS[split])} from the "
            f"archive of file lists, with {CATEGORIES}, beside it"
        )
    return _list(where, listing, _beside(above, CATEGORIES))


def _beside(folder: str, name: str) -> str | None:
    for place in ("", "filelist_places365-standard", "filelist_places365-challenge"):
        path = join(join(folder, place), name)
        if kind_of(path) == "file":
            return path
    return None


def _list(where: str, listing: str, categories: str | None) -> Source:
    rows = _rows(listing)
    names = {label: name.removeprefix("/") for name, label in _rows(categories or listing)}
    if not categories:  # a category is the folder of its images, but validation has none
        names = {label: name.rpartition("/")[0] or str(label) for label, name in names.items()}
    count = max(names, default=-1) + 1
    if len(names) != count:  # labels are no less than 0
        raise UserError(f"{categories or listing} leaves out labels below {count}; fetch it again")
    strange = next((row for row in rows if row[1] not in names), None)
    if strange:
        raise UserError(
            f"{listing} gives {strange[0]!r} the label {strange[1]}, which no category has"
        )
    listed = [(name.removeprefix("/"), label) for name, label in rows]
    return list_labelled(where, listed, [names[label] for label in range(count)], listing)


def _rows(path: str) -> list[tuple[str, int]]:
    """(name, label) of each line."""
    rows = []
    for number, line in enumerate(read_all(path).decode("utf-8", "surrogateescape").split("\n")):
        name, _, label = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if not name or not label.isdecimal() or len(label) > 9:
            raise UserError(f"{path}, line {number + 1}: not a name and a label: {line[:80]!r}")
        rows.append((name, int(label)))
    return rows
