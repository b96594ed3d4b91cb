"""The commands on finished sets: `kamim shards verify`, `inspect`, `fidelity`, `convert` and so on.

In: what a user typed. Out: results on stdout, notes on stderr; UserError names a bad argument.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

import preprocess
import shards
from preprocess.cli import app
from preprocess.words import Json, at_least, between, print_json, say
from shards.errors import UserError
from shards.files import write_atomically
from shards.progress import waiting

Level = Literal["structure", "checksum", "decode", "redetect"]

Folder = Annotated[Path, typer.Argument(help="Folder of a finished set of shards.")]
Split = Annotated[str, typer.Option(help="The split of that source, as it was built.")]


@app.command()
def verify(
    folder: Folder,
    level: Annotated[
        Level, typer.Option(help="How deep; each level includes those before it.")
    ] = "checksum",
    source: Annotated[
        str | None, typer.Option(help="The source they were built from, for redetect.")
    ] = None,
    split: Split = "",
    samples: Annotated[int, typer.Option(help="Records that redetect compares.")] = 64,
    json_output: Json = False,
) -> None:
    """Check a finished set of shards; exit status 1 if anything is wrong.

    structure: manifest, ledger, sizes, index against tar headers. checksum: sha256 of every file.
    decode: every record. redetect: compute a sample's maps again and compare them bit for bit.
    """
    if not folder.exists():
        raise UserError(
            f"there is no {folder} to verify; build it first: kamim shards build SOURCE {folder}"
        )
    redetect = level == "redetect"
    problems = shards.verify(folder, shards.LEVELS[-1] if redetect else level)
    deep = redetect and not problems  # then no file is damaged
    if deep:
        records = shards.ShardSet(folder)
        if records.manifest.container != "webdataset":
            raise UserError(f"{folder} holds no source names; redetect the set it was made from")
        demo = records.manifest.source["kind"] == "demo"
        listed = _source_of(records, source, split) if source or demo else None
        problems = preprocess.redetect_maps(records, listed, at_least("--samples", samples, 1))
    if json_output:
        print_json({"folder": str(folder), "level": level, "problems": problems})
    elif not problems:
        count = shards.load(folder).count
        print(f"{folder}: {count} records are sound at level {level}")
    for problem in [] if json_output else problems[:20]:
        print(problem)
    if problems:
        number = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        mend = "" if deep else _mend(folder, problems)
        raise preprocess.BuildError(f"{folder} has {number} at level {level}{mend}")


def _mend(folder: Path, problems: list[str]) -> str:
    """What to do about the first file that a build writes, as the end of a sentence."""
    from shards.files import mending

    try:
        finished = shards.load(folder)
    except ValueError:  # which is the problem, and says itself what to do
        return ""
    for file in [*finished.shards, finished.index, finished.rejected]:
        path = folder / file.name
        if any(line.startswith(str(path)) for line in problems):
            return f", first in {file.name}; {mending(path)}"
    return ""


@app.command()
def inspect(
    folder: Folder,
    page: Annotated[
        Path | None, typer.Option(help="Where to write the page; FOLDER/inspect.html by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Frames to show.")] = 24,
    temperature: Annotated[float, typer.Option(help="T of the weights.")] = 0.25,
    w_ps: Annotated[int, typer.Option(help="Side of a weight cell of a crop, px.")] = 8,
    json_output: Json = False,
) -> None:
    """Write one HTML page: frames, densities, a crop with its weights, histograms, the ledger."""
    records = shards.ShardSet(folder)
    with waiting("drawing the page"):
        text = shards.inspect_page(records, temperature, w_ps, at_least("--samples", samples, 1))
    path = page or folder / "inspect.html"
    write_atomically(path, text.encode("utf-8"))
    if json_output:
        print_json({"folder": str(folder), "page": str(path), "records": len(records)})
    else:
        print(path)


@app.command()
def fidelity(
    folder: Folder,
    source: Annotated[
        str | None, typer.Option(help="The source they were built from; the demo's needs none.")
    ] = None,
    split: Split = "",
    samples: Annotated[int, typer.Option(help="Records to compare, one new crop each.")] = 1000,
    temperature: Annotated[float, typer.Option(help="T of the weights.")] = 0.25,
    w_ps: Annotated[int, typer.Option(help="Side of a weight cell, px.")] = 8,
    seed: Annotated[int, typer.Option(help="Decides the crops.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
    json_output: Json = False,
) -> None:
    """Measure densities read off maps and bank against detection on the crop itself.

    wrong is the share of an image's loss weight on the wrong cell. Beside them stand rulers:
    weights that ignore the image, detection on a crop 2 px aside or flipped, and torchvision's
    resize. The headline goes into the manifest, examples into FOLDER/fidelity.png.
    """
    records = shards.ShardSet(folder)
    listed = _source_of(records, source, split)
    at_least("--samples", samples, 1)
    between("--temperature", temperature, 0.001, 1000)
    found = preprocess.measure_fidelity(records, listed, samples, temperature, w_ps, seed, jobs)
    bytes_an_image = preprocess.storage(records)
    headline = {
        name: {what: errors[what] for what in ("map", "bank") if what in errors}
        for name, errors in found.items()
    }
    facts = {"temperature": temperature, "w_ps": w_ps, "seed": seed, "detectors": headline}
    shards.spec.write(folder, replace(records.manifest, fidelity=facts))
    picture = folder / "fidelity.png"
    with waiting("drawing examples"):
        preprocess.write_picture(picture, preprocess.draw_fidelity(records, listed))
    if json_output:
        print_json({"folder": str(folder), **facts, "detectors": found, "storage": bytes_an_image})
        return
    print(f"{'densities':18s}{'correlation':>12s}{'wrong':>8s}{'bias':>8s}{'equal':>8s}")
    for name, errors in found.items():
        for what, e in errors.items():
            line = f"{e['correlation']:12.3f}{e['wrong']:8.3f}{e['bias']:+8.2f}{e['equal']:8.3f}"
            print(f"{name + ' ' + what:18s}{line}")
    size = ", ".join(f"{key.removesuffix('_bytes')} {value:,}" for key, value in
                     bytes_an_image.items() if value and key not in ("bytes", "added"))  # fmt: skip
    print(f"bytes an image: {size}; in all {bytes_an_image['bytes']:,}, maps and bank add "
          f"{bytes_an_image['added']:.1%}")  # fmt: skip
    say(f"examples: {picture}")


def _source_of(records: "shards.ShardSet", where: str | None, split: str) -> "preprocess.Source":
    """The source named, or the demo's; UserError if there is none to go by."""
    kind = records.manifest.source["kind"]
    if where is None and kind != "demo":
        raise UserError(
            f"{records.folder} does not hold its source; give --source, what it was built from"
        )
    with waiting(f"listing {where or 'demo'}"):
        return preprocess.open_source(where or "demo", split, partial=True)  # as it was when built


@app.command()
def convert(
    folder: Folder,
    to: Annotated[Literal["ffcv"], typer.Option(help="The container to write.")] = "ffcv",
    out: Annotated[
        Path | None, typer.Option(help="Folder for the set; FOLDER-ffcv or FOLDER-ffcv-raw.")
    ] = None,
    frames: Annotated[
        Literal["jpeg", "raw"], typer.Option(help="Copy the JPEG bytes, or store pixels.")
    ] = "jpeg",
    json_output: Json = False,
) -> None:
    """Write a finished WebDataset set as an FFCV set, and verify it record by record.

    Needs no FFCV; training on the result does.
    """
    from shards.beton import convert_to_ffcv

    suffix = f"-{to}" + ("-raw" if frames == "raw" else "")
    target = out or folder.with_name(folder.name + suffix)
    manifest = convert_to_ffcv(folder, target, frames)
    if json_output:
        facts = {"out": str(target), "fingerprint": manifest.fingerprint}
        print_json({**facts, "records": manifest.count, "bytes": manifest.shards[0].bytes})
    else:
        print(f"{target}: {manifest.count} records, {manifest.shards[0].bytes / 1e6:.1f} MB")


@app.command()
def upgrade(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished set of format version 2.")],
    out: Annotated[Path, typer.Argument(help="Folder for the same set in the format of today.")],
    json_output: Json = False,
) -> None:
    """Write a set of format version 2 in the format of today, without its source.

    Every file is hashed before, and every record compared after: frames are the same bytes.
    """
    from shards.version2 import upgrade_set

    manifest = upgrade_set(folder, out)
    if json_output:
        facts = {"out": str(out), "fingerprint": manifest.fingerprint}
        print_json({**facts, "records": manifest.count})
    else:
        print(f"{out}: {manifest.count} records in format version {manifest.format_version}")


@app.command()
def copy(
    source: Annotated[str, typer.Argument(help="A finished set: its folder or URL.")],
    target: Annotated[str, typer.Argument(help="Destination folder or URL.")],
    jobs: Annotated[int, typer.Option(help="Files copied at a time.")] = 4,
    json_output: Json = False,
) -> None:
    """Copy a finished set of shards to or from s3://, gs://, hf:// or from https://.

    Each file is held to the sha256 in the manifest, which is written last. Stopped or killed, the
    same command copies only what is missing.
    """
    from shards.remote.copy import copy_set

    manifest, copied = copy_set(source, target, at_least("--jobs", jobs, 1))
    if json_output:
        print_json({"out": target, "fingerprint": manifest.fingerprint, "copied": copied})
    else:
        print(f"{target}: {manifest.count} records, {copied} files copied")
