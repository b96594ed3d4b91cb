"""Local copies of a remote set's files, below a limit, for any number of processes of a machine.

Every file is held to the manifest's sha256. A file in use is locked (flock), so that nobody evicts
it; the kernel lets go of it however the process dies.
"""

import fcntl
import os
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from shards.crops import Ints
from shards.dataset import Held
from shards.errors import UserError
from shards.files import check_sha256, check_size
from shards.remote.retry import LOG
from shards.remote.storage import Store
from shards.spec import File, Manifest, fingerprint

FOLDER, PART = "kamim-", ".part"
SET, PARTIAL = re.compile(FOLDER + "[0-9a-f]{32}"), re.compile(r".*\.(\d+)\.part")
TRIES = 2  # at a file that does not arrive as the manifest says
WAIT, LONG_WAIT = 0.05, 0.25  # seconds between looks at another's download, and for room


class Copies:
    """The files of one set that are here, in a folder of `cache` named by what they hold.

    limit: bytes of all sets in `cache`, 0 for none; what is needed at once is fetched even where
    that takes more. checksum: hash what is found here before its first use (what is fetched is
    always hashed).
    """

    def __init__(
        self, store: Store, manifest: Manifest, cache: Path, limit: int, checksum: bool = True
    ) -> None:
        self.store, self.cache, self.limit, self.checksum = store, cache, limit, checksum
        self.sizes = [shard.bytes for shard in manifest.shards]
        self.extra = manifest.index.bytes
        self.numbers = {shard.name: number for number, shard in enumerate(manifest.shards)}
        content = [asdict(file) for file in [*manifest.shards, manifest.index]]
        self.folder = cache / (FOLDER + fingerprint({"files": content})[:32])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sound: dict[str, tuple[int, int]] = {}  # inode and time of what was hashed

    def check(self, window: int) -> None:
        """Raise UserError if a window of so many shards and the next cannot be held at once."""
        most = sorted(self.sizes, reverse=True)
        total, room = sum(most), self.limit - self.extra
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if files > 0 and 2 * min(window, len(most)) > files - 100:
            raise UserError(
                f"two windows of {window} shards are more open files than the {files} allowed; "
                "use a smaller --window, or raise it by ulimit -n"
            )
        need = min(total, 2 * sum(most[:window]))
        if self.limit and need > room:
            fits = next((n for n in range(window, 0, -1) if 2 * sum(most[:n]) <= room), 0)
            advice = f", or --window {fits}" if fits else ""
            raise UserError(
                f"a cache limit of {self.limit / 1e9:g} GB is too small: a window of {window} "
                f"shards and the next take up to {need / 1e9:.3g} GB; use --cache-limit "
                f"{need + self.extra}{advice}"
            )

    def hold(
        self,
        file: File,
        needed: Callable[[], bool] = lambda: True,
        next_use: Callable[[], Ints] | None = None,
    ) -> Held:
        """`file`, open and sound, fetched if it is not here; it stays until it is let go of.

        needed: asked again and again while it waits, whether it is needed at once; may raise to
        give up. next_use: a number for each shard of the set, larger for those needed later.
        """
        while True:
            held = self._present(file) or self._fetched(file, needed, next_use)
            if held:
                return held
            needed()

    def _present(self, file: File) -> Held | None:
        """`file` if it is here and sound; a damaged one is removed."""
        path = self.folder / file.name
        try:
            held = Held(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        fcntl.flock(held.descriptor, fcntl.LOCK_SH)
        stat = os.fstat(held.descriptor)
        if not stat.st_nlink:  # evicted before we locked it
            return None
        identity = stat.st_ino, stat.st_mtime_ns
        if self.sound.get(file.name) != identity:
            try:
                check_size(path, file.bytes)
                if self.checksum:
                    check_sha256(path, file.sha256)
            except ValueError:
                LOG.warning("%s is damaged; it is fetched again", path)
                path.unlink(missing_ok=True)
                return None
            self.sound[file.name] = identity
        os.utime(held.descriptor, ns=(time.time_ns(), stat.st_mtime_ns))
        return held

    def _fetched(
        self, file: File, needed: Callable[[], bool], next_use: Callable[[], Ints] | None
    ) -> Held | None:
        """`file` from the store; None, after a while, if others are at it or there is no room."""
        part = self.folder / f"{file.name}.{file.bytes}{PART}"
        held = self._claim(file, part, needed, next_use)
        if held is None:
            return None
        try:
            self._download(file, part, needed)
            with self._alone():
                # Not synced: after a power cut the checksum before its first use finds the damage.
                part.rename(self.folder / file.name)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        stat = os.fstat(held.descriptor)
        self.sound[file.name] = stat.st_ino, stat.st_mtime_ns
        fcntl.flock(held.descriptor, fcntl.LOCK_SH)
        return held if os.fstat(held.descriptor).st_nlink else None

    def _download(self, file: File, part: Path, needed: Callable[[], bool]) -> None:
        for attempt in range(TRIES):
            try:
                self.store.download(file.name, part, needed)
                check_size(part, file.bytes)
                check_sha256(part, file.sha256)
                return
            except FileNotFoundError as error:
                raise UserError(f"{error}, the manifest lists it; restore it") from None
            except ValueError as error:
                if attempt + 1 == TRIES:
                    name = f"{self.store.url}/{file.name}"
                    raise UserError(str(error).replace(str(part), name)) from None

    def _claim(
        self,
        file: File,
        part: Path,
        needed: Callable[[], bool],
        next_use: Callable[[], Ints] | None,
    ) -> Held | None:
        """The locked, empty `part` to write `file` into: it is ours to fetch and there is room."""
        at_once = needed()
        with self._alone():
            if (self.folder / file.name).exists():
                return None
            held = Held(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644))
            wait = WAIT
            if _locked(held):
                if self._make_room(file, at_once, next_use):
                    return held
                part.unlink()
                wait = LONG_WAIT
        time.sleep(wait)
        return None

    def _make_room(self, file: File, at_once: bool, next_use: Callable[[], Ints] | None) -> bool:
        """Whether all files, with the part of `file`, are below the limit, some being evicted.

        First go those that this set's order does not read, the longest unused first; then those
        read last: an epoch reads every shard once, so the last used would be the wrong ones to
        keep. What is read before `file` stays, unless it is needed at once.
        """
        files = self.listed() if self.limit else []
        excess = sum(entry.bytes for entry in files) - self.limit
        if excess <= 0:
            return True
        uses = next_use() if next_use else None
        mine = self.numbers.get(file.name)
        own = -1 if at_once or uses is None or mine is None else int(uses[mine])

        def use(entry: "_Entry") -> float:
            number = self.numbers.get(entry.path.name)
            known = uses is not None and number is not None and entry.path.parent == self.folder
            return float(uses[number]) if known else float("inf")  # type: ignore[index]

        for entry in sorted(files, key=lambda entry: (-use(entry), entry.used)):
            if excess <= 0 or use(entry) <= own:
                break
            excess -= entry.bytes if _evicted(entry.path) else 0
        return excess <= 0 or at_once

    def listed(self) -> list["_Entry"]:
        """Every file of every set in the cache; a download counts as what it will be. Other folders
        that lie there are somebody's own.
        """
        found = []
        for folder in self.cache.glob(FOLDER + "*/"):
            if not SET.fullmatch(folder.name):
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        stat = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if S_ISREG(stat.st_mode):
                        part = PARTIAL.fullmatch(entry.name)
                        size = int(part[1]) if part else stat.st_size
                        found.append(_Entry(Path(entry.path), size, stat.st_atime_ns))
        return found

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process, and one thread, at a time: for moments, never while something is fetched."""
        with (self.cache / ".lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _Entry(NamedTuple):
    """A file of the cache, its size and when it was last used."""

    path: Path
    bytes: int
    used: int


def _locked(held: Held) -> bool:
    """Lock a file for this process alone; False if someone else holds it."""
    try:
        fcntl.flock(held.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _evicted(path: Path) -> bool:
    """Remove a file unless someone holds it."""
    try:
        held = Held(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return True
    if not _locked(held):
        return False
    path.unlink(missing_ok=True)
    return True
