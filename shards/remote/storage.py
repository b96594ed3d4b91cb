"""Files wherever fsspec reaches, by s3://, gs://, hf:// or https:// URL: their names and bytes.

A call is repeated if its failure may pass. Credentials are left to the client library. Paths of
this machine never come here, so they need no fsspec.
"""

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from shards.errors import UserError
from shards.remote.retry import INSTALL, PATIENCE, retried

BLOCK = 8 << 20  # a request's wait costs what some MB do, and the next block comes meanwhile
CLIENTS = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "updated")


class RemoteFile(NamedTuple):
    """A file below a URL: its name there, bytes, and a number that changes with its content."""

    name: str
    size: int
    stamp: int


def is_url(where: object) -> bool:
    """Whether `where` is a URL, not a path of this machine."""
    return isinstance(where, str) and re.match(r"[a-z][a-z0-9+.-]*:(//|:)", where) is not None


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's client for `url`, and the path by which it knows it.

    Raises UserError if the library for it is missing, if no library knows the protocol, or if the
    URL holds a secret.
    """
    protocol, _, rest = url.partition("://")
    if not rest:
        raise UserError(f"{url} names no place; use one as s3://bucket/folder")
    if "@" in rest.partition("/")[0] or (protocol in {"http", "https"} and "?" in rest):
        # The URL goes into run.json, manifests and messages.
        raise UserError(
            f"a {protocol}:// URL may hold no password or signature; give them to the client "
            "library (its environment variables or files)"
        )
    try:
        import fsspec.core

        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **_options(protocol)))
    except ImportError as error:
        needs = CLIENTS.get(protocol, error.name or protocol)
        raise UserError(f"{url} needs {needs}; {INSTALL}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}; give s3://, gs://, hf:// or https://") from None


def _options(protocol: str) -> dict[str, Any]:
    """What a client library must be told: it repeats nothing, for we do; a download may take any
    time.
    """
    if protocol in {"http", "https"}:
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=30, sock_read=60)
        return {"client_kwargs": {"timeout": timeout}}
    if protocol in {"s3", "s3a"}:
        from fsspec.config import conf

        # botocore's own five tries take ten seconds, of them some by chance.
        ours = {"retries": {"total_max_attempts": 1}, "connect_timeout": 30}
        return {"config_kwargs": ours | conf.get("s3", {}).get("config_kwargs", {})}
    return {}


def read_range(url: str, start: int, size: int) -> bytes:
    """`size` bytes of `url` from `start` on, fewer at its end. FileNotFoundError or OSError."""
    if size == 0:
        return b""
    files, path = filesystem(url)
    data: bytes = retried(url, lambda: files.cat_file(path, start=start, end=start + size))
    if len(data) > size:
        if start:
            raise OSError(f"{url} sends the whole file where a part was asked for; copy it here")
        data = data[:size]
    return data


def read_all(url: str) -> bytes:
    """All bytes of `url`."""
    files, path = filesystem(url)
    data: bytes = retried(url, lambda: files.cat_file(path))
    return data


def kind_of(url: str) -> str:
    """`file`, `folder`, or nothing if there is no such place."""
    files, path = filesystem(url)
    files.invalidate_cache()
    try:
        facts = retried(url, lambda: files.info(path))
    except FileNotFoundError:
        return ""
    # A web server has no folders: a page that lists files is one, and no image or archive.
    page = path.endswith("/") or "html" in str(facts.get("mimetype"))
    if facts["type"] != "file" or (path.startswith("http") and page):
        return "folder"
    return "file"


def find(url: str) -> list[RemoteFile]:
    """Every file below `url`, at any depth, in no order."""
    files, path = filesystem(url)
    base = path.rstrip("/") + "/"
    files.invalidate_cache()
    if _by_folder(files):
        found = _walk(files, base)
    else:
        found = retried(url, lambda: files.find(base, detail=True))
    unsized = [name for name, facts in found.items() if facts.get("size") is None]
    with ThreadPoolExecutor(16) as pool:  # a web server's page of links says no sizes
        sized = lambda name: retried(name, lambda: files.info(name))  # noqa: E731
        found |= zip(unsized, pool.map(sized, unsized), strict=True)
    return [
        RemoteFile(name[len(base) :], int(facts["size"] or 0), _stamp(facts))
        for name, facts in found.items()
        if name.startswith(base)
    ]


def _by_folder(files: Any) -> bool:
    """Whether fsspec's own `find` would list this store folder by folder."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    kind = type(files)
    return getattr(kind, "_find", kind.find) in (AsyncFileSystem._find, AbstractFileSystem.find)


def _walk(files: Any, base: str) -> dict[str, dict[str, Any]]:
    """What is known of every file below `base`: fsspec's walk leaves out, in silence, a folder that
    does not answer (2026.9).
    """
    found: dict[str, dict[str, Any]] = {}
    seen, folders = {base}, [base]

    def listed(folder: str) -> list[dict[str, Any]]:
        url = files.unstrip_protocol(folder)
        return cast(list[dict[str, Any]], retried(url, lambda: files.ls(folder, detail=True)))

    with ThreadPoolExecutor(16) as pool:
        while folders:
            # Links of some web servers begin with ./
            every = (facts for listing in pool.map(listed, folders) for facts in listing)
            here = {facts["name"].replace("/./", "/"): facts for facts in every}
            found |= {name: facts for name, facts in here.items() if facts["type"] == "file"}
            inner = {name for name, facts in here.items() if facts["type"] == "directory"}
            folders = sorted(inner - seen)
            seen |= inner
    return found


def _stamp(facts: dict[str, Any]) -> int:
    tag = next((str(facts[name]) for name in TAGS if facts.get(name)), "")
    return int.from_bytes(hashlib.sha256(tag.encode()).digest()[:6]) if tag else 0


def opened(url: str, ahead: bool = True) -> BinaryIO:
    """`url` as a file: read `ahead` in blocks from front to back, or just what is asked for."""
    files, path = filesystem(url)
    cache = {"cache_type": "background", "cache_options": {"maxblocks": 4}}
    options = cache if ahead else {"cache_type": "none"}
    file = retried(url, lambda: files.open(path, "rb", block_size=BLOCK, **options))
    if not file.seekable():
        raise OSError(f"{url} sends only the whole file, never a part of it; copy it here first")
    return cast(BinaryIO, file)


class Store:
    """The files right below `url` (s3://, gs://, hf://, https:// or any other that fsspec knows).

    patience: how many seconds a caller who needs a file at once waits for a store that does not
    answer. Raises UserError if the URL cannot be served; its calls raise as `retried` does.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.files, root = filesystem(url)
        self.url, self.root, self.patience = url.rstrip("/"), root.rstrip("/"), patience

    def read(self, name: str) -> bytes:
        """The content of file `name`."""
        read = lambda: self.files.cat_file(f"{self.root}/{name}")  # noqa: E731
        return bytes(retried(f"{self.url}/{name}", read, self.patience))

    def download(self, name: str, target: Path, needed: Callable[[], bool]) -> None:
        """Copy file `name` over `target`. `needed` is asked now and then whether somebody waits for
        it: only then does patience count. It may raise, to give up.
        """
        from fsspec.callbacks import Callback

        class Heed(Callback):  # type: ignore[misc]
            """fsspec's own way of being told of every chunk."""

            def relative_update(self, inc: int = 1) -> None:
                needed()

        source = f"{self.root}/{name}"
        copy = lambda: self.files.get_file(source, str(target), callback=Heed())  # noqa: E731
        retried(f"{self.url}/{name}", copy, self.patience, needed)
