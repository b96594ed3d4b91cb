"""Progress of a run on stderr.

On a terminal the bar is redrawn each second. A log gets a line at least every 10 s.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOG_PACE = 9.0  # seconds without a line in a log; looked at each second
_said = time.monotonic()  # when the last line was


def say(*lines: str) -> None:
    """Lines on stderr; on a terminal in place of what was being drawn there."""
    global _said
    for line in lines:
        sys.stderr.write(f"\r\x1b[K{line}\n" if sys.stderr.isatty() else f"{line}\n")
    sys.stderr.flush()
    _said = time.monotonic()


@contextmanager
def ticking(draw: Callable[[], None], line: Callable[[], str]) -> Iterator[None]:
    """Each second: on a terminal `draw()`; in a log `line()`, if nothing was said for LOG_PACE."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(1.0):
            if sys.stderr.isatty():
                draw()
            elif time.monotonic() - _said >= LOG_PACE:
                say(line())

    thread = threading.Thread(target=tick, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Doing:
    """What is being done, since when, and how much of `total` is done, if that can be counted."""

    def __init__(self, what: str, total: float = 0) -> None:
        self.what, self.total, self.done, self.since = what, total, 0.0, time.monotonic()

    def update(self, more: float) -> None:
        """So much more is done."""
        self.done += more

    def line(self) -> str:
        """For a person: how much is done and the time left, or else the time spent."""
        spent = time.monotonic() - self.since
        if not self.done or not self.total:
            return f"{self.what}, {spent:.0f} s"
        share = min(1.0, self.done / self.total)
        return f"{self.what}, {share:.0%}, {spent / share - spent:.0f} s left"


@contextmanager
def busy(what: str, shown: bool = True, total: float = 0) -> Iterator[Doing]:
    """Show `what` and its seconds for as long as the block takes; of `total`, how much is done."""
    doing, terminal = Doing(what, total), sys.stderr.isatty()
    if not shown:
        yield doing
        return

    def draw() -> None:
        sys.stderr.write(f"\r\x1b[K{doing.line()}")
        sys.stderr.flush()

    if terminal:
        draw()
    try:
        with ticking(draw, doing.line):
            yield doing
    finally:
        if terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Progress:
    """The one bar of a training run on a terminal, or its lines in a log; nothing unless `shown`.

    Costs no synchronisation with the device: the loss is that of the last rows written.
    """

    def __init__(self, first: int, last: int, total: int, batch: int, shown: bool) -> None:
        self.total, self.batch, self.shown = total, batch, shown
        self.step, self.images, self.since = first, 0, time.monotonic()
        self.doing: Doing | None = None
        self.bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=last * batch,
                initial=first * batch,
                unit="img",
                dynamic_ncols=True,
                leave=False,
            )
        self._title()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Shows signs of life for as long as the block takes, and clears the bar at its end."""
        if not self.shown:
            yield
            return
        try:
            with ticking(self._title, self._line):
                yield
        finally:
            if self.bar is not None:
                self.bar.close()

    @contextmanager
    def busy(self, what: str, total: float = 0) -> Iterator[Doing]:
        """Show what is done in place of a step; of `total` as much as it is told."""
        self.doing = doing = Doing(what, total)
        self._title()
        try:
            yield doing
        finally:
            self.doing, self.since = None, time.monotonic()
            self._title()

    def begin(self, step: int) -> None:
        """`step` begins."""
        self.step, self.images, self.since = step, 0, time.monotonic()
        self._title()

    def advance(self, images: int) -> None:
        """So many more images of the step went through the model."""
        self.images += images
        if self.bar is not None:
            self.bar.update(images)

    def rows(self, row: dict[str, Any], line: str) -> None:
        """The newest row: its loss beside the bar, or its `line` in a log."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {row['loss']:.4f}")
        elif self.shown:
            say(line)

    def _title(self) -> None:
        """The bar anew."""
        if self.bar is not None:
            doing, step = self.doing, f"step {self.step + 1}/{self.total}"
            self.bar.set_description_str(doing.line() if doing else step)

    def _line(self) -> str:
        step, doing = f"step {self.step + 1}/{self.total}", self.doing
        if doing:
            return f"{step}: {doing.line()}"
        spent = f"{time.monotonic() - self.since:.0f} s"
        return f"{step}: {self.images:,} of {self.batch:,} images, {spent}"
