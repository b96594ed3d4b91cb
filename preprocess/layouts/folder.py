"""A folder of class folders, here or in a store: sub-folders in byte order are classes 0, 1, ..."""

import os

from preprocess.files import join
from preprocess.source import (
    KEPT,
    OURS,
    Entry,
    Source,
    children_of,
    entry_of,
    files_below,
    holds_set,
    inside,
    look_up,
)
from shards.errors import UserError
from shards.files import MANIFEST
from shards.remote import storage as remote
from shards.remote.storage import is_url


def list_folder(root: str) -> Source:
    """Images of the class folders of `root`, then those beside them with label -1.

    Folders that hold finished shards of ours are left out. Raises UserError if `root` is one, or
    cannot be listed.
    """
    if is_url(root):
        return _list_store(root)
    if holds_set(root):
        raise UserError(_is_ours(root))
    home = os.path.realpath(root)
    children = [child for child in children_of(root) if not child.name.startswith(".")]
    classes: list[str] = []
    links: list[Entry] = []  # class folders that lead out of the source
    found: list[Entry] = []
    for folder in (child for child in children if child.is_dir()):
        if folder.is_symlink() and not inside(folder.path, home):
            links.append(Entry(folder.name, -1, 0, flaw="link"))
            found.append(links[-1])
        elif holds_set(folder.path):
            found.append(Entry(f"{folder.name}/", -1, 0, flaw=OURS))
        else:
            found += files_below(folder.path, root, home, len(classes))
            classes.append(folder.name)
    found += [entry_of(child.path, root, home) for child in children if not child.is_dir()]
    sets = [entry.name.rstrip("/") for entry in found if entry.flaw == OURS]
    found = [entry for entry in found if entry.flaw != OURS]
    kept = [entry for entry in found if entry.name.lower().endswith(KEPT) or entry in links]
    return Source("folder", root, kept, classes, len(found) - len(kept), tuple(sets))


def list_labelled(where: str, listed: list[tuple[str, int]], classes: list[str], by: str) -> Source:
    """The images below `where` that the dataset's list `by` names, (name, label) each."""
    found = look_up(where, listed)
    entries = sorted(entry for entry in found if entry.name.lower().endswith(KEPT))
    if entries and all(entry.flaw == "vanished" for entry in entries):
        raise UserError(f"none of the images of {by} is in {where}; unpack them there")
    return Source("folder", where, entries, classes, len(listed) - len(entries))


def _is_ours(root: str) -> str:
    if is_url(root):
        return f"{root} is a finished set of shards; copy it: kamim shards copy {root} FOLDER"
    return f"{root} is a finished set of shards; its frames are read by shards:{root}"


def _list_store(root: str) -> Source:
    """The same images in the same order, from names alone: a store has no folders."""
    found = [file for file in remote.find(root) if not file.name.startswith(".")]
    folders = [file.name.rpartition("/") for file in found]
    sets = [folder for folder, _, name in folders if name == MANIFEST]
    sets = [folder for folder in sets if holds_set(join(root, folder))]
    if "" in sets:
        raise UserError(_is_ours(root))
    ours = tuple(f"{name}/" for name in sets)
    found = [file for file in found if not file.name.startswith(ours)]
    found.sort(key=lambda file: _order(file.name))
    classes = sorted({top for file in found if (top := _top(file.name))}, key=os.fsencode)
    labels = {name: label for label, name in enumerate(classes)}
    kept = [file for file in found if file.name.lower().endswith(KEPT)]
    entries = [Entry(f.name, labels.get(_top(f.name), -1), f.size, 0, f.stamp) for f in kept]
    return Source("folder", root, entries, classes, len(found) - len(kept), tuple(sets))


def _top(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _order(name: str) -> tuple[bool, list[tuple[bool, bytes]]]:
    """As a walk goes: at each level files first, but at the root folders first."""
    *folders, last = name.split("/")
    levels = [(True, os.fsencode(folder)) for folder in folders]
    return not folders, [*levels, (False, os.fsencode(last))]
