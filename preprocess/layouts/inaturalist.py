"""iNaturalist: a JSON of images, annotations and categories, or its folders of species.

File names in train.json, val.json, ... begin at its own folder. Labels are the categories in
order of their numbers.
"""

import json
from typing import Any

from preprocess.files import kind_of, read_all
from preprocess.layouts.folder import list_folder, list_labelled
from preprocess.source import Source, names_in
from shards.errors import UserError


def places_of(split: str) -> tuple[str, ...]:
    """Where a split lies below the folder of the dataset; torchvision calls its folder by year."""
    of_year = {"train": "2021_train", "train_mini": "2021_train_mini", "val": "2021_valid"}
    return f"{split}.json", of_year[split], split, ""


def list_inaturalist(where: str, split: str) -> Source | None:
    """The split that the JSON or folder `where` holds, or None if it is neither.

    Raises UserError at a JSON of another form, an annotation of no category, an image with two.
    """
    if kind_of(where) == "file":
        return _list_json(where)
    species = [name for name in names_in(where) if name[:5].isdigit() and name[5:6] == "_"]
    return list_folder(where) if species else None


def _list_json(where: str) -> Source:
    try:
        lists = json.loads(read_all(where), object_hook=_lighter)
        images, annotations = lists["images"], lists.get("annotations", [])
        categories = sorted(lists["categories"])
        label_of = {number: label for label, (number, _) in enumerate(categories)}
        category_of: dict[Any, int] = {}
        for image, category in annotations:
            if category not in label_of:
                raise UserError(f"image {image!r} has the category {category!r}, which is none")
            if category_of.setdefault(image, category) != category:
                raise UserError(f"image {image!r} has two categories")
        label = {image: label_of[category] for image, category in category_of.items()}
        listed = [(str(name), label.get(number, -1)) for number, name in images]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        words = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{where} is no list of iNaturalist's ({words}); fetch it again") from None
    classes = [name for _, name in categories]
    return list_labelled(where.rpartition("/")[0], listed, classes, where)


def _lighter(row: dict[str, Any]) -> Any:
    """What of a parsed object is needed: the list of 2021 has 2.7 million images."""
    if "file_name" in row:
        return row["id"], row["file_name"]
    if "category_id" in row:
        return row["image_id"], row["category_id"]
    if "supercategory" in row or "image_dir_name" in row:
        return row["id"], str(row.get("image_dir_name") or row["name"])
    return row
