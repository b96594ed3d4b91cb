"""`kamim shards convert`, `upgrade`, `copy`: a finished set in another container, format or place.
`join`: one set of its parts.
"""

import os
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from preprocess.build_cli import print_result, print_set, within
from preprocess.cli import app
from preprocess.options import Folder, Json, MaxRejected
from shards.progress import counted


@app.command(short_help="Convert a finished set to FFCV, and verify every record.")
def convert(
    folder: Folder,
    to: Annotated[Literal["ffcv"], Option(help="The container to write.")] = "ffcv",
    out: Annotated[
        Path | None,
        Option(
            metavar="FOLDER", help="Destination folder; FOLDER-ffcv or FOLDER-ffcv-raw by default."
        ),
    ] = None,
    frames: Annotated[
        Literal["jpeg", "raw"], Option(help="Copy the JPEG bytes, or store raw pixels.")
    ] = "jpeg",
    json_output: Json = False,
) -> None:
    """Convert a finished WebDataset set to FFCV, and verify every record.

    This does not need FFCV; training on the result does.
    """
    from shards.beton import convert_to_ffcv

    suffix = f"-{to}" + ("-raw" if frames == "raw" else "")
    whole = Path(os.path.abspath(folder))
    beside = whole if folder.name in ("", "..") else folder  # `.` and `..` have no name
    target = out or beside.with_name(whole.name + suffix)
    manifest = convert_to_ffcv(folder, target, frames)
    count, size = manifest.count, manifest.shards[0].bytes
    facts = {"out": str(target), "fingerprint": manifest.fingerprint}
    line = f"{target}: {counted(count, 'record')}, {size / 1e6:.1f} MB"
    print_result(json_output, {**facts, "records": count, "bytes": size}, line)


@app.command(short_help="Convert a set of format version 2 to the present format.")
def upgrade(
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="Folder of a finished set of format version 2.")
    ],
    out: Annotated[
        Path, Argument(metavar="OUT", help="Destination folder for the set in the present format.")
    ],
    json_output: Json = False,
) -> None:
    """Convert a set of format version 2 to the present format, without its source.

    Every file is hashed first, and every record compared afterwards. Frames keep their bytes.
    """
    from shards.version2 import upgrade_set

    manifest = upgrade_set(folder, out)
    facts = {"out": str(out), "fingerprint": manifest.fingerprint, "records": manifest.count}
    line = f"{out}: {counted(manifest.count, 'record')} in format version {manifest.format_version}"
    print_result(json_output, facts, line)


@app.command(short_help="Copy a finished set between folders and stores.")
def copy(
    source: Annotated[str, Argument(metavar="SOURCE", help="A finished set: its folder or URL.")],
    target: Annotated[str, Argument(metavar="TARGET", help="Destination folder or URL.")],
    jobs: Annotated[int, Option(metavar="N", help="Files copied at a time.")] = 4,
    json_output: Json = False,
) -> None:
    """Copy a finished set between folders and s3://, gs://, hf://; also from https://.

    Each file is checked by the sha256 in the manifest, and the manifest is written last. If the
    copy is stopped or killed, the same command copies only what is missing.
    """
    from shards.remote.copy import copy_set

    manifest, copied = copy_set(source, target, within("--jobs", jobs, 1))
    facts = {"out": target, "fingerprint": manifest.fingerprint, "copied": copied}
    line = f"{target}: {counted(manifest.count, 'record')}, {counted(copied, 'file')} copied"
    print_result(json_output, facts, line)


@app.command(short_help="Make one finished set of the parts of a build.")
def join(
    out: Annotated[
        str, Argument(metavar="OUT", help="Folder or URL that all parts were built into.")
    ],
    max_rejected: MaxRejected = 0.01,
    json_output: Json = False,
) -> None:
    """Make one finished set of the parts that `kamim shards build --part I/N` wrote into OUT.

    Every part is checked: the same inputs, settings and versions, all shards with their sizes, and
    a ledger that balances. A missing part is named, with the command that builds it. The set is
    byte for byte that of a single build. Parts of `kamim maps build` are joined, too.
    """
    from preprocess.parts import join_parts
    from shards.remote.place import Place

    place = Place.of(out)
    manifest = join_parts(place.where, within("--max-rejected", max_rejected, 0, 1))
    print_set(place, manifest, json_output)
