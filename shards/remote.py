"""Files wherever fsspec reaches: an s3://, gs://, hf:// or https:// URL in, bytes and names out.

A failure that may pass is tried again after growing pauses. Credentials are the client library's
affair. Paths of this machine never come here, so they need no fsspec.
"""

import hashlib
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between tries
BLOCK = 8 << 20  # a request's wait costs what some MB do, and the next block comes meanwhile
CLIENTS = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}
TAGS = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "updated")
Result = TypeVar("Result")


class RemoteFile(NamedTuple):
    """A file below a URL: its name there, bytes, and a number that changes with its content."""

    name: str
    size: int
    stamp: int


def is_url(where: object) -> bool:
    """Whether `where` is a URL, not a path of this machine."""
    return isinstance(where, str) and re.match(r"[a-z][a-z0-9+.-]*:(//|:)", where) is not None


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's client for `url`, and the path it knows it by.

    Raises ValueError if the library for it is missing or nothing knows its protocol.
    """
    protocol = url.partition("://")[0]
    try:
        import fsspec.core
    except ImportError:
        raise ValueError(f"{url} needs fsspec; type: pip install 'kamim[remote]'") from None
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    except ImportError as error:
        needs = CLIENTS.get(protocol, error.name or protocol)
        raise ValueError(f"{url} needs {needs}; type: pip install 'kamim[remote]'") from None
    except ValueError as error:
        raise ValueError(f"{url}: {error}; give s3://, gs://, hf:// or https://") from None


def retried(url: str, call: Callable[[], Result]) -> Result:
    """`call()`, again after each of PAUSES while it fails in a way that may pass.

    Raises FileNotFoundError if there is no such thing, else OSError, in one line, for the last
    failure.
    """
    for pause in (*PAUSES, None):
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # every client has its own kinds
            if pause is None or _final(error):
                words = " ".join(str(error).split())[:200] or type(error).__name__
                tries = "" if _final(error) else f" in {len(PAUSES) + 1} tries"
                raise OSError(
                    f"{url} could not be reached{tries} ({words}); what is finished is kept"
                ) from None
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _final(error: Exception) -> bool:
    """Whether trying again cannot help: a refusal, or a mistake of ours."""
    refused = (
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
        ImportError,
        NotImplementedError,
    )
    status = getattr(error, "status", None)
    return (
        isinstance(error, (*refused, TypeError, ValueError, LookupError))
        or "Credential" in type(error).__name__
        or (isinstance(status, int) and 400 <= status < 500 and status not in {408, 429})
    )


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
        kind = retried(url, lambda: files.info(path))["type"]
    except FileNotFoundError:
        return ""
    if kind == "file" and path.startswith("http"):
        # A web server has no folders: a page that lists files is one, and no image or archive.
        page = path.endswith("/") or "html" in str(files.info(path).get("mimetype"))
        kind = "directory" if page else "file"
    return "file" if kind == "file" else "folder"


def find(url: str) -> list[RemoteFile]:
    """Every file below `url`, at any depth, in no order."""
    files, path = filesystem(url)
    base = path.rstrip("/") + "/"
    files.invalidate_cache()
    found: dict[str, Any] = retried(url, lambda: files.find(base, detail=True))
    unsized = [name for name, facts in found.items() if facts.get("size") is None]
    with ThreadPoolExecutor(16) as pool:  # a web server's page of links says no sizes
        found |= zip(unsized, pool.map(files.info, unsized), strict=True)
    return [
        RemoteFile(name[len(base) :], int(facts["size"] or 0), _stamp(facts))
        for name, facts in found.items()
        if name.startswith(base)
    ]


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
