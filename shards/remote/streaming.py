"""A finished set that lies in an object store or on a web server, opened as if it were here.

In: its URL, a local folder for copies. Out: a ShardSet whose shards come as they are read.
"""

from pathlib import Path

from shards.dataset import ShardSet
from shards.remote.cache import Copies
from shards.remote.retry import PATIENCE
from shards.remote.store import Store
from shards.spec import MANIFEST, parse


def open_remote(
    url: str,
    cache: Path | str,
    limit: int = 0,
    *,
    patience: float = PATIENCE,
    checksum: bool = True,
) -> ShardSet:
    """The finished set below `url`, its shards fetched into the folder `cache` as they are read.

    limit: bytes that all sets in `cache` may take, 0 for any. patience: seconds to wait for a store
    that does not answer. checksum: hash what is in the cache before its first use. Raises
    ValueError if there is no such set or no access, ConnectionError when patience has ended.
    """
    store = Store(url, patience)
    try:
        manifest = parse(f"{store.url}/{MANIFEST}", store.read(MANIFEST))
    except FileNotFoundError as error:
        raise ValueError(f"{error}: no finished set of shards, or the wrong place") from None
    if manifest.container != "webdataset":
        raise ValueError(f"{store.url} is an FFCV set, which is read from local files only; copy "
                         "it to a local folder, or train on the WebDataset shards")  # fmt: skip
    copies = Copies(store, manifest, Path(cache), limit, checksum)
    return ShardSet(copies.folder, manifest, copies)
