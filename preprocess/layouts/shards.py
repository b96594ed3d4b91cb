"""A finished set of our own shards as a source: its frames are the images.

Sources need not be kept to make shards with other settings; to add detectors to frames as they are,
--reuse is exact.
"""

import json
import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from preprocess.decode import Rejected
from preprocess.files import version_of
from preprocess.source import Entry, Source
from shards import ShardSet
from shards.errors import UserError
from shards.files import MANIFEST
from shards.record import decode_frame, key_of
from shards.remote.storage import is_url
from shards.tar import padded
from shards.verification import damaged_files

BLOCK = tarfile.BLOCKSIZE


def list_shards(where: str, split: str) -> Source | None:
    """Records in their order. Raises UserError if the set is not finished, not whole or not here.

    Every file is hashed: what is damaged would be hashed anew, as if it were sound.
    """
    if is_url(where):
        raise UserError(f"{where} is remote; copy it here first: kamim shards copy {where} FOLDER")
    records = _opened(where)
    if records.manifest.container == "maps":
        raise UserError(
            f"{where} holds densities without frames, and no images; name a source of them"
        )
    damage = damaged_files(records.folder, records.manifest)
    if damage:
        raise UserError(damage[0])
    names = _names(records) if records.manifest.container == "webdataset" else None
    entries = []
    # Frame, maps and bank of a record hang on the whole set: its fingerprint is the stamp.
    stamp = int(records.manifest.fingerprint[:12], 16)
    for number, row in enumerate(records.index):
        name = next(names) if names else key_of(int(row["key"]))
        entries.append(Entry(name, int(row["label"]), int(row["frame_bytes"]), number, stamp))
    return Source("shards", where, entries, records.manifest.classes)


def _names(records: ShardSet) -> Iterator[str]:
    """What each record's JSON, between its frame and its arrays, calls its source."""
    first = 0
    for shard, end in zip(records.shards, records.ends.tolist(), strict=True):
        with open(os.path.join(records.folder, shard.name), "rb") as file:
            for row in records.index[first:end]:
                start = padded(int(row["frame"]) + int(row["frame_bytes"]))
                data = os.pread(file.fileno(), int(row["arrays"]) - start, start)
                try:
                    head = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
                    yield str(json.loads(data[BLOCK : BLOCK + head.size])["source"])
                except (tarfile.HeaderError, ValueError, KeyError, TypeError, RecursionError):
                    key = key_of(int(row["key"]))
                    raise UserError(f"{file.name}: record {key} is damaged") from None
        first = end


def image(root: str, entry: Entry) -> bytes:
    """The frame of the record: its JPEG file, or its pixels as a PPM picture."""
    try:
        frame = _opened(root)[entry.offset].frame
    except (ValueError, IndexError) as error:
        raise Rejected("changed", str(error)) from None
    except OSError as error:
        raise Rejected("unreadable", str(error)) from None
    if frame.startswith(b"\xff\xd8"):
        return frame
    pixels = np.ascontiguousarray(decode_frame(frame))
    return f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode("ascii") + pixels.tobytes()


def _opened(where: str) -> ShardSet:
    path = os.path.join(where, MANIFEST)
    return _kept_open(where, version_of(path) if os.path.exists(path) else ())


@lru_cache(maxsize=2)
def _kept_open(where: str, version: tuple[int, ...]) -> ShardSet:
    return ShardSet(where)
