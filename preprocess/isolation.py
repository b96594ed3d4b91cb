"""Runs a user's own detector in a process of its own: if it hangs or dies, the build goes on.

Each thread that detects has one such process. It ends with the thread, and is replaced if it hangs
or dies. It gets pixels, and answers with what the plug-in found, or with why the image is rejected.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess import BuildError, plugins
from preprocess.decode import Rejected
from shards.errors import UserError
from shards.spec import Detector

HUNG, DIED = "detector-hung", "detector-died"  # reasons of the ledger
SECONDS = 60.0  # for one look at an image, by default
FIRST = 10  # times as many for importing it, and for its first look: it may make a model then
START = "import sys; sys.path[:] = {path!r}; from preprocess.isolation import serve; serve({pipe})"
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
_allowed = {"seconds": SECONDS}


class _Own(threading.local):
    """The process of this thread, if it has one."""

    process: "_Process | None" = None
    warm = False  # whether it, or one before it, has answered


_own = _Own()


def allow(seconds: float) -> None:
    """Set how long a plug-in of this process may take per image; 0: no limit."""
    if not 0 <= seconds < threading.TIMEOUT_MAX / FIRST:
        raise UserError(
            f"--detector-seconds {seconds:g} is out of range; give 0 (no limit) or more"
        )
    _allowed["seconds"] = seconds


def allowed() -> float:
    """Seconds that a plug-in may look at an image."""
    return _allowed["seconds"]


def found(detector: Detector, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """plugins.found, in the process of this thread. Raises Rejected also if it hangs or dies."""
    assert detector.plugin is not None
    name, place = detector.plugin.function, ([*sys.path], os.getcwd())
    process, seconds = _own.process, allowed()
    if process is None or process.place != place or process.ended():
        process = _own.process = _Process(place)
    try:
        process.send((detector, rgb), FIRST * seconds)
        answer = process.receive(FIRST * seconds)
        if answer is None:  # it is imported, and looks at the image
            answer = process.receive(seconds if _own.warm else FIRST * seconds)
    except TimeoutError as error:
        _own.process = None
        raise Rejected(
            HUNG, f"{name}: no answer in {error} s; --detector-seconds allows more"
        ) from None
    except (EOFError, OSError):
        _own.process = None
        raise Rejected(DIED, f"{name}: its process ended, {process.end()}") from None
    _own.warm = True
    reason, what = answer
    if reason == BuildError.__name__:
        raise BuildError(what)
    if reason:
        raise Rejected(reason, what)
    result: NDArray[np.float32] = what
    return result


class _Process:
    """A process that looks at images, imports from `place` (sys.path, working folder)."""

    def __init__(self, place: tuple[list[str], str]) -> None:
        self.place = place
        self.pipe, theirs = Pipe()
        start = START.format(path=sys.path, pipe=theirs.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-c", start],
            stdin=subprocess.DEVNULL,
            stdout=2,  # results alone go to stdout
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def send(self, request: Any, seconds: float) -> None:
        self._within(seconds, lambda: self.pipe.send(request))

    def receive(self, seconds: float) -> Any:
        return self._within(seconds, self.pipe.recv)

    def _within(self, seconds: float, act: Any) -> Any:
        """`act()`. If that takes longer, the process is killed: TimeoutError. EOFError or OSError
        if it died.
        """
        late = threading.Event()

        def strike() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(seconds, strike)
        if seconds:
            timer.start()
        try:
            result = act()
            if late.is_set():  # killed when it had just answered
                self.process.wait()
            return result
        except (EOFError, OSError):
            if late.is_set():
                raise TimeoutError(f"{seconds:g}") from None
            raise
        finally:
            timer.cancel()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> str:
        """End it, if it still runs. Returns how it ended."""
        self.pipe.close()
        try:
            status = self.process.wait(5)
        except subprocess.TimeoutExpired:  # it has closed its pipe alone
            self.process.kill()
            status = self.process.wait()
        return f"signal {-status}" if status < 0 else f"exit status {status}"

    def __del__(self) -> None:
        self.process.kill()
        self.process.wait()


def serve(descriptor: int) -> None:
    """What the process does: it answers until nobody asks any more."""
    if sys.platform == "linux":  # or a plug-in that hangs would outlive a build that was killed
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the build's
    cv2.setNumThreads(1)
    pipe: Any = Connection(descriptor)
    while True:
        try:
            detector, rgb = pipe.recv()
        except EOFError:
            return
        try:
            plugins.loaded(detector)
            pipe.send(None)
            answer: tuple[str, Any] = "", plugins.found(detector, rgb)
        except Rejected as error:
            answer = error.reason, error.detail
        except BuildError as error:
            answer = BuildError.__name__, str(error)
        pipe.send(answer)
