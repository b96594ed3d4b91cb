"""What a user typed, checked before torch is imported: seconds later it would be the same words.

In: a folder, a recipe's name, a device. Out: nothing, or one UserError that names the nearest.
"""

import re
from importlib.util import find_spec
from pathlib import Path

from shards.errors import UserError
from train.recipes import nearest

DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_device(name: str) -> None:
    """UserError unless `name` is auto, cpu, cuda or cuda:N."""
    if not DEVICES.fullmatch(name):
        near = nearest(name, ["auto", "cpu", "cuda", "cuda:0"])
        raise UserError(f"--device {name!r} is unknown; use auto, cpu, cuda or cuda:N{near}")


def check_folder(folder: str) -> None:
    """UserError unless `folder` holds a sound manifest, or is a URL."""
    from shards.files import MANIFEST
    from shards.remote.storage import is_url
    from shards.spec import load

    path = Path(folder)
    if is_url(folder):
        return
    if not path.exists():
        beside = path.parent.glob(f"*/{MANIFEST}") if path.parent.is_dir() else ()
        near = nearest(str(path), sorted(str(each.parent) for each in beside))
        raise UserError(
            f"there is no folder {folder} of shards; build it with `kamim shards build`{near}"
        )
    load(path)


def check_wandb(project: str) -> None:
    """UserError if a `project` is named and the package is not there."""
    if project and find_spec("wandb") is None:
        raise UserError("--wandb needs the package; type: pip install wandb")
