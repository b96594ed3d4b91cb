"""What is abused: small sets of real photographs, and how to tell that two outputs are the same.

The photographs are those of KAMIM_DATA, or the demo's.
"""

import hashlib
import io
import os
import random
from pathlib import Path
from typing import Any

from PIL import Image

from preprocess import open_source
from stress.cases import REPOSITORY

DATA = Path(os.environ.get("KAMIM_DATA", REPOSITORY.parent / "shared" / "data"))
# The smallest build that `--recipe small` trains on.
SMALL = ("--frame", 120, "--crop", 96, "--map-crops", 1, "--grid", 16, "--bank", 2)


def photographs(count: int, seed: int) -> list[bytes]:
    """`count` real photographs as JPEG files, again from the first where there are fewer."""
    chosen = random.Random(f"photographs {seed}")
    found = sorted((DATA / "imagenet-sample").glob("*/*.JPEG"))
    if found:
        return [path.read_bytes() for path in (found * (1 + count // len(found)))[:count]]
    demo = open_source("demo")
    entries = chosen.choices(demo.entries, k=count)
    return [demo.read(entry) for entry in entries]


def small_photographs(count: int, seed: int, size: tuple[int, int] = (160, 120)) -> list[bytes]:
    """Photographs shrunk to `size` (width, height), as JPEG files."""
    small = []
    for data in photographs(count, seed):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("RGB").resize(size).save(buffer, "JPEG", quality=92)
        small.append(buffer.getvalue())
    return small


def make_source(folder: Path, count: int, seed: int, classes: int = 4) -> Path:
    """A folder of class folders with `count` small photographs."""
    for number, data in enumerate(small_photographs(count, seed)):
        path = folder / f"class{number % classes}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def files(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`, by its path; of a link, where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run_digest(folder: str) -> dict[str, Any]:
    """Losses of a training run, to the last bit, its newest weights, attention maps, leftovers."""
    from train.metrics import read_metrics

    run = Path(folder)
    timed = ("images_per_s", "waiting", "seconds")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in read_metrics(run)]
    maps = {n: digest for n, digest in files(run).items() if n.endswith(".npy")}
    left = sorted(str(path.relative_to(run)) for path in run.rglob("*.tmp"))
    return {"rows": rows, "checkpoint": _weights(run), "maps": maps, "left": left}


def tuned_digest(folder: str) -> dict[str, Any]:
    """Files of a fine-tuning; of its newest checkpoint, which has dates in it, the weights."""
    found = {n: d for n, d in files(Path(folder)).items() if not n.endswith(".pt")}
    (run,) = (path.parent for path in Path(folder).glob("*/checkpoints"))
    return {"files": found, "checkpoint": _weights(run)}


def _weights(run: Path) -> str:
    """A digest of all tensors of the newest checkpoint of `run`."""
    import torch

    from train import checkpoint

    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    state, digest = checkpoint.load(newest), hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                digest.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                walk(each)
        else:
            digest.update(repr(value).encode())

    walk({"model": state["model"], "optimizer": state["optimizer"], "step": state["step"]})
    return digest.hexdigest()
