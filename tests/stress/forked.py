"""Processes that may be killed: forked from one that has imported everything, seconds saved each.

Each is in a group of its own, its output in a file. The forking process must not have computed
anything in threads: a fork does not copy them.
"""

import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Process:
    """A running fork; `log` is its stdout and stderr."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log, self.began = pid, log, time.monotonic()
        self.status: int | None = None  # as of a shell: 128 + signal if it was killed
        self.peak = 0.0  # MB, of the largest process of its group

    def poll(self) -> int | None:
        """The status, or None while it runs."""
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code
                self.peak = max(self.peak, usage.ru_maxrss / 1024)
        return self.status

    def wait(self, limit: float) -> int | None:
        """The status; None if it ran after `limit` seconds, and was killed. Ends its group."""
        until, looked = time.monotonic() + limit, 0.0
        while self.poll() is None and (now := time.monotonic()) < until:
            if now > looked + 0.2:
                self.peak, looked = max(self.peak, largest(self.pid)), now
            time.sleep(0.002)
        hung = self.status is None
        self.kill()
        return None if hung else self.status

    def kill(self) -> None:
        """SIGKILL to the whole group; returns when the process itself is gone."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)

    def text(self) -> str:
        """What it wrote."""
        return self.log.read_text(errors="replace")


def largest(group: int) -> float:
    """The most memory, in MB, that any living process of `group` has had at once."""
    found = [0.0]
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getpgid(int(folder.name)) == group:
                status = (folder / "status").read_text()
                found += [int(kb) / 1024 for kb in re.findall(r"VmHWM:\s*(\d+)", status)]
    return max(found)


def spawn(function: Callable[..., Any], *arguments: Any, log: Path) -> Process:
    """`function(*arguments)` in a fork; its exit status is SystemExit's, 0, or 70 if it raised."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Process(pid, log)
    status = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # or Ctrl-C would leave it behind
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # Under pytest these may be its own, which go elsewhere.
        sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        function(*arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(status)


def call(function: Callable[..., Any], *arguments: Any, log: Path, limit: float = 600) -> Any:
    """What `function(*arguments)` returns, as JSON, from a fork. RuntimeError if it fails."""
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    process = spawn(lambda: answer.write_text(json.dumps(function(*arguments))), log=log)
    if process.wait(limit) != 0:
        raise RuntimeError(f"{function.__name__} failed ({process.status}): {process.text()}")
    return json.loads(answer.read_text())


def kamim(*arguments: object) -> None:
    """The command line, as `kamim ARGUMENTS` would run it. Raises SystemExit."""
    import kamim.__main__ as command

    sys.argv = ["kamim", *map(str, arguments)]
    command.main()


def behind(prepare: Callable[[], object], *arguments: object) -> None:
    """The command line where `prepare` has made something fail. Raises SystemExit."""
    prepare()
    kamim(*arguments)


def fresh(*arguments: object, **environment: str) -> None:
    """`kamim ARGUMENTS` by a new interpreter in this process's place."""
    line = [sys.executable, "-m", "kamim", *map(str, arguments)]
    os.execve(sys.executable, line, {**os.environ, **environment})
