"""The files of a set in a store, for training: a URL in, bytes or a local file out.

A store may be away for as long as nobody waits; who needs a file at once is patient for a while.
"""

from collections.abc import Callable
from pathlib import Path

from shards.remote import storage as remote
from shards.remote.retry import PATIENCE, retried


class Store:
    """The files right below `url` (s3://, gs://, hf://, https:// or any other that fsspec knows).

    patience: seconds that a caller who needs a file at once is kept waiting for a store that does
    not answer. Raises ValueError if the URL cannot be served; its calls raise as `retried` does.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.files, root = remote.filesystem(url)
        self.url, self.root, self.patience = url.rstrip("/"), root.rstrip("/"), patience

    def read(self, name: str) -> bytes:
        """The content of file `name`."""
        read = lambda: self.files.cat_file(f"{self.root}/{name}")  # noqa: E731
        return bytes(retried(f"{self.url}/{name}", read, self.patience))

    def download(self, name: str, target: Path, needed: Callable[[], bool]) -> None:
        """Copy file `name` over `target`. `needed` is asked now and then whether someone waits for
        it, which is when patience counts, and may raise to give up.
        """
        from fsspec.callbacks import Callback

        class Heed(Callback):  # type: ignore[misc]
            """fsspec's own way of being told of every chunk."""

            def relative_update(self, inc: int = 1) -> None:
                needed()

        source = f"{self.root}/{name}"
        copy = lambda: self.files.get_file(source, str(target), callback=Heed())  # noqa: E731
        retried(f"{self.url}/{name}", copy, self.patience, needed)
