"""Source tars and folders that somebody else made to do harm, through the real build.

Lost means that a secret was read, a file appeared outside the output folder, a program ran, or a
sound photograph was not built.
"""

import io
import os
import socket
import tarfile
from pathlib import Path
from typing import Any

from stress.cases import Case
from stress.forked import call, kamim
from stress.kills import LIMIT
from stress.material import SMALL
from stress.watch import Around, spawn_watched

COLOUR = (255, 0, 254)  # of the secret picture, and of nothing else
NAMES = [
    "<script>alert(1)</script>.jpg",
    '"><img src=x onerror=alert(1)>.jpg',
    "'onmouseover='alert(1).jpg",
    "<!--.jpg",
    "new\nline.jpg",
    "\x1b[2Jclear.jpg",
    "&lt;b&gt;.jpg",
    "..jpg",
    "a\\..\\..\\b.jpg",
    "%2e%2e%2fx.jpg",
    "-rf.jpg",
    "$(touch x).jpg",
    "\u202egpj.jpg",
    "\udcff\udcfe.jpg",
    "x" * 200 + ".jpg",
]


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
            with tarfile.open(
                source, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape", encoding="utf-8"
            ) as archive:
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
        case.trial(built(arena, source, place / "out", secret, trick, len(photos)))
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


def built(arena: Path, source: object, out: Path, secret: Path, trick: str, sound: int) -> str:
    """What went wrong with a build of `source`, which holds at least `sound` sound photographs."""
    around, log = Around(arena), arena / "archive.log"
    flags = [*SMALL, "--jobs", 1, "--max-rejected", 1, "--partial"]
    process = spawn_watched(
        kamim, "shards", "build", source, out, *flags, log=log, secret=secret, allowed=[out]
    )
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
    from shards import ShardSet, decode_frame
    from shards.verification import verify_shards

    records = ShardSet(folder)
    frames = [decode_frame(records[n].frame).reshape(-1, 3) for n in range(len(records))]
    secret = sum(bool((abs(f.mean(0) - COLOUR) < 6).all()) for f in frames)
    return {"written": len(records), "secret": secret, "problems": verify_shards(folder, "decode")}
