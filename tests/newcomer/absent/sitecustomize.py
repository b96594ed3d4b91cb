"""Makes the packages that $ABSENT names look as if they were not installed."""

import os
from importlib.machinery import PathFinder

_find = PathFinder.find_spec


@staticmethod  # for callers by an instance, too
def _but_absent(name, path=None, target=None):
    absent = name.partition(".")[0] in os.environ.get("ABSENT", "").split(",")
    return None if absent else _find(name, path, target)


PathFinder.find_spec = _but_absent
