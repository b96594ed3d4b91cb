"""The README.md of a set: what it holds and how to load it, below the YAML head that Hubs read.

It says what the manifest says, and depends on nothing else.
"""

from pathlib import Path

from shards.files import write_atomically
from shards.record import COUNTS, DENSITY, WEIGHTS, Array, arrays_of
from shards.spec import CARD, Manifest, Settings

# The Hub's words for numbers of records, each below the number beside it.
SIZES = {
    1_000: "n<1K",
    10_000: "1K<n<10K",
    100_000: "10K<n<100K",
    1_000_000: "100K<n<1M",
    10_000_000: "1M<n<10M",
    100_000_000: "10M<n<100M",
    1_000_000_000: "100M<n<1B",
}

TEXT = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: shard-*.tar
size_categories:
- {size}
tags:
- webdataset
- image
- kamim
---
# Images with keypoint densities

{count:,} images of {classes:,} classes in {shards:,} WebDataset shards, squeezed to squares of
{frame} px ({coding}), each with the density of its keypoints. Format version {version};
manifest.json has all settings, versions and checksums.

| member | content |
|---|---|
{members}

Coordinates are those of the unit square: cell (r, c) of a G x G map covers [r / G, (r + 1) / G] x
[c / G, (c + 1) / G] of the image, from its top left corner. Density is the share of an area's
pixels that keypoint marks cover, 0 to 1.

```python
import datasets, shards, webdataset

datasets.load_dataset("FOLDER OR HUB NAME", split="train", streaming=True)
webdataset.WebDataset("FOLDER/shard-000000.tar", shardshuffle=False).decode("rgb8")
shards.open("FOLDER").batches(size={crop}, weights="{detector}")  # random crops, loss weights
```
"""


BARE = """---
size_categories:
- {size}
tags:
- image
- kamim
---
# Keypoint densities without frames

Densities of {count:,} images that stay where they are, in {shards:,} .npy files of uint8
[images, {detectors}, {grid}, {grid}], density = value / 255, one behind the other for {names}.
names.jsonl has the images' names in their order, index.npy sizes and labels, keys.npy where a name
is. Format version {version}; manifest.json has all settings, versions and checksums.

```python
import shards

shards.open("FOLDER").density("NAME", "{detector}")  # uint8 [{grid}, {grid}]
```
"""


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write the card of a set into `folder`, unless there is a README.md of somebody's."""
    if not (folder / CARD).exists():
        write_atomically(folder / CARD, card(manifest).encode("ascii"))


def card(manifest: Manifest) -> str:
    """The card of a WebDataset set, or of one without frames, ASCII."""
    settings = manifest.settings
    size = next((word for n, word in SIZES.items() if manifest.count < n), "n>1B")
    if settings.frame == 0:
        return BARE.format(
            size=size,
            count=manifest.count,
            shards=len(manifest.shards),
            detectors=len(settings.detectors),
            grid=settings.grid,
            names=", ".join(manifest.detectors),
            version=manifest.format_version,
            detector=manifest.detectors[0],
        )
    return TEXT.format(
        size=size,
        count=manifest.count,
        classes=len(manifest.classes),
        shards=len(manifest.shards),
        frame=settings.frame,
        coding=f"JPEG quality {settings.quality}, 4:2:0" if settings.quality else "raw",
        version=manifest.format_version,
        members="\n".join(_lines(settings)),
        crop=settings.crop,
        detector=manifest.detectors[0],
    )


def _lines(settings: Settings) -> list[str]:
    """A row of the table for each member of a record."""
    frame = "jpg" if settings.quality else "frame.npy"
    meta = "the source's height and width in px, its name"
    meta += f"; boxes and flips of {settings.bank} stored crops" if settings.bank else ""
    rows = {frame: "the image, RGB", "json": meta}
    for array in arrays_of(settings):
        shape = f"{array.dtype.name} [{', '.join(map(str, array.shape))}]"
        rows[f"{array.name}.npy"] = f"{shape}: {_meaning(array, settings)}"
    rows["cls"] = "the label, -1 for none"
    return [f"| {name} | {text} |" for name, text in rows.items()]


def _meaning(array: Array, settings: Settings) -> str:
    temperature, w_ps = settings.weights or (0.0, 0)
    of_what = "each stored crop" if settings.bank else "the whole image"
    return {
        DENSITY: "density = value / 255 on the whole image",
        COUNTS: "density = value / 64 on each stored crop",
        WEIGHTS: f"loss weight = value / 256 on {of_what}, T {temperature:g}, w_ps {w_ps}",
    }[array.kind]
