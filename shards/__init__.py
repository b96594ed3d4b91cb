"""The contract between building and training: records, manifest, shards. Imports no other room.

In: a folder that a build wrote. Out: `ShardSet`, its records and its manifest, without torch.
What a name needs is imported when it is asked for: a command line answers before NumPy is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.bank import Bank
    from shards.inspect import inspect_page
    from shards.manifest import FORMAT_VERSION, Detector, File, Ledger, Manifest, Settings, load
    from shards.reader import ShardSet
    from shards.record import Record, decode_frame, encode_frame
    from shards.streaming import open_remote
    from shards.verify import LEVELS, verify_shards
    from shards.webdataset import ShardWriter

_HOMES = {
    "bank": ["Bank"],
    "inspect": ["inspect_page"],
    "manifest": ["FORMAT_VERSION", "Detector", "File", "Ledger", "Manifest", "Settings", "load"],
    "reader": ["ShardSet"],
    "record": ["Record", "decode_frame", "encode_frame"],
    "streaming": ["open_remote"],
    "verify": ["LEVELS", "verify_shards"],
    "webdataset": ["ShardWriter"],
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
