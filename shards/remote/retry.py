"""Calls to a store's client library, repeated while their failure may pass.

If a server is away or a connection is cut, the call is repeated, at doubling intervals; if a bucket
does not exist or denies access, it is not.
"""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from shards.errors import UserError, install

PATIENCE = 300.0  # seconds
FIRST_WAIT, LONGEST_WAIT = 0.1, 10.0  # seconds
LONGEST_LINE = 200  # characters of a client library's own words
INSTALL = install("fsspec")
LOG = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
BARRED, GONE, PASSING = (401, 403), (404, 410), (408, 425, 429)  # of HTTP's 4xx
OURS = (
    TypeError,
    ValueError,
    LookupError,
    NotImplementedError,
    IsADirectoryError,
    NotADirectoryError,
)
# Stores that do not answer, and the call that said so: one line, not one for each request.
AWAY: dict[str, object] = {}
Result = TypeVar("Result")


def retried(
    url: str,
    call: Callable[[], Result],
    patience: float | None = None,
    needed: Callable[[], bool] = lambda: True,
) -> Result:
    """`call()`, repeated until it returns, is hopeless, or was needed for too long.

    patience: seconds, PATIENCE by default. `needed` is asked now and then whether somebody waits:
    only then does patience count. It may raise, to give up. Raises FileNotFoundError if there is no
    such thing, UserError if no further try would help, ConnectionError when patience has ended.
    """
    patience = PATIENCE if patience is None else patience
    store, mine = "/".join(url.split("/")[:3]), object()
    wait, waited, begin = FIRST_WAIT, 0.0, 0.0
    while True:
        needed()
        try:
            result = call()
        except Exception as error:  # every client has its own kinds
            needed()  # a wish to end counts for more than the failure
            failure = _true(url, error)
            _refuse(url, failure)
            reason = f"{type(failure).__name__}: {_line(failure)}"
        else:
            if AWAY.pop(store, None):
                LOG.warning("%s answers again", store)
            return result
        if not begin and AWAY.setdefault(store, mine) is mine:
            LOG.warning("%s: %s; trying again", url, reason)
        begin = begin or time.monotonic()
        end = time.monotonic() + wait
        while time.monotonic() < end:
            time.sleep(min(0.1, wait))
            needed()
        waited, begin = waited + needed() * (time.monotonic() - begin), time.monotonic()
        wait = min(2 * wait, LONGEST_WAIT)
        if waited > patience:
            AWAY.pop(store, None)
            raise ConnectionError(
                f"{url} could not be reached for {patience:g} s ({reason}); once the store is "
                "back, the same command goes on (a training with --resume)"
            )


def _true(url: str, error: BaseException) -> BaseException:
    """The failure itself: to fsspec's client of web servers a file is missing whenever it could not
    look.
    """
    missing = isinstance(error, FileNotFoundError) and url.startswith("http")
    return error.__cause__ or error if missing else error


def _refuse(url: str, error: BaseException) -> None:
    """Raise, as one clear line, an error that no further try would mend."""
    status = _status(error)
    if isinstance(error, FileNotFoundError) or status in GONE:
        raise FileNotFoundError(f"{url} is not there ({_line(error)})") from None
    if isinstance(error, ImportError):
        raise UserError(f"{url} cannot be used: {_line(error)}; {INSTALL}") from None
    if isinstance(error, OSError) and error.errno in FULL:
        raise error
    barred = isinstance(error, PermissionError) or "Credential" in type(error).__name__
    if barred or status in BARRED:
        raise UserError(
            f"no access to {url} ({_line(error)}); give the client library its credentials, "
            "by its environment variables or files"
        ) from None
    wrong = "Validation" in type(error).__name__  # botocore, of a bucket's name
    refused = 400 <= status < 500 and status not in PASSING
    if wrong or refused or isinstance(error, OURS):
        raise UserError(f"{url} cannot be used ({_line(error)})") from None


def _status(error: BaseException) -> int:
    """The HTTP status an error of a client library carries, or 0."""
    for place, name in (
        (error, "status"),
        (error, "code"),
        (getattr(error, "response", None), "status_code"),
    ):
        status = getattr(place, name, None)
        if isinstance(status, int):
            return status
    return 0


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "..."
