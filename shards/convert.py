"""Finished WebDataset shards into an FFCV set: a folder in, a folder out, record by record.

The .beton appears only when it is whole and every record of it, read back, equals its source.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards import spec as _manifest
from shards.beton import BETON, layout_of, write_beton
from shards.dataset import ShardSet, sha256_of
from shards.files import LEFT, LOCK, alone, progress, temporary_of, waiting
from shards.record import decode_frame, npy_bytes
from shards.spec import EXTRAS, INDEX, MANIFEST, REJECTED, Manifest
from shards.verify import flaws_of_files


def convert_to_ffcv(folder: Path, out: Path, frames: str = "jpeg") -> Manifest:
    """Write the set in `folder` as an FFCV set into `out`; returns its manifest.

    frames: `jpeg` copies the JPEG bytes, `raw` stores pixels. A finished `out` of the same source
    is hashed, and left as it is if it is whole; what is damaged there, or was left by a killed
    conversion, is done again. Raises ValueError, naming shard and key, at a damaged record, and if
    `out` holds anything else.
    """
    source = ShardSet(folder)
    settings = source.manifest.settings
    if source.manifest.container != "webdataset":
        raise ValueError(f"{folder} is an FFCV set already; convert WebDataset shards")
    if frames == "jpeg" and settings.quality == 0:
        raise ValueError(f"{folder} holds raw frames; convert it with --frames raw")
    raw = frames == "raw"
    facts = {"from": source.manifest.fingerprint, "frames": frames, "container": "ffcv"}
    fingerprint = _manifest.fingerprint(facts)
    finished = _finished(out, fingerprint)
    if finished:
        if (out / LOCK).exists():  # killed between the manifest and the tidying up
            (out / LOCK).unlink(missing_ok=True)
        return finished
    manifest = replace(
        source.manifest,
        container="ffcv",
        settings=replace(settings, quality=0) if raw else settings,
        fingerprint=fingerprint,
    )
    temporary = temporary_of(out / BETON)
    with alone(out), ExitStack() as tidy:
        tidy.callback(temporary.unlink, missing_ok=True)
        records = progress("converting", len(source), map(source.__getitem__, range(len(source))))
        index = write_beton(temporary, records, len(source), layout_of(manifest))
        with waiting(f"hashing {BETON}"):
            size, digest = temporary.stat().st_size, sha256_of(temporary)
        rejected, rows = (folder / REJECTED).read_bytes(), source.manifest.rejected.count
        manifest = replace(
            manifest,
            shards=[_manifest.File(BETON, len(source), size, digest)],
            index=_manifest.write_file(out / INDEX, npy_bytes(index), len(index)),
            rejected=_manifest.write_file(out / REJECTED, rejected, rows),
        )
        temporary.replace(out / BETON)
        _compare(source, ShardSet(out, manifest), raw)
        _manifest.write(out, manifest)
    return manifest


def _finished(out: Path, fingerprint: str) -> Manifest | None:
    """The finished, whole conversion in `out`, None if one is to be written, else ValueError."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder for the FFCV set")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if MANIFEST in names:
        manifest = _manifest.load(out)
        if manifest.fingerprint != fingerprint:
            raise ValueError(f"{out} holds another set; name a new folder")
        flaws = flaws_of_files(out, [*manifest.shards, manifest.index, manifest.rejected])
        return None if flaws else manifest
    ours = {BETON, INDEX, REJECTED, MANIFEST, LOCK, *EXTRAS}
    others = {name for name in names if LEFT.sub("", name) not in ours}
    if others:
        raise ValueError(f"{out} holds something else ({min(others)}); name a new or empty folder")
    return None


def _compare(source: ShardSet, copy: ShardSet, raw: bool) -> None:
    for number in progress("verifying", len(source), range(len(source))):
        record, twin = source[number], copy[number]
        same = (
            np.array_equal(decode_frame(record.frame), decode_frame(twin.frame))
            if raw
            else record.frame == twin.frame
        )
        facts = ("key", "label", "height", "width")
        same = same and all(getattr(record, f) == getattr(twin, f) for f in facts)
        if record.bank and twin.bank:
            same = same and record.bank.equals(twin.bank)
        if not same or not np.array_equal(record.maps, twin.maps):
            raise ValueError(f"record {record.key} reads back otherwise; the disk may be at fault")
