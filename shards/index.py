"""Where records and their arrays lie: a set's index, loaded and checked, and its files, hashed."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.files import check_sha256, check_size, mending
from shards.progress import progress
from shards.record import Array, fields_of
from shards.spec import INDEX, File, Manifest
from shards.tar import INDEX_DTYPE
from shards.tar import places_of as places_in_tar

NEVER = 1e9  # seconds: of a bar that nobody shall see


def load_index(folder: Path, manifest: Manifest) -> NDArray[np.void]:
    """The set's index, INDEX_DTYPE [records], memory-mapped. Raises UserError if it is wrong.

    Its sha256 is checked first, 52 bytes per record, and that its places lie in their shards: every
    later read trusts it.
    """
    path, (_, arrays) = folder / INDEX, places_of(manifest)
    check_size(path, manifest.index.bytes)
    check_sha256(path, manifest.index.sha256)
    index = mapped(path)
    if index.dtype != INDEX_DTYPE or index.shape != (manifest.count,):
        raise UserError(
            f"{path} is damaged: {index.dtype} {index.shape} for {manifest.count} records"
        )
    with path.open("rb") as file:  # not through the map, which would keep all of it in memory
        file.seek(index.offset)
        for shard in manifest.shards:
            rows = np.fromfile(file, INDEX_DTYPE, shard.count)
            if misplaced(rows, shard.bytes, arrays).any():
                raise UserError(
                    f"{path} has a record of {shard.name} that cannot lie in it; {mending(path)}"
                )
    return index


def mapped(path: Path) -> Any:
    """The .npy file `path`, memory-mapped. Raises UserError if it is none."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception:  # NumPy would say how to load what may run code
        raise UserError(f"{path} is damaged: it is no array; {mending(path)}") from None


def places_of(manifest: Manifest) -> tuple[dict[str, tuple[Array, int]], int]:
    """Each array of a record by name, with where its data begin behind the first byte of the
    record's arrays; and the bytes that its arrays take.
    """
    if manifest.container == "webdataset":
        places, size = places_in_tar(manifest.settings)
    else:
        places, size = [], 0
        for array in fields_of(manifest.settings):
            places.append((array, size))
            size += array.bytes
    return {array.name: (array, at) for array, at in places}, size


def misplaced(rows: NDArray[np.void], size: int, arrays: int) -> NDArray[np.bool_]:
    """Which rows of an index are of no record in a shard of `size` bytes, whose arrays take
    `arrays` bytes: whoever reads them would read elsewhere, divide by zero, or take a wrong class.
    """
    start, end = rows["start"], rows["start"] + rows["bytes"]
    wrong = (start > size) | (end > size) | (rows["height"] == 0) | (rows["width"] == 0)
    for name, length in (("frame", rows["frame_bytes"]), ("arrays", np.uint64(arrays))):
        place = rows[name]
        wrong |= (place < start) | (place > end) | (length > end - place)
    wrong |= rows["label"] < -1
    return np.asarray(wrong | (rows["arrays"] < rows["frame"] + rows["frame_bytes"]))


def flaws_of_files(folder: Path, files: list[File], shown: bool = True) -> dict[str, str]:
    """What is wrong with each of `files` whose bytes are not as written, by name; `shown`: with a
    bar if it takes longer than a second.
    """
    lock, delay = threading.Lock(), 1 if shown else NEVER

    def flaw(file: File) -> str:
        try:
            check_sha256(folder / file.name, file.sha256, told)
        except ValueError as error:
            return str(error)
        return ""

    def told(count: int) -> None:
        with lock:
            bar.update(count)

    with (
        ThreadPoolExecutor(joblib.cpu_count()) as pool,
        progress("hashing", sum(file.bytes for file in files), unit="B", delay=delay) as bar,
    ):
        found = zip(files, pool.map(flaw, files), strict=True)
        return {file.name: problem for file, problem in found if problem}
