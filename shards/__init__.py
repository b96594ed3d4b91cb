"""Shards of frames and keypoint densities: the library between building and training.

    records = shards.open("data/demo-fast")
    for batch in records.batches(size=192, batch=64, epochs=2, weights="fast", temperature=0.25):
        batch.images, batch.weights

`open` gives a ShardSet, or ShardSets for several places. Both load batches, datasets and records.
WeightedCrops turns batches into crops and loss weights. A Plan says which samples and crops each
step shows. `build` and `verify` write and check sets. A name's module is imported when the name is
first used, so torch is imported only for tensors.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from shards.dataset import ShardSet
    from shards.dataset import open_set as open
    from shards.device import to_device
    from shards.errors import UserError
    from shards.loader import Batch
    from shards.mixture import Mixture
    from shards.order import Plan, Windows
    from shards.record import Bank, Record, decode_frame, encode_frame
    from shards.report import inspect_page
    from shards.sets import ShardSets
    from shards.spec import Detector, File, Ledger, Manifest, Settings, load
    from shards.tar import ShardWriter
    from shards.torchdata import PlanSampler, RecordDataset
    from shards.verification import LEVELS
    from shards.verification import verify_shards as verify
    from shards.weighting import Crops, WeightedCrops, crop_frames, draw_crops

# Each public name, by the module that has it; `name=theirs` where it is called otherwise there.
_HOMES = {
    "dataset": "ShardSet open=open_set",
    "device": "to_device",
    "errors": "UserError",
    "loader": "Batch",
    "mixture": "Mixture",
    "order": "Plan Windows",
    "record": "Bank Record decode_frame encode_frame",
    "report": "inspect_page",
    "sets": "ShardSets",
    "spec": "Detector File Ledger Manifest Settings load",
    "tar": "ShardWriter",
    "torchdata": "PlanSampler RecordDataset",
    "verification": "LEVELS verify=verify_shards",
    "weighting": "Crops WeightedCrops crop_frames draw_crops",
}
_WHERE = {
    name: (f"shards.{home}", theirs or name)
    for home, names in _HOMES.items()
    for name, _, theirs in (each.partition("=") for each in names.split())
}

__all__ = [
    "LEVELS",
    "Bank",
    "Batch",
    "Crops",
    "Detector",
    "File",
    "Ledger",
    "Manifest",
    "Mixture",
    "Plan",
    "PlanSampler",
    "Record",
    "RecordDataset",
    "Settings",
    "ShardSet",
    "ShardSets",
    "ShardWriter",
    "UserError",
    "WeightedCrops",
    "Windows",
    "build",
    "crop_frames",
    "decode_frame",
    "draw_crops",
    "encode_frame",
    "inspect_page",
    "load",
    "open",
    "to_device",
    "verify",
]


def build(
    source: "str | Path",
    out: "str | Path",
    detectors: "str | Sequence[str]" = ("fast",),
    **options: Any,
) -> "Manifest":
    """Build shards of `source` in the folder or URL `out`, or finish a build of them.

    source: a folder, tar or URL of class folders, or a dataset as NAME or NAME:PATH. options: the
    fields of Settings, and split, jobs, on_error, max_rejected, reuse, backend, scheduler of
    preprocess.build. Returns the manifest. Raises UserError if the request is wrong, and
    preprocess.BuildError if the build does not finish. The command is `kamim shards build`.
    """
    # The only import of preprocess here, when it is used.
    manifest: Manifest = import_module("preprocess").build(source, out, detectors, **options)
    return manifest


if not TYPE_CHECKING:  # so that a type checker knows which names there are

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'shards' has no attribute {name!r}")
        home, theirs = _WHERE[name]
        value = globals()[name] = getattr(import_module(home), theirs)
        return value
