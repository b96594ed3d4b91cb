"""The contract between building and training: records, manifest, shards. Imports no other room.

In: a folder that a build wrote. Out: `ShardSet`, its records and its manifest, without torch.
What a name needs is imported when it is asked for: a command line answers before NumPy is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.bank import Bank
    from shards.dataset import ShardSet
    from shards.record import Record, decode_frame, encode_frame
    from shards.remote.streaming import open_remote
    from shards.report import inspect_page
    from shards.spec import FORMAT_VERSION, Detector, File, Ledger, Manifest, Settings, load
    from shards.tar import ShardWriter
    from shards.verify import LEVELS, verify_shards

_HOMES = {
    "bank": ["Bank"],
    "report": ["inspect_page"],
    "spec": ["FORMAT_VERSION", "Detector", "File", "Ledger", "Manifest", "Settings", "load"],
    "dataset": ["ShardSet"],
    "record": ["Record", "decode_frame", "encode_frame"],
    "remote.streaming": ["open_remote"],
    "verify": ["LEVELS", "verify_shards"],
    "tar": ["ShardWriter"],
}

__all__ = [
    "FORMAT_VERSION",
    "LEVELS",
    "Bank",
    "Detector",
    "File",
    "Ledger",
    "Manifest",
    "Record",
    "Settings",
    "ShardSet",
    "ShardWriter",
    "decode_frame",
    "encode_frame",
    "inspect_page",
    "load",
    "open_remote",
    "verify_shards",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"shards.{home}"), name)
            return value
    raise AttributeError(f"module 'shards' has no attribute {name!r}")
