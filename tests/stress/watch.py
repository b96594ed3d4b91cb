"""Whether anything came out of its folder: a process watched from within, and what lies around it.

It tells each write, start of a program, unpickled class or connection beyond the folders that a
function may write to, and each file around that is not as it was.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stress.forked import Process, spawn
from stress.material import files

PATHS = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
)
NEVER = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
    "marshal.loads",
    "ctypes.dlopen",
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def spawn_watched(
    function: Callable[..., Any], *arguments: Any, log: Path, secret: Path, allowed: list[Path]
) -> Process:
    """As `spawn`; what it did that it must not do is in `log` with the suffix .deeds."""
    deeds = log.with_suffix(".deeds")
    homes = [os.path.realpath(path) for path in [*map(str, allowed), "/dev"]]

    def watched() -> None:
        note = os.open(deeds, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        hidden = os.path.realpath(secret)

        def hook(event: str, details: tuple[Any, ...]) -> None:
            for deed in _deeds(event, details, homes, hidden):
                os.write(note, (deed.replace("\n", "\\n") + "\n").encode(errors="replace"))

        sys.addaudithook(hook)
        function(*arguments)

    return spawn(watched, log=log)


def _deeds(event: str, details: tuple[Any, ...], homes: list[str], hidden: str) -> list[str]:
    if event in NEVER:
        if event == "marshal.loads" or _own(event, details):
            return []
        return [f"{event} {details!r}"[:300]]
    touched: list[Any] = []
    if event == "open":
        path, _, flags = details
        if isinstance(path, str | bytes) and os.path.realpath(os.fsdecode(path)) == hidden:
            return [f"the secret was opened: {path!r}"]
        if isinstance(flags, int) and flags & WRITING:
            touched = [path]
    elif event in PATHS:
        touched = list(details[: 2 if event in ("os.rename", "os.link", "shutil.move") else 1])
    # A name beside an open folder comes with that folder's descriptor, last.
    folder = details[-1] if event in PATHS and type(details[-1]) is int else -1
    here = os.readlink(f"/proc/self/fd/{folder}") if folder > 2 and event != "os.mkdir" else "."
    strays = []
    for path in touched:
        if isinstance(path, str | bytes | os.PathLike):
            whole = os.path.abspath(os.path.join(here, os.fsdecode(path)))
            there = os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
            if not any((there + "/").startswith(home + "/") for home in homes):
                strays.append(f"{event} {there!r}")
    return strays


def _own(event: str, details: tuple[Any, ...]) -> bool:
    """Whether it is what libraries do with files of their own, at import: loading themselves."""
    if event == "ctypes.dlopen":
        name = details[0]
        return name is None or not str(name).startswith("/tmp")
    return False


class Around:
    """Every file in and below `root` but those below `out`, then and now."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.before = files(root)

    def changed(self, *but: Path) -> list[str]:
        """Names of files that are new, gone or different, beyond those below `but`."""
        after, spared = files(self.root), [str(path.relative_to(self.root)) for path in but]
        names = {n for n in self.before | after if self.before.get(n) != after.get(n)}
        return sorted(n for n in names if not any(n == s or n.startswith(f"{s}/") for s in spared))
