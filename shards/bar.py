"""A progress bar that moves even where nothing ends for long."""

import io
import math
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 10.0
TERMINAL_SECONDS = 1.0  # between two looks at the clock when nothing is reported
STDERR = threading.Lock()  # held by the thread that writes there, or has redirected it


class Bar(tqdm):  # type: ignore[misc]
    """A tqdm on stderr that a thread of its own keeps moving."""

    delay: float

    def __init__(self, *given: Any, delay: float = 0, **named: Any) -> None:
        terminal = sys.stderr.isatty()
        self.ended = threading.Event()
        self.pace = TERMINAL_SECONDS if terminal else LOG_SECONDS
        by_the_clock = {"miniters": math.inf, "maxinterval": math.inf, "ncols": 78}
        named |= {"mininterval": 0.1} if terminal else by_the_clock
        named |= {"file": sys.stderr if terminal else _Lines(), "delay": delay}
        super().__init__(*given, **named)
        facts = weakref.ref(self), self.ended, delay, self.pace
        self.ticker = threading.Thread(target=_tick, args=facts, daemon=True)
        self.ticker.start()

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> None:
        """As tqdm's, which would keep its lock for ever where stderr cannot be written to."""
        with nullcontext() if nolock else self.get_lock():
            super().refresh(nolock=True)

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def close(self) -> None:
        """End the bar. Its last state stays, unless it ended within its delay."""
        if hasattr(self, "ticker") and not self.ended.is_set():
            self.ended.set()
            self.ticker.join()
            if time.time() >= self.start_t + self.delay:
                self.delay = 0  # tqdm shows nothing more of a bar that only refresh() has shown
        super().close()


def _tick(bar: "weakref.ref[Bar]", ended: threading.Event, delay: float, pace: float) -> None:
    """Show the bar after `delay` seconds, then every `pace` seconds, until it ends or nobody holds
    it.
    """
    wait = delay or pace
    while not ended.wait(wait):
        wait, shown = pace, bar()
        if shown is None:
            return
        with STDERR:
            shown.refresh()
        del shown  # else this thread would keep it alive


class _Lines(io.TextIOBase):
    """stderr, with every state of a bar on a line of its own."""

    def write(self, text: str) -> int:
        line = text.replace("\r", "").rstrip()
        if line:
            with suppress(BrokenPipeError):  # nobody reads it: no reason to stop the work
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        return len(text)
