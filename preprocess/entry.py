"""What a listed source is: its inputs in a fixed order, and what tells one version from another.

In: what a layout finds. Out: Entry and Source, which listing fills and reading follows.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_BYTES = 1 << 30
FLAWS = {
    "link": "it leads out of the source; build from the folder it leads to, or copy the file in",
    "not-a-file": "it is a folder, pipe, socket, device, link or sparse member",
    "unreadable": "it could not be read, or as a folder listed, when the source was listed",
    "vanished": "the dataset's list names it and it is not there",
}


class Entry(NamedTuple):
    """One input: its name below the root, label, and what tells one version of it from another.

    `part` is the file below the root that holds it (empty: the root itself, or a file of its own),
    `offset` where it begins there: a byte in a tar, else the number of a row. `stamp` is the
    modification time (ns) of a file, its store's tag as a number, or the bytes of a part. `flaw`
    is why it cannot be read, if listing already showed it; a folder that could not be listed is one
    entry, whose name ends in a slash.
    """

    name: str
    label: int
    size: int
    offset: int = 0
    stamp: int = 0
    flaw: str = ""
    part: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A listed source. `kind` says how an image is read, `root` is a path or URL, `classes` name
    the labels; `ignored` files have no image's name; `sets` are folders in it, left out, of
    finished shards of ours.
    """

    kind: str
    root: str
    entries: list[Entry]
    classes: list[str]
    ignored: int
    sets: tuple[str, ...] = ()

    def description(self) -> dict[str, Any]:
        """What the manifest says of the source; equal descriptions mean equal inputs."""
        digest = hashlib.sha256()
        for entry in self.entries:
            facts = entry if entry.part else entry[:-1]
            digest.update(json.dumps(facts).encode("ascii") + b"\n")
        described = {"kind": self.kind, "inputs": len(self.entries), "ignored": self.ignored}
        return {**described, "sha256": digest.hexdigest()}
