"""Which of many files belong to a split, by the words people put into their names.

In: file names and a split. Out: those of the split.
"""

import re

WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SPLITS = tuple(WORDS)


def of_split(names: list[str], split: str) -> list[str]:
    """The `names` of `split`, in their order; all of them, if none says of which split it is.

    Raises ValueError if others than `split` are there.
    """
    told = {name: found for name in names if (found := _split_of(name))}
    if not told:
        return names
    chosen = [name for name in names if told.get(name) == split]
    if not chosen:
        there = ", ".join(sorted(set(told.values())))
        raise ValueError(f"there is no split {split}: the files are of {there}; name it by --split")
    return chosen


def _split_of(name: str) -> str:
    """The split that the words of a path tell, the file's own name first."""
    for piece in reversed(name.split("/")):
        words = set(re.split(r"[^a-z]+", piece.lower()))
        for split, of_split in WORDS.items():
            if words & set(of_split):
                return split
    return ""
