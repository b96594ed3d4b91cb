"""Where a set is written: a folder of this machine, or a store by its URL.

A file is visible there whole or not at all, in stores that guarantee it: see docs/stores.md.
"""

import fcntl
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import LEFT, LOCK, TYPED_URL, sweep, write_atomically
from shards.remote import storage as remote
from shards.remote.retry import retried
from shards.remote.storage import is_url

# Stores that show an object once all of it has arrived. In others a reader, or a restart, would
# meet half of one, so that it gets its name last.
WHOLE = {"abfs", "abfss", "az", "gcs", "gs", "hf", "s3", "s3a"}


@dataclass(frozen=True, slots=True)
class Place:
    """A folder or a URL, and the files right below it; none may be there yet.

    A call to a store is tried again as `retried` does, and raises as it does.
    """

    where: str

    @classmethod
    def of(cls, where: Path | str) -> "Place":
        """The place meant. Raises UserError at a web server, which takes no files."""
        text = str(where).removeprefix("file://")
        if text.startswith(("http://", "https://")):
            raise UserError(f"{text}: a web server takes no files; name a folder, s3:// or gs://")
        if not is_url(text):
            if TYPED_URL.match(text):
                raise UserError(
                    f"{text} is no URL; give s3://bucket/set, or a whole path from / on"
                )
            return cls(str(Path(text)))
        remote.filesystem(text)  # raises if it names no place
        return cls(text.rstrip("/"))

    def __str__(self) -> str:
        return self.where

    def __truediv__(self, name: str) -> "Place":
        return Place(f"{self.where}/{name}")

    @property
    def is_url(self) -> bool:
        """Whether it is in a store."""
        return is_url(self.where)

    @property
    def folder(self) -> Path:
        """The folder, of a place on this machine."""
        return Path(self.where)

    def sizes(self) -> dict[str, int]:
        """Bytes of everything right below it, by name; in a store, 0 of a folder."""
        found: dict[str, int] = {}
        if not self.is_url:
            for path in self.folder.iterdir() if self.folder.is_dir() else ():
                with suppress(FileNotFoundError):  # others may be writing
                    found[path.name] = path.stat().st_size
            found.pop(LOCK, None)
            return found
        files, root = remote.filesystem(self.where)
        files.invalidate_cache()
        with suppress(FileNotFoundError):
            for row in retried(self.where, lambda: files.ls(root, detail=True)):
                name = row["name"].rstrip("/")
                if name not in ("", root.rstrip("/")):  # some stores list a folder in itself
                    found[name.rpartition("/")[2]] = int(row["size"] or 0)
        return found

    def read(self, name: str) -> bytes | None:
        """The content of a file, None if it is not there."""
        try:
            if self.is_url:
                return remote.read_all(f"{self.where}/{name}")
            return (self.folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        """Write a file, in place of one that may be there; `durable` as write_atomically."""
        if self.is_url:
            self._send(name, len(data), lambda files, path: files.pipe_file(path, data))
        else:
            write_atomically(self.folder / name, data, durable)

    def put(self, name: str, path: Path) -> None:
        """Copy the local file `path` into the store."""
        send = lambda files, there: files.put_file(str(path), there)  # noqa: E731
        self._send(name, path.stat().st_size, send)

    def create(self, name: str, data: bytes) -> None:
        """Write a file unless it is there. If several processes do at once, the first wins, on a
        disk and in a store that can tell; in any other store the last. Whoever must know reads it
        then.
        """
        if not self.is_url:
            with (self.folder / f"{name}.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not (self.folder / name).exists():
                    write_atomically(self.folder / name, data)
            return
        files, root = remote.filesystem(self.where)
        if self._whole and self.read(name) is None:
            with suppress(Exception):  # a client or a store may not know how, or be away
                files.pipe_file(f"{root}/{name}", data, mode="create")
        there = self.read(name) or b""
        if len(there) < len(data) and data.startswith(there):
            self.write(name, data)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        if not self.is_url:
            (self.folder / name).unlink(missing_ok=True)
            return
        files, root = remote.filesystem(self.where)
        with suppress(FileNotFoundError):
            retried(f"{self.where}/{name}", lambda: files.rm_file(f"{root}/{name}"))

    def sweep(self) -> None:
        """Remove what was left half written. Nobody else may be writing there."""
        if not self.is_url:
            sweep(self.folder)
        elif not self._whole:
            for name in filter(LEFT.search, self.sizes()):
                self.remove(name)

    def remove_all(self) -> None:
        """Remove the folder with all that is below it. Never fails: it is done last."""
        if not self.is_url:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        files, root = remote.filesystem(self.where)
        with suppress(OSError, UserError):
            retried(self.where, lambda: files.rm(root, recursive=True))

    @property
    def _whole(self) -> bool:
        return self.where.partition(":")[0] in WHOLE

    def _send(self, name: str, size: int, send: Callable[[Any, str], object]) -> None:
        """Have `send` (client, path) write a file of `size` bytes, and look whether it arrived."""
        files, root = remote.filesystem(self.where)
        final = f"{root}/{name}"

        def once() -> None:
            path = final if self._whole else f"{final}.{secrets.token_hex(6)}.tmp"
            try:
                if not self._whole:
                    files.makedirs(root, exist_ok=True)
                send(files, path)
                files.invalidate_cache()
                arrived = 0
                with suppress(FileNotFoundError):
                    arrived = int(files.info(path)["size"])
                if arrived != size:
                    raise ConnectionError(f"{arrived} of {size} bytes arrived")
                if path != final:
                    files.mv(path, final)
                    path = final
            finally:
                if path != final:
                    with suppress(Exception):
                        files.rm_file(path)

        retried(f"{self.where}/{name}", once)
