"""The contract between building and training: records, manifest, shards. Imports no other room.

In: a folder that a build wrote. Out: `ShardSet`, its records and its manifest, without torch.
"""

from shards.bank import Bank
from shards.inspect import inspect_page
from shards.manifest import FORMAT_VERSION, Detector, File, Ledger, Manifest, Settings, load
from shards.reader import ShardSet
from shards.record import Record, decode_frame, encode_frame
from shards.streaming import open_remote
from shards.verify import LEVELS, verify_shards
from shards.webdataset import ShardWriter

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
