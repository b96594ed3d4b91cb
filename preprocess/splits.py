"""Which of many files belong to a split, by the words people put into their names.

In: file names and a split. Out: those of the split.
"""

import re

from shards.errors import UserError

WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SPLITS = tuple(WORDS)


def of_split(names: list[str], split: str) -> list[str]:
    """The `names` of `split` (empty: train), in their order; all of them, if none tells its split
    and none was asked for.

    Raises UserError if only others are there, or if some names tell and some do not.
    """
    told = {name: found for name in names if (found := _split_of(name))}
    if names == [""] or not (told or split):
        return names
    silent = [name for name in names if name not in told]
    if silent:
        how = "as others do; move it away" if told else "so leave --split out"
        raise UserError(f"{silent[0]!r} does not tell its split, {how}, or name one file")
    chosen = [name for name in names if told[name] == (split or "train")]
    if not chosen:
        there = ", ".join(sorted(set(told.values())))
        raise UserError(f"there is no split {split or 'train'}; by --split there is {there}")
    return chosen


def _split_of(name: str) -> str:
    """The split that the words of a path tell, the file's own name first."""
    for piece in reversed(name.split("/")):
        words = set(re.split(r"[^a-z]+", piece.lower()))
        for split, of_split in WORDS.items():
            if words & set(of_split):
                return split
    return ""
