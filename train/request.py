"""Checks a request to `kamim pretrain` before torch is imported, which takes seconds."""

import os
import re
import shutil
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from shards.errors import UserError, install, nearest
from shards.remote.retry import PATIENCE
from train.recipes import Recipe

if TYPE_CHECKING:
    from shards import ShardSet

SHARE = re.compile(r"(.*[^:]):((?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)", re.IGNORECASE)
DEVICES = re.compile(r"auto|cpu|cuda(:\d+)?")
NAMED = ("timm", "random")
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")
CONFIG = "config.json"  # what a folder of either has beside it
PREPROCESSOR = "preprocessor_config.json"  # and what Hugging Face's may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where and how to train; what decides the numbers is in the recipe and the seed."""

    shards: Path | str | tuple[Path | str, ...]  # a folder, the URL of one, or several
    out: Path
    recipe: Recipe
    shares: tuple[float, ...] | None = None  # of several sets in an epoch; None: as they are large
    seed: int = 0
    init: str = ""  # what the encoder starts from; nothing: from the seed
    detector: str | None = None  # None: the only one of keypoints in the shards
    bank: bool = False  # stored crops with their exact counts, not new crops read off maps
    device: str = "auto"
    decode: Literal["cpu", "gpu"] = "cpu"  # what decodes JPEG frames
    workers: int = 0
    processes: bool = False  # the loader's workers, in place of threads
    resume: bool = False
    extend: bool = False  # resume with more epochs than the run had
    steps: int = 0  # 0: the recipe's epochs; less: stop there, on the same schedule
    save_every: int = 500  # steps
    save_minutes: float = 15  # and at the latest
    log_every: int = 20
    probe_every: float = 0  # epochs between looks at the features; 0: never
    probe_set: Path | str | None = None  # labelled shards to look at; None: those trained on
    skip_damaged: bool = False
    checksum: bool = True  # of every shard before the first step: seconds, and it warms the cache
    compile: bool = True  # on CUDA
    deterministic: bool = False  # on CUDA; a CPU always is
    wandb: str = ""
    window: int = 0  # shards that are shuffled together; 0: all, 64 if they are remote
    cache: Path | None = None  # local folder for remote shards
    cache_limit: int = 0  # bytes; 0: no limit
    patience: float = PATIENCE  # seconds to wait for a store that does not answer


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
    manifest = load(path)
    if manifest.container == "maps":
        raise UserError(
            f"{folder} holds densities without frames; build shards of frames by `kamim shards "
            "build`, or read the densities by name in a trainer of your own"
        )
    if manifest.container != "webdataset" and find_spec("ffcv") is None:
        raise UserError(
            f"{folder} is an FFCV set, and FFCV is not installed; {install('ffcv')}; or train on "
            "the set that it was made from"
        )


def check_once(words: Iterable[str], typed: Mapping[str, Any]) -> None:
    """UserError if one of --set's `words` sets what was `typed` as an option of its own, too."""
    for name in (word.partition("=")[0] for word in words):
        if typed.get(name):
            option = name.replace("_", "-")
            raise UserError(f"{name} is given twice, by --{option} and by --set; leave one out")


def kept_shares(recipe: str, kept: Sequence[float] | None, sets: int) -> tuple[float, ...] | None:
    """The shares that the file `recipe` has `kept`, if it has; UserError unless they are of as many
    `sets`.
    """
    if kept and len(kept) != sets:
        raise UserError(
            f"{recipe} mixes {len(kept)} sets by shares and {sets} are named; name as many, give "
            "them shares as A:0.7 B:0.3, or take shares out of it"
        )
    return tuple(kept) if kept else None


def take_shares(words: Sequence[str]) -> tuple[list[str], tuple[float, ...] | None]:
    """(folders, their shares if they have any) of what is typed as FOLDER or FOLDER:SHARE.

    Raises UserError if some have one and some have none. A folder may end as if it had one.
    """
    folders, shares = [], []
    for word in words:
        there = Path(word).exists()
        found = None if there else SHARE.fullmatch(word)
        place, _, share = word.rpartition(":")
        typed = place and not share.startswith("/") and Path(place).exists()  # s3:// has slashes
        if typed and not there and not found:
            raise UserError(f"{word}: {share!r} is no share; give a number, as {place}:0.5")
        folders.append(found[1] if found else word)
        shares += [float(found[2])] if found else []
    if shares and len(shares) < len(words):
        raise UserError(
            f"{len(shares)} of {len(words)} sets have a share: give every set one, as "
            f"{folders[0]}:1 {folders[1]}:2, or none, and each image is shown as often as any other"
        )
    return folders, tuple(shares) or None


def check_wandb(project: str) -> None:
    """UserError if a `project` is named and the package is not there."""
    if project and find_spec("wandb") is None:
        raise UserError("--wandb needs the package; type: pip install wandb")


def count_classes(sets: dict[str, "ShardSet"]) -> int:
    """The number of classes of `sets`, by folder or URL.

    Raises UserError unless all have the same two or more classes, and every label is one of them.
    """
    known: list[str] | None = None
    for where, records in sets.items():
        classes = records.manifest.classes
        if len(classes) < 2:
            raise UserError(f"{where} has {len(classes)} classes; a probe needs two or more")
        labels = records.index["label"]
        outside = labels[(labels < 0) | (labels >= len(classes))]
        if len(outside):
            raise UserError(
                f"{where}: label {int(outside[0])} is none of its {len(classes)} classes"
            )
        if known not in (None, classes):
            raise UserError(f"{' and '.join(sets)} have different classes")
        known = classes
    return len(known or ())


def compiler_missing() -> str:
    """What to type where torch.compile cannot build its launchers: they are C, for this Python."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = (Path(sysconfig.get_path("include")) / "Python.h").is_file()
    packages = [name for name, there in (("gcc", compiler), ("python3-dev", headers)) if not there]
    return f"apt-get install {' '.join(packages)}" if packages else ""


def check_encoders(encoders: list[str]) -> None:
    """UserError if one of `encoders` is neither a file, a run nor a name."""
    for encoder in encoders:
        kind, _, name = encoder.partition(":")
        if kind not in NAMED:
            file_of(encoder)
        elif not name:
            raise UserError(f"{encoder!r} names no model; give {kind}:vit_base_patch16_224, say")


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by their steps, without copies that somebody keeps there."""
    return sorted(path for path in folder.glob("step-*.pt") if path.stem[5:].isdigit())


def file_of(encoder: str) -> Path:
    """The file of an encoder: a run's newest checkpoint, or the tensors in a folder for
    from_pretrained. Raises UserError if there is none.
    """
    path = Path(encoder)
    if path.is_dir():
        published = [path / name for name in HUGGING_FACE if (path / name).is_file()]
        found = published[:1] or checkpoints_in(path / "checkpoints")
        if not found:
            raise UserError(f"{encoder} holds no checkpoint; train first with `kamim pretrain`")
        return found[-1]
    if not path.is_file():
        raise UserError(f"{encoder} is no file, run folder, timm:NAME or random:NAME")
    return path
