"""Every loader that is compared, as a function: how many images to load in, images per second out.

Rates begin when every worker has given its first batch, so that starting them and filling queues
counts for nobody; they end with the last batch, so that stopping them does not either.
"""

import io
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kamim.bench.online import MEAN, SIZE, STD, Optimised, Published
from preprocess.source import Source
from shards import Plan, ShardSet

BATCH = 128
LITDATA_COPIES = 4  # it counts epochs, and a copy of the photographs is over too soon
Rate = Callable[[int], float]

# As torchvision's own examples load a folder, with the published crop.
USUAL = v2.Compose(
    [
        v2.RandomResizedCrop(SIZE, scale=(0.67, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
)


def timed(batches: Iterable[Any], skip: int = 1) -> float:
    """Images per second of `batches` once `skip` of them have come, until the last has; a batch's
    length is its first array's.
    """
    count, begin, end = 0, 0.0, 0.0
    for number, batch in enumerate(batches):
        if number + 1 < skip:
            continue
        end = time.perf_counter()
        if begin:
            count += len(batch[0])
        else:
            begin = end
    return count / (end - begin) if count else 0.0


def _workers(cores: int) -> dict[str, Any]:
    """Forked, whatever a library has made the default: a spawned worker imports torch first, and
    would still be doing so while it is measured.
    """
    return {"num_workers": cores, "prefetch_factor": 2, "multiprocessing_context": "fork"}


def by_processes(dataset: Any, cores: int, batch: int = BATCH) -> Rate:
    """A DataLoader with a process per core over `dataset`, as often as it takes."""

    def rate(images: int) -> float:
        rounds = max(1, -(-(images + 2 * cores * batch) // len(dataset)))
        order = torch.randperm(rounds * len(dataset)) % len(dataset)
        loader = torch.utils.data.DataLoader(
            dataset, batch, sampler=order.tolist(), drop_last=True, **_workers(cores)
        )
        return timed(loader, skip=2 * cores)

    return rate


def offline(records: ShardSet, detector: str | None) -> Rate:
    """Our loader from WebDataset shards."""

    def rate(images: int) -> float:
        plan, ahead = Plan(len(records), BATCH), 3
        steps = max(2 * ahead, images // BATCH)
        wanted = [detector] if detector else []
        loader = records.loader(plan, 0, steps, maps=wanted, prefetch=ahead)
        return timed((b.frames, b.maps) for b in loader)

    return rate


def offline_ffcv(records: ShardSet, detector: str | None, images: int) -> Rate:
    """Our loader from an FFCV set. What FFCV compiled is kept, so `images` is fixed beforehand."""
    plan = Plan(len(records), BATCH)
    wanted = [detector] if detector else []
    loader = records.loader(plan, 0, images // BATCH, maps=wanted)
    return lambda _: timed((b.frames, b.maps) for b in loader)


def image_folder(folder: Path, cores: int) -> Rate:
    """torchvision's ImageFolder with its usual transforms and no weights."""
    return by_processes(ImageFolder(folder, USUAL), cores)


def stock_webdataset(records: ShardSet, cores: int) -> Rate:
    """The webdataset library on our tars, decoding by Pillow, cropping by torchvision."""
    import webdataset as wds

    urls = [str(records.folder / shard.name) for shard in records.shards]

    def rate(images: int) -> float:
        stream = wds.WebDataset(urls, resampled=True, shardshuffle=False)
        used = stream.decode("pil", only=["jpg", "cls"])  # a user's own tars have no maps
        items = used.to_tuple("jpg", "cls").map_tuple(USUAL, int)
        loader = torch.utils.data.DataLoader(items, BATCH, drop_last=True, **_workers(cores))
        return timed(islice(loader, 2 * cores + max(3, images // BATCH)), skip=2 * cores)

    return rate


def litdata_stream(source: Source, folder: Path, cores: int) -> Rate:
    """litdata's optimized chunks of the photographs, decoded by Pillow, cropped by torchvision."""
    import litdata

    often = list(range(len(source.entries))) * LITDATA_COPIES
    stdout = os.dup(1)  # it and its workers write to it; ours is for results
    os.dup2(2, 1)
    try:
        litdata.optimize(
            partial(_litdata_item, source), often, str(folder), chunk_bytes="64MB", num_workers=1
        )
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)

    def rate(images: int) -> float:
        loader = litdata.StreamingDataLoader(
            litdata.StreamingDataset(str(folder), shuffle=True, transform=_litdata_picture),
            batch_size=BATCH,
            **_workers(cores),
        )
        return timed(islice(loader, 2 * cores + max(3, images // BATCH)), skip=2 * cores)

    return rate


def _litdata_item(source: Source, number: int) -> dict[str, Any]:
    entry = source.entries[number]
    return {"image": source.read(entry), "label": entry.label}


def _litdata_picture(item: dict[str, Any], *_: Any) -> tuple[torch.Tensor, int]:
    return USUAL(Image.open(io.BytesIO(item["image"])).convert("RGB")), item["label"]


def ceiling(work: Callable[[int], None], count: int, cores: int) -> Rate:
    """`work` on numbers 0 to `count` - 1, over and over, by a thread per core and nothing else."""

    def rate(images: int) -> float:
        chunks = [range(at, min(at + BATCH, images)) for at in range(0, images, BATCH)]

        def run(chunk: range) -> None:
            for number in chunk:
                work(number % count)

        begin = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(run, chunks))
        return images / (time.perf_counter() - begin)

    return rate


def ceilings(source: Source, records: ShardSet, cores: int) -> dict[str, Rate]:
    """What no loader can beat: reading, decoding or copying the same images and nothing else."""
    count, side = len(records), records.manifest.settings.frame
    frames = [records[number].frame for number in range(count)]
    index = records.index
    files = {each.name: os.open(records.folder / each.name, os.O_RDONLY) for each in records.shards}
    tars = [files[records.locate(number)[0].name] for number in range(count)]
    places = list(zip(tars, index["start"].tolist(), index["bytes"].tolist(), strict=True))
    photos = [source.read(entry) for entry in source.entries]
    still = np.full((min(count, 512), side, side, 3), 7, np.uint8)  # larger than any cache
    room = np.empty((BATCH, side, side, 3), np.uint8)

    def decode(number: int) -> None:
        simplejpeg.decode_jpeg(frames[number], "RGB", buffer=room[number % BATCH])

    def pillow(number: int) -> None:
        Image.open(io.BytesIO(photos[number])).convert("RGB")

    def pread(number: int) -> None:
        descriptor, start, size = places[number]
        os.pread(descriptor, size, start)

    def copy(number: int) -> None:
        np.copyto(room[number % BATCH], still[number % len(still)])

    works = {
        "read only": (pread, count),
        "decode only, frames": (decode, count),
        "decode only, photographs by Pillow": (pillow, len(photos)),
        "copy only, raw frames": (copy, count),
    }
    return {name: ceiling(*work, cores) for name, work in works.items()}


def online(source: Source, records: ShardSet, detectors: list[str], cores: int) -> dict[str, Rate]:
    """Published and optimised online detection, and the steps of the chain between them and us."""
    published = partial(Published, source)
    rates: dict[str, Rate] = {}
    for name in (*detectors, None):
        rates[f"online, published: {name}"] = by_processes(published(name), cores)
        rates[f"online, optimised: {name}"] = by_processes(Optimised(records, name), cores)
    first = detectors[0]
    chain = {
        f"published, marks by dilation: {first}": published(first, drawing=False),
        "published, from frames: None": published(None, frames=records),
        "published, from frames, no crop: None": published(None, frames=records, cropping=False),
    }
    return rates | {name: by_processes(dataset, cores) for name, dataset in chain.items()}
