"""A store that fails while it is read and written: `failing:///folder`, fsspec's local files.

What a request meets, `Failing.fault` says of its name and path: nothing, or one of FAULTS.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

# An error before the request was served, or after; half of the bytes, without a word.
FAULTS = ("before", "after", "cut")


class Died(BaseException):
    """The store, or this process, is gone for good."""


class Failing(LocalFileSystem):
    """All of what a build asks for passes `_served`."""

    protocol = "failing"
    cachable = False
    fault: ClassVar[Callable[[str, str], str]] = staticmethod(lambda request, path: "")

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        path = os.fspath(path) if not isinstance(path, list) else path
        if isinstance(path, str):
            path = path.removeprefix("failing://")
        return super()._strip_protocol(path)

    @contextlib.contextmanager
    def _served(self, request: str, path: str) -> Any:
        met = type(self).fault(request, path)
        if met == "before":
            raise ConnectionResetError(f"{request} failed")
        yield met == "cut"
        if met == "after":
            raise ConnectionResetError(f"the answer to {request} was lost")

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        with self._served("list", path):
            return super().ls(path, detail, **options)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        with self._served("get", path):
            return super().cat_file(path, *arguments, **options)

    def put_file(self, here: str, path: str, *arguments: Any, **options: Any) -> None:
        with self._served("put", path) as cut:
            data = Path(here).read_bytes()
            Path(self._strip_protocol(path)).write_bytes(data[: len(data) // 2] if cut else data)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        with self._served("put", path) as cut:
            if mode == "create" and Path(self._strip_protocol(path)).exists():
                raise FileExistsError(path)
            Path(self._strip_protocol(path)).write_bytes(value[: len(value) // 2] if cut else value)

    def mv(self, path: str, to: str, **options: Any) -> None:
        with self._served("move", path):
            os.replace(self._strip_protocol(path), self._strip_protocol(to))

    def rm_file(self, path: str) -> None:
        with self._served("remove", path):
            os.remove(self._strip_protocol(path))

    def rm(self, path: str, recursive: bool = False, **options: Any) -> None:
        with self._served("remove", path):
            shutil.rmtree(self._strip_protocol(path))


fsspec.register_implementation("failing", Failing, clobber=True)
