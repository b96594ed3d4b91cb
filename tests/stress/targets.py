"""Every parser of sets as a function of hostile bytes, for a coverage-guided fuzzer.

`python -m stress.targets NAME SET FOLDER [libFuzzer's options]`: a small set to make seeds from and
a folder to write into in, a fuzzer's exit status out: 0 if nothing but ValueError and Rejected, the
answers that the parsers promise, came out.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

FUZZER = importlib.util.find_spec("atheris") is not None


@contextmanager
def _instrumented() -> Any:
    """Imports within are watched for coverage, where the fuzzer is installed and running."""
    if FUZZER and __name__ == "__main__":
        import atheris

        with atheris.instrument_imports(include=["shards", "preprocess", "tarfile", "json"]):
            yield
    else:
        with nullcontext():
            yield


with _instrumented():
    from preprocess import Rejected
    from shards import File, Ledger, Manifest, ShardSet, decode_frame, spec
    from shards.beton import BETON, PAGE, beton_format, check_tables, convert_to_ffcv
    from shards.files import MANIFEST
    from shards.loader import Loader
    from shards.order import Plan
    from shards.record import JPEG, LABEL, META, RAW, from_members
    from shards.spec import INDEX, REJECTED
    from shards.tar import INDEX_DTYPE, parse_record
    from shards.verification import verify_shards
    from stress import source_targets
    from stress.source_targets import packed, unpacked

ROW = INDEX_DTYPE.itemsize
SUFFIXES = (JPEG, META, "fast.density.npy", LABEL, RAW)
Target = Callable[[Path, Manifest, bytes], None]


def record(folder: Path, manifest: Manifest, data: bytes) -> None:
    """A record's slice of a tar."""
    decode_frame(parse_record(data).frame)


def members(folder: Path, manifest: Manifest, data: bytes) -> None:
    """A record's members, without tar headers, whose checksums keep a fuzzer out."""
    parts = dict(zip(SUFFIXES, unpacked(data, 5), strict=False))
    decode_frame(from_members("000000001", parts).frame)


def manifest_(folder: Path, manifest: Manifest, data: bytes) -> None:
    """A manifest as it stands, then with its checksum and layout made right."""
    path = folder / MANIFEST
    path.write_bytes(data)
    with suppress(ValueError):
        spec.load(folder)
    import json

    content = json.loads(data)
    if isinstance(content, dict):
        content.pop("checksum", None)
        content["checksum"] = spec.fingerprint(content)
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        path.write_bytes(text.encode("ascii"))
    loaded = spec.load(folder)
    (folder / INDEX).write_bytes(b"")
    verify_shards(folder)
    _ = loaded.count, loaded.detectors, loaded.ledger.rejected_share


def tar(folder: Path, manifest: Manifest, data: bytes) -> None:
    """A set whose manifest, and so its hashes, were made by who made the damage."""
    rows, shard = [*unpacked(data, 2), b"", b""][:2]
    made = _claim(folder, manifest, rows, shard, "shard-000000.tar")
    verify_shards(folder, "decode")
    records = ShardSet(folder)
    for number in range(len(records)):
        with suppress(ValueError):
            decode_frame(records[number].frame)
    for bank in (False, True):
        order = Plan(len(records), 2, in_order=True)
        try:
            names = records.manifest.detectors
            options = {"maps": names, "bank": bank, "workers": 1, "prefetch": 1}
            for _ in Loader(records, order, 0, order.steps(), **options):
                pass
        except ValueError:
            pass
    assert made == records.manifest


def beton(folder: Path, manifest: Manifest, data: bytes) -> None:
    """An FFCV set of the same kind: index, head, a page of data and the table of regions."""
    rows, head, page, tail = [*unpacked(data, 4), *[b""] * 4][:4]
    path = folder / BETON
    with path.open("wb") as file:
        for at, part in ((0, head), (PAGE, page), (2 * PAGE, tail)):
            file.seek(at)
            file.write(part)
    made = _claim(folder, replace(manifest, container="ffcv"), rows, None, BETON)
    records = ShardSet(folder)
    check_tables(path, records.index, beton_format(made.settings))
    for number in range(len(records)):
        decode_frame(records[number].frame)


def _claim(
    folder: Path, manifest: Manifest, rows: bytes, shard: bytes | None, name: str
) -> Manifest:
    """Write a set that is as its own manifest says; `rows` are bytes of the index."""
    import hashlib

    import numpy as np

    from shards.record import npy_bytes

    count = max(1, min(8, len(rows) // ROW))
    index = np.frombuffer(rows.ljust(count * ROW, b"\0")[: count * ROW], INDEX_DTYPE)
    if shard is not None:
        (folder / name).write_bytes(shard)
    size = (folder / name).stat().st_size
    digest = hashlib.sha256(shard or b"").hexdigest()
    made = replace(
        manifest,
        ledger=Ledger(count, count, {}),
        shards=[File(name, count, size, digest)],
        index=spec.write_file(folder / INDEX, npy_bytes(index), count),
        rejected=spec.write_file(folder / REJECTED, b"", 0),
    )
    spec.write(folder, made)
    return made


TARGETS: dict[str, Target] = {
    "record": record,
    "members": members,
    "manifest": manifest_,
    "tar": tar,
    "beton": beton,
    **source_targets.TARGETS,
}


def seeds(name: str, built: Path, scratch: Path) -> list[bytes]:
    """Real files of the set `built` as inputs of a target."""
    if name in source_targets.TARGETS:
        return source_targets.seeds(name, built, scratch)
    records = ShardSet(built)
    shard = (built / records.shards[0].name).read_bytes()
    count = records.shards[0].count
    rows = records.index[:count].tobytes()
    slices = [shard[int(r["start"]) :][: int(r["bytes"])] for r in records.index[:count]]
    if name == "record":
        return slices
    if name == "members":
        from shards.record import members as of

        return [packed([part for _, part in of(records[n])]) for n in range(count)]
    if name == "manifest":
        return [(built / MANIFEST).read_bytes()]
    if name == "tar":
        return [packed([rows, shard]), packed([rows[:ROW], slices[0] + bytes(1024)])]
    convert_to_ffcv(built, scratch / "ffcv")
    copy = ShardSet(scratch / "ffcv")
    data = (scratch / "ffcv" / BETON).read_bytes()
    return [packed([copy.index.tobytes(), data[:6000], data[PAGE : PAGE + 30_000], data[-800:]])]


def main() -> None:
    """One target under the fuzzer; does not return."""
    import atheris

    name, built, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    manifest = spec.load(built)

    def once(data: bytes) -> None:
        with suppress(ValueError, Rejected):
            TARGETS[name](folder, manifest, data)

    atheris.Setup([sys.argv[0], *sys.argv[4:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
