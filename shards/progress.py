"""What is said on stderr while something takes long: a bar on a terminal, lines in a log.

tqdm is imported only when there is something to show, so that a command line answers before that.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def counted(number: float, what: str, more: str = "s") -> str:
    """`number` with its noun: 1 file, 2,000 files."""
    return f"{number:,.12g} {what}{'' if number == 1 else more}"


def progress(
    title: str,
    total: float,
    items: Iterable[Any] | None = None,
    initial: int = 0,
    unit: str = "img",
    delay: float = 0,
) -> Any:
    """A tqdm on stderr, over `items` if there are any: often on a terminal, a line every ten
    seconds in a log. With `delay`, work that takes fewer seconds shows nothing.
    """
    from shards.bar import Bar

    scale = unit == "B"
    return Bar(items, title, total, unit=unit, unit_scale=scale, initial=initial, delay=delay)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Say on stderr what is being done, and for how long, while the block takes over a second."""
    from shards.bar import Bar

    with Bar(None, title, bar_format="{desc} ... {elapsed}", delay=1):
        yield
