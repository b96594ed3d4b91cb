"""Hostile archives, checkpoints, arrays and names: nothing is followed, executed or let out.

Lost means that a canary died, a secret was read, a file appeared outside the output folder, a
program ran, or the answer was not one plain line.
"""

import io
import os
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from stress.cases import Case
from stress.forked import kamim, spawn
from stress.kills import LIMIT, warm_up
from stress.layouts import layouts
from stress.material import SMALL, make_source, small_photographs
from stress.pickles import arrays, checkpoints
from stress.sources import COLOUR, NAMES, sources


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
    yield layouts(arena, photos, secret)
    built = arena / "built"
    flags = [*SMALL, "--shard-size", 4]
    source = make_source(arena / "source", 12, seed)
    process = spawn(kamim, "shards", "build", source, built, *flags, log=arena / "setup.log")
    assert process.wait(LIMIT) == 0, process.text()
    yield checkpoints(arena, built)
    yield arrays(arena, built)
    yield pages(arena, photos, built)


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
    for title, names, word in (
        ("calm", [f"{n:03d}.jpg" for n in range(len(NAMES))], "calm"),
        ("evil", NAMES, evil),
    ):
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
