"""A folder of class folders, here or in a store.

In: its path or URL. Out: its images, sub-folders in byte order as the classes 0, 1, ...
"""

import os

from preprocess.entry import SUFFIXES, Entry, Source
from preprocess.files import join
from preprocess.listing import OURS, Found, children_of, facts_of, files_below, holds_set, inside
from shards.errors import UserError
from shards.files import MANIFEST
from shards.remote import storage as remote
from shards.remote.storage import is_url


def list_folder(root: str, split: str = "") -> Source:
    """Images of the class folders of `root`, then those beside them with label -1.

    Folders that hold finished shards of ours are left out. Raises UserError if `root` is one, or
    cannot be listed.
    """
    if is_url(root):
        return _list_store(root)
    if holds_set(root):
        raise UserError(_is_ours(root))
    entries: list[Entry] = []
    ignored = 0
    home = os.path.realpath(root)
    children = children_of(root)
    folders = [child for child in children if child.is_dir() and not child.name.startswith(".")]
    classes: list[str] = []
    sets: list[str] = []
    for folder in folders:
        if folder.is_symlink() and not inside(folder.path, home):
            entries.append(Entry(folder.name, -1, 0, flaw="link"))
            continue
        if holds_set(folder.path):
            sets.append(folder.name)
            continue
        label = len(classes)
        classes.append(folder.name)
        for file in files_below(folder.path, root, home):
            if file.flaw == OURS:
                sets.append(file.name.rstrip("/"))
                continue
            found = entry_of(file, label)
            ignored += found is None
            entries += [found] if found else []
    for child in children:
        if not child.is_dir() and not child.name.startswith("."):
            found = entry_of(facts_of(child.path, root, home), -1)
            ignored += found is None
            entries += [found] if found else []
    return Source("folder", root, entries, classes, ignored, tuple(sets))


def _is_ours(root: str) -> str:
    return f"{root} is a finished set of shards; its frames are read by shards:{root}"


def entry_of(file: Found, label: int) -> Entry | None:
    """The entry of one file, or of a folder with a flaw; None if it is not named as an image."""
    if not file.name.lower().endswith((*SUFFIXES, "/")):
        return None
    return Entry(file.name, label, file.size, 0, file.stamp, file.flaw)


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
    entries = [entry_of(Found(*file), labels.get(_top(file.name), -1)) for file in found]
    kept = [entry for entry in entries if entry]
    return Source("folder", root, kept, classes, len(entries) - len(kept), tuple(sets))


def _top(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _order(name: str) -> tuple[bool, list[tuple[bool, bytes]]]:
    """As a walk goes: at each level files first, but at the root folders first."""
    *folders, last = name.split("/")
    levels = [(True, os.fsencode(folder)) for folder in folders]
    return not folders, [*levels, (False, os.fsencode(last))]
