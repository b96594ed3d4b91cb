"""Files of an object store or a web server, through fsspec: a URL in, bytes or a local file out.

Whatever may pass (a server away, a cut connection) is tried again, at doubling intervals; what
will not (no such bucket, no access) is one clear line. Credentials stay with the client library.
"""

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds
LONGEST_LINE = 200  # characters of a client library's own words
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds
LOG = logging.getLogger(__name__)
FINAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
PASSING = (408, 425, 429)  # of HTTP's 4xx
INSTALL = "type: pip install 'kamim[remote]'"


class Store:
    """The files right below `url` (s3://, gs://, hf://, https:// or any other that fsspec knows).

    patience: seconds that a caller who needs a file at once is kept waiting for a store that does
    not answer. Raises ValueError if the URL cannot be served.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.url, self.patience, self.away = url.rstrip("/"), patience, False
        protocol, _, rest = self.url.partition("://")
        if not rest:
            raise ValueError(f"{url} names no place; use one as s3://bucket/set")
        if "@" in rest.partition("/")[0] or (protocol in {"http", "https"} and "?" in rest):
            # The URL goes into run.json and into messages.
            raise ValueError(
                f"a {protocol}:// URL may hold no password or signature; give them to the client "
                "library (its environment variables or files)"
            )
        try:
            from fsspec.core import url_to_fs

            self.files, self.root = url_to_fs(self.url, **_options(protocol))
        except ImportError as error:
            raise ValueError(f"{protocol}:// cannot be read: {error}; {INSTALL}") from None
        except ValueError as error:
            raise ValueError(
                f"{self.url} cannot be read: {error}; there are s3://, gs://, hf://, https://"
            ) from None

    def read(self, name: str) -> bytes:
        """The content of file `name`. Raises FileNotFoundError, ValueError or ConnectionError."""
        return self._insist(name, lambda: self.files.cat_file(f"{self.root}/{name}"), lambda: True)

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
        self._insist(name, copy, needed)

    def _insist(self, name: str, work: Callable[[], Any], needed: Callable[[], bool]) -> Any:
        """The result of `work`, tried until it is there, hopeless, or needed for too long."""
        wait, waited, begin = FIRST_WAIT, 0.0, 0.0
        while True:
            needed()
            try:
                result = work()
            except Exception as error:
                needed()  # its own wish to end goes before what came of it
                self._refuse(name, error)
                reason = f"{type(error).__name__}: {_line(error)}"
                begin = begin or time.monotonic()
            else:
                if self.away:
                    LOG.warning("%s answers again", self.url)
                self.away = False
                return result
            if not self.away:
                LOG.warning("%s/%s: %s; trying again", self.url, name, reason)
            self.away = True
            end = time.monotonic() + wait
            while time.monotonic() < end:
                time.sleep(min(0.1, wait))
                needed()
            waited, begin = waited + needed() * (time.monotonic() - begin), time.monotonic()
            wait = min(2 * wait, LONGEST_WAIT)
            if waited > self.patience:
                raise ConnectionError(
                    f"{self.url}/{name} could not be read for {self.patience:g} s ({reason}); "
                    "once the store is back, the same command goes on"
                )

    def _refuse(self, name: str, error: Exception) -> None:
        """Raise, as one clear line, an error that no further try would mend."""
        url, status = f"{self.url}/{name}", _status(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise FileNotFoundError(f"{url} is not there ({_line(error)})") from None
        if isinstance(error, ImportError):
            raise ValueError(f"{url} cannot be read: {_line(error)}; {INSTALL}") from None
        if isinstance(error, OSError) and error.errno in FINAL:
            raise error
        barred = isinstance(error, PermissionError) or "Credential" in type(error).__name__
        if barred or status in (401, 403):
            raise ValueError(
                f"no access to {url} ({_line(error)}); give the client library its credentials, "
                "by its environment variables or files"
            ) from None
        wrong = "Validation" in type(error).__name__  # botocore, of a bucket's name
        if wrong or (400 <= status < 500 and status not in PASSING):
            raise ValueError(f"{url} cannot be read ({_line(error)})") from None


def _options(protocol: str) -> dict[str, Any]:
    """What a client library must be told: our tries, not its own; no end to a long download."""
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


def _status(error: Exception) -> int:
    """The HTTP status an error of a client library carries, or 0."""
    response = getattr(error, "response", None)
    for status in (
        getattr(error, "status", None),
        getattr(error, "code", None),
        getattr(response, "status_code", None),
    ):
        if isinstance(status, int):
            return status
    return 0


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "..."
