"""Power cuts, replayed: a command's system calls are recorded, what a disk may have kept of them at
any moment is laid out again, and the same command goes on.

Nothing that was not synced has to be there: of a file its content, of a folder its new names,
renames and removals. Each moment is tried three ways: nothing unsynced is there; all names are, and
no unsynced content; and by chance, names up to some moment per folder, contents whole, cut or
zeroed. Survived means that a set that looks finished is sound, and that the same command ends with
the bytes or losses of a run left in peace. The order of renames within one folder is kept, as
journals keep it, and folders themselves are taken to be there.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stress.cases import REPOSITORY, Case
from stress.faults import again, calm
from stress.forked import call
from stress.kills import Job, jobs, warm_up

NAMES = ("build, 1 process", "convert, JPEG frames", "copy", "pretrain, 1 process")
MOMENTS = 40  # of each command, each in three ways
CALLS = "openat,creat,close,dup,dup2,dup3,lseek,write,pwrite64,writev,pwritev,ftruncate,truncate,"
CALLS += "fallocate,fsync,fdatasync,sync_file_range,sendfile,copy_file_range,rename,renameat,"
CALLS += "renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir,link,linkat,symlink,symlinkat,fcntl"
LINE = re.compile(r"(?:\d+ +)?(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+)")
TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
SENT = re.compile(r"\d+<[^>]*>, \d+<([^>]*)>, \[(\d+)\]")


@dataclass(eq=False, slots=True)
class Content:
    """Of one file: what its readers see, and what a power cut leaves at least."""

    now: bytes = b""
    kept: bytes = b""

    def write(self, at: int, data: bytes) -> None:
        self.now = self.now[:at].ljust(at, b"\0") + data + self.now[at + len(data) :]


Change = list[tuple[str, Content | None]]  # names and what they then are: one, or two of a rename


@dataclass(slots=True)
class Disk:
    """Names below `root` as they are, as they were synced, and what came in between by folder."""

    root: str
    names: dict[str, Content] = field(default_factory=dict)
    kept: dict[str, Content] = field(default_factory=dict)
    pending: dict[str, list[Change]] = field(default_factory=dict)

    def change(self, *changes: tuple[str, Content | None]) -> None:
        _apply(self.names, list(changes))
        self.pending.setdefault(os.path.dirname(changes[-1][0]), []).append(list(changes))

    def sync(self, path: str) -> None:
        if path in self.names:
            self.names[path].kept = self.names[path].now
        for changes in self.pending.pop(path, []):
            _apply(self.kept, changes)

    def after_a_cut(self, way: str, rng: random.Random) -> dict[str, bytes]:
        """Files that are there when the power is back, with their content."""
        if way == "all names, no unsynced content":
            return {name: content.kept for name, content in self.names.items()}
        names = dict(self.kept)
        if way == "by chance":
            for changes in self.pending.values():
                for change in changes[: rng.randint(0, len(changes))]:
                    _apply(names, change)
            return {name: _some(content, rng) for name, content in names.items()}
        return {name: content.kept for name, content in names.items()}


WAYS = ("nothing unsynced", "all names, no unsynced content", "by chance")


def _apply(names: dict[str, Content], changes: Change) -> None:
    for name, content in changes:
        names.pop(name, None)
        if content is not None:
            names[name] = content


def _some(content: Content, rng: random.Random) -> bytes:
    """The kept content, the newest, or the newest with its unsynced end cut or zeroed."""
    if content.now == content.kept:
        return content.now
    synced = len(content.kept) if content.now.startswith(content.kept) else 0
    cut = rng.randint(synced, len(content.now))
    zeroed = content.now[:cut] + bytes(len(content.now) - cut)
    return rng.choice([content.kept, content.now, content.now[:cut], zeroed])


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case a command."""
    if not shutil.which("strace"):
        yield Case("power", "power cuts", note="not run: strace is not installed")
        return
    warm_up()
    for job in jobs(arena, seed):
        if job.name in NAMES:
            yield cuts(job, arena, max(1, round(MOMENTS * scale)), seed)


def cuts(job: Job, arena: Path, count: int, seed: int) -> Case:
    """One command, cut off at `count` moments in each of the WAYS."""
    case, rng = Case("power", job.name), random.Random(f"power {job.name} {seed}")
    wanted, _ = calm(job, arena)
    out = arena / "out"
    shutil.rmtree(out, ignore_errors=True)
    events = list(recorded(job, out, arena))
    for moment in sorted(rng.sample(range(1, len(events) + 1), min(count, len(events)))):
        for way in WAYS:
            disk = replayed(events[:moment], str(out))
            lay(disk.after_a_cut(way, rng), out)
            flaw = "" if sound(job, out, arena) else "it looks finished and is not"
            case.trial(_said(flaw or again(job, out, arena, wanted), events[moment - 1], way))
    case.note = f"{len(events):,} calls that write; three ways at {count} moments"
    return case


def _said(flaw: str, event: "Event", way: str) -> str:
    return f"after {event.name} {event.paths}, {way}: {flaw}" if flaw else ""


def sound(job: Job, out: Path, arena: Path) -> bool:
    """Whether the set at `out`, if it looks finished, is all there."""
    if job.done != "manifest.json" or not (out / job.done).exists():
        return True
    return not call(_problems, str(out), log=arena / "problems.log")


def _problems(folder: str) -> list[str]:
    from shards import verify

    return verify(folder, "checksum")


@dataclass(slots=True)
class Event:
    """A call that succeeded: its paths below the output, and what it wrote where."""

    name: str
    paths: list[str]
    at: int = 0
    data: bytes = b""


def recorded(job: Job, out: Path, arena: Path) -> Iterator[Event]:
    """The calls of `job`, run once in peace, that change what is below `out`."""
    trace = arena / "trace"
    line = ["strace", "-f", "-qq", "-xx", "-y", "-s", "100000000", "-e", f"trace={CALLS}"]
    line += ["-e", "signal=none", "-o", trace, sys.executable, "-c", _TINY, *job.arguments(out)]
    paths = [str(REPOSITORY), str(REPOSITORY / "tests")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, line)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with trace.open(encoding="latin1") as lines:
        yield from parsed(whole_lines(lines), str(out))


_TINY = "from stress.kills import warm_up; warm_up(); from kamim.__main__ import main; main()"


def whole_lines(lines: Iterator[str]) -> Iterator[str]:
    """Calls that strace tells in two lines, because another thread came between, as one."""
    begun: dict[str, str] = {}
    for line in lines:
        thread = line.split(" ", 1)[0]
        if line.rstrip().endswith("<unfinished ...>"):
            begun[thread] = line[: line.rindex("<unfinished ...>")]
        elif "resumed>" in line:
            yield begun.pop(thread, "") + line[line.index("resumed>") + len("resumed>") :]
        else:
            yield line


def parsed(lines: Iterator[str], root: str) -> Iterator[Event]:
    """Events below `root` of one traced process and its threads."""
    at: dict[int, list[int]] = {}  # of each descriptor its offset, shared by those it was dup'd to
    appends: set[int] = set()
    sizes: dict[str, int] = {}
    for line in lines:
        match = LINE.match(line.strip())
        if not match or int(match[3], 0) < 0:
            continue
        name, given, result = match[1], match[2], int(match[3], 0)
        texts = [_decoded(text) for text, _ in TEXT.findall(given)]
        if name == "openat":
            at[result] = [0]
            path = os.path.normpath(texts[0].decode())
            appends.discard(result)
            if _inside(path, root) and "O_DIRECTORY" not in given and "O_CREAT" in given:
                if "O_APPEND" in given:
                    appends.add(result)
                yield Event("open" if "O_TRUNC" not in given else "truncate", [path])
            continue
        if name in ("rename", "renameat", "renameat2", "link", "linkat"):
            paths = [os.path.normpath(text.decode()) for text in texts[:2]]
            if _inside(paths[1], root):
                yield Event("rename" if name.startswith("rename") else "link", paths)
            continue
        if name in ("unlink", "unlinkat"):
            path = _joined(given, texts[0].decode())
            if _inside(path, root):
                yield Event("unlink", [path])
            continue
        opened = re.match(r"(\d+)(?:<((?:\\x[0-9a-f]{2})*|[^>]*)>)?", given)
        if not opened:
            continue
        number, path = int(opened[1]), _decoded(opened[2] or "").decode(errors="replace")
        offset = at.setdefault(number, [0])
        if name in ("dup", "fcntl", "dup2", "dup3") and ("F_DUPFD" in given or name != "fcntl"):
            at[result] = offset
        elif name == "lseek":
            offset[0] = result
        elif name == "close":
            at.pop(number, None)
        elif not _inside(path, root):
            if name in ("write", "writev"):
                offset[0] += result
        elif name in ("write", "writev"):
            begin = sizes.get(path, 0) if number in appends else offset[0]
            yield Event("write", [path], begin, b"".join(texts)[:result])
            offset[0] = begin + result
            sizes[path] = max(sizes.get(path, 0), offset[0])
        elif name in ("pwrite64", "pwritev"):
            begin = int(given.rsplit(", ", 1)[1], 0)
            yield Event("write", [path], begin, b"".join(texts)[:result])
        elif name in ("fsync", "fdatasync"):
            yield Event("sync", [path])
        elif name == "ftruncate":
            yield Event("resize", [path], int(given.rsplit(", ", 1)[1], 0))
        elif name == "sendfile":  # what is sent is still there to be read
            source, begin = SENT.match(given).groups()
            with open(_decoded(source), "rb") as file:
                file.seek(int(begin))
                yield Event("write", [path], offset[0], file.read(result))
            offset[0] += result
        elif name in ("copy_file_range", "fallocate", "sync_file_range"):
            raise NotImplementedError(f"{name} on {path}: what it writes is not in the trace")


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", "")) if text.startswith("\\x") else text.encode()


def _inside(path: str, root: str) -> bool:
    return path.startswith(root + "/") or path == root


def _joined(given: str, path: str) -> str:
    """A path that may be told relative to an open folder."""
    folder = re.match(r"\d+<((?:\\x[0-9a-f]{2})+)>", given)
    return os.path.normpath(os.path.join(_decoded(folder[1]).decode() if folder else "", path))


def replayed(events: list[Event], root: str) -> Disk:
    """The disk after `events`."""
    disk = Disk(root)
    for event in events:
        path = event.paths[0]
        if event.name in ("open", "truncate"):
            if path not in disk.names:
                disk.change((path, Content()))
            elif event.name == "truncate":
                disk.names[path].now = b""
        elif event.name == "rename":
            if path in disk.names:
                disk.change((path, None), (event.paths[1], disk.names[path]))
            else:  # a folder, with all that is in it
                inside = [name for name in disk.names if _inside(name, path)]
                for name in inside:
                    moved = event.paths[1] + name[len(path) :]
                    disk.change((name, None), (moved, disk.names[name]))
        elif event.name == "link":
            disk.change((event.paths[1], disk.names[path]))
        elif event.name == "unlink":
            disk.change((path, None))
        elif event.name == "sync":
            disk.sync(path)
        elif path in disk.names and event.name == "write":
            disk.names[path].write(event.at, event.data)
        elif path in disk.names:
            disk.names[path].now = disk.names[path].now[: event.at].ljust(event.at, b"\0")
    return disk


def lay(files: dict[str, bytes], out: Path) -> None:
    """Make `out` hold just these files."""
    shutil.rmtree(out, ignore_errors=True)
    for name, data in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
