"""What a run says while it works: lines on stderr, and signs of life in between.

On a terminal one line is drawn anew each second, the bar of a training run; a log gets a line every
10 s at least.
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
    """Each second `draw()` on a terminal; in a log `line()`, when there was none for LOG_PACE."""
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


@contextmanager
def busy(what: str, shown: bool = True) -> Iterator[None]:
    """Show `what` and its seconds for as long as the block takes."""
    if not shown:
        yield
        return
    began, terminal = time.monotonic(), sys.stderr.isatty()

    def line() -> str:
        return f"{what}, {time.monotonic() - began:.0f} s"

    def draw() -> None:
        sys.stderr.write(f"\r\x1b[K{line()}")
        sys.stderr.flush()

    if terminal:
        draw()
    try:
        with ticking(draw, line):
            yield
    finally:
        if terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


class Progress:
    """A training run's one bar on a terminal, its lines in a log; nothing unless `shown`.

    Costs no synchronisation with the device: the loss is that of the last rows written.
    """

    def __init__(self, first: int, last: int, total: int, batch: int, shown: bool) -> None:
        self.total, self.batch, self.shown = total, batch, shown
        self.step, self.images, self.what, self.since = first, 0, "", time.monotonic()
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
            with ticking(lambda: self.bar.refresh(), self._line):
                yield
        finally:
            if self.bar is not None:
                self.bar.close()

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Name what is done in place of a step."""
        self._now(what)
        try:
            yield
        finally:
            self._now("")

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

    def _now(self, what: str) -> None:
        self.what, self.since = what, time.monotonic()
        self._title()

    def _title(self) -> None:
        if self.bar is not None:
            self.bar.set_description_str(self.what or f"step {self.step + 1}/{self.total}")

    def _line(self) -> str:
        spent = f"{time.monotonic() - self.since:.0f} s"
        step = f"step {self.step + 1}/{self.total}"
        if self.what:
            return f"{step}: {self.what}, {spent}"
        return f"{step}: {self.images:,} of {self.batch:,} images, {spent}"
