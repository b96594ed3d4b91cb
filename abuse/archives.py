"""Hostile archives, checkpoints, arrays and names: nothing is followed, executed or let out.

In: files that somebody else made. Out: cases; lost means that a canary died, a secret was read,
a file appeared outside the output folder, a program ran, or the answer was not one plain line.
"""

import io
import os
import socket
import tarfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from abuse.cases import Case
from abuse.forked import call, kamim, spawn
from abuse.kills import LIMIT, warm_up
from abuse.material import SMALL, make_source, small_photographs
from abuse.pickles import arrays, checkpoints
from abuse.watch import Around, spawn_watched

COLOUR = (255, 0, 254)  # of the secret picture, and of nothing else
NAMES = [
    "<script>alert(1)</script>.jpg", "\"><img src=x onerror=alert(1)>.jpg",
    "'onmouseover='alert(1).jpg", "<!--.jpg", "new\nline.jpg", "\x1b[2Jclear.jpg",
    "&lt;b&gt;.jpg", "..jpg", "a\\..\\..\\b.jpg", "%2e%2e%2fx.jpg", "-rf.jpg", "$(touch x).jpg",
    "\u202egpj.jpg", "\udcff\udcfe.jpg", "x" * 200 + ".jpg",
]  # fmt: skip


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """The cases; each is small, so that all are tried at any scale."""
    warm_up()
    photos = small_photographs(6, seed)
    secret = arena / "outside" / "secret.jpg"
    secret.parent.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (160, 120), COLOUR).save(buffer, "JPEG", quality=95)
    secret.write_bytes(buffer.getvalue())
    yield sources(arena, photos, secret, "tar")
    yield sources(arena, photos, secret, "folder")
    built = arena / "built"
    flags = [*SMALL, "--shard-size", 4]
    source = make_source(arena / "source", 12, seed)
    process = spawn(kamim, "shards", "build", source, built, *flags, log=arena / "setup.log")
    assert process.wait(LIMIT) == 0, process.text()
    yield checkpoints(arena, built)
    yield arrays(arena, built)
    yield pages(arena, photos, built)


def members(photo: bytes, secret: Path) -> dict[str, list[tarfile.TarInfo]]:
    """Hostile members of a source tar, by what they try."""

    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        info.size = len(photo) if kind == tarfile.REGTYPE else 0
        info.devmajor, info.devminor = 1, 5  # /dev/zero, which never ends
        return info

    far, root = str(secret), "../" * 12
    return {
        "path traversal": [member(f"{root}{far[1:]}2.jpg"), member("a/../../../x.jpg")],
        "absolute names": [member(f"{far}3.jpg"), member("//etc/x.jpg")],
        "symbolic links": [
            member("a/s.jpg", tarfile.SYMTYPE, far),
            member("a/d", tarfile.SYMTYPE, str(secret.parent)),
            member("a/d/through.jpg"),
        ],
        "hard links": [member("a/h.jpg", tarfile.LNKTYPE, far)],
        "devices and pipes": [
            member("a/c.jpg", tarfile.CHRTYPE),
            member("a/b.jpg", tarfile.BLKTYPE),
            member("a/f.jpg", tarfile.FIFOTYPE),
        ],
        "duplicate names": [member("a/0.jpg"), member("a/0.jpg"), member("./a/0.jpg")],
        "names of all kinds": [member(f"a/{name}") for name in NAMES],
        "programs": [member(f"a/0.{end}") for end in ("pyd", "pth", "pickle", "so", "py")],
        "nameless": [member(""), member("."), member(".."), member("/"), member(".jpg")],
    }


def sources(arena: Path, photos: list[bytes], secret: Path, kind: str) -> Case:
    """Builds from hostile tars, or from folders with the like in them."""
    case = Case("archives", f"source {kind}s: links, devices, traversal, names")
    for trick, infos in members(photos[0], secret).items():
        place = arena / f"{kind}-{trick.replace(' ', '-')}"
        place.mkdir()
        if kind == "tar":
            source = place / "source.tar"
            with tarfile.open(source, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape",
                              encoding="utf-8") as archive:  # fmt: skip
                for number, photo in enumerate(photos):
                    info = tarfile.TarInfo(f"a/{number}.jpg")
                    info.size = len(photo)
                    archive.addfile(info, io.BytesIO(photo))
                for info in infos:
                    archive.addfile(info, io.BytesIO(photos[0]))
        else:
            source = place / "source"
            for number, photo in enumerate(photos):
                (source / "a").mkdir(parents=True, exist_ok=True)
                (source / "a" / f"{number}.jpg").write_bytes(photo)
            if not sum(_into_folder(source, info, photos[0]) for info in infos):
                continue
        case.trial(_built(arena, source, place / "out", secret, trick, len(photos)))
    return case


def _into_folder(source: Path, info: tarfile.TarInfo, photo: bytes) -> bool:
    """The member as it can stand in a folder; whether it can."""
    path = source / info.name
    if os.path.isabs(info.name) or ".." in Path(info.name).parts or info.name.strip("./") == "":
        return False
    if path.exists() or path.is_symlink() or path.parent.is_symlink():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    if info.issym():
        path.symlink_to(info.linkname)
    elif info.isfifo():
        os.mkfifo(path)
    elif info.ischr() and os.geteuid() == 0:
        os.mknod(path, 0o020644, os.makedev(info.devmajor, info.devminor))
    elif info.isblk():
        with socket.socket(socket.AF_UNIX) as here:
            here.bind(str(path))
    elif info.isreg():
        path.write_bytes(photo)
    else:
        return False
    return True


def _built(arena: Path, source: Path, out: Path, secret: Path, trick: str, sound: int) -> str:
    """Build, and say what went wrong."""
    around, log = Around(arena), arena / "archive.log"
    flags = [*SMALL, "--jobs", 1, "--max-rejected", 1]
    process = spawn_watched(kamim, "shards", "build", source, out, *flags,
                            log=log, secret=secret, allowed=[out])  # fmt: skip
    status = process.wait(LIMIT)
    if status != 0:
        return f"{trick}: status {status}: {process.text()[-300:]}"
    deeds = log.with_suffix(".deeds").read_text()
    if deeds:
        return f"{trick}: {deeds[:400]}"
    strays = around.changed(out, log, log.with_suffix(".deeds"), arena / "section.log")
    if strays:
        return f"{trick}: around it, {strays[:3]} changed"
    facts = call(_seen, str(out), log=arena / "seen.log")
    if facts["problems"] or facts["secret"] or facts["written"] < sound:
        return f"{trick}: {facts}"
    return ""


def _seen(folder: str) -> dict[str, Any]:
    from shards import ShardSet, decode_frame, verify_shards

    records = ShardSet(folder)
    frames = [decode_frame(records[n].frame).reshape(-1, 3) for n in range(len(records))]
    secret = sum(bool((abs(f.mean(0) - COLOUR) < 6).all()) for f in frames)
    return {"written": len(records), "secret": secret, "problems": verify_shards(folder, "decode")}


class Shape(HTMLParser):
    """The tags of a page with the names of their attributes: what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.tags.append((tag, *(name for name, _ in attrs)))


def pages(arena: Path, photos: list[bytes], built: Path) -> Case:
    """The pages of inspect and analyse have the same tags whatever their inputs are called."""
    case = Case("archives", "HTML injection into the pages of inspect and analyse")
    found: dict[str, dict[str, Any]] = {}
    evil = "<svg onload=alert(1)>&'\""
    for title, names, word in (("calm", [f"{n:03d}.jpg" for n in range(len(NAMES))], "calm"),
                               ("evil", NAMES, evil)):  # fmt: skip
        place = arena / title
        source, out = place / "source", place / word
        for number, name in enumerate(sorted(names, key=os.fsencode)):
            folder = source / (word if number % 2 else f"z{word}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(photos[number % 2])
        run_, log = place / f"run{word}", arena / "page.log"
        train = ["--recipe", "tiny", "--batch", 4, "--epochs", 1, "--device", "cpu"]
        lines: list[list[object]] = [
            ["shards", "build", source, out, *SMALL],
            ["shards", "inspect", out, "--page", place / "inspect.html", "--samples", 50],
            ["pretrain", built, "--out", run_, *train],
            ["analyse", run_, built, "--out", place / "analysis", "--images", 4],
        ]
        for line in lines:
            process = spawn(kamim, *line, log=log)
            status = process.wait(LIMIT)
            case.trial(f"{line[:2]}: status {status}: {process.text()[-300:]}" if status else "")
        page = {"inspect": place / "inspect.html", "analyse": place / "analysis" / "analysis.html"}
        found[title] = {n: Shape(p.read_text()).tags if p.exists() else [] for n, p in page.items()}
    for name in ("inspect", "analyse"):
        calm, bad = found["calm"][name], found["evil"][name]
        case.trial("" if calm and calm == bad else f"{name}: other tags: {set(bad) - set(calm)}")
    return case
