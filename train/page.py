"""A run as one page, RUN/index.html: curves, what they cost, and the model's own pictures.

It is made from the files in the run folder, and can be made again from them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import write_atomically
from shards.html import image, page, text
from shards.progress import counted
from train.charts import COLOURS, Line, chart
from train.metrics import COLLAPSED, DECILES, FACTS, duration, read_facts, read_metrics

GIVEN = {"crop": "jpg", "weight": "png", "visible": "jpg"}  # strips that stay the same
SHOWN = 7  # saves whose reconstructions are side by side
PAGE = "index.html"
Row = dict[str, Any]
STYLE = """.charts{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr))}
.charts svg{width:100%;height:auto}
.strips{display:grid;gap:.4rem;grid-template-columns:repeat(auto-fit,minmax(84px,1fr))}
.strips img{width:100%;display:block;border-radius:2px}.strips .cells img{image-rendering:pixelated}
.warning{border-left:4px solid #d1495b;padding-left:.7rem}
summary{cursor:pointer}"""


class Read:
    """What a run has written of itself: facts (run.json), rows (metrics.jsonl)."""

    def __init__(self, run: Path) -> None:
        self.run, self.rows = run, read_metrics(run)
        self.facts: Row = read_facts(run)
        self.recipe: Row = self.facts.get("recipe", {})
        ours = isinstance(self.recipe, dict) and {"batch", "epochs"} <= self.recipe.keys()
        if not ours or "seed" not in self.facts:
            raise UserError(f"{run / FACTS} is not of `kamim pretrain`; name a folder of its runs")

    def of(self, name: str) -> tuple[list[float], list[float]]:
        """(epochs, values) of the rows that have the figure `name`."""
        found = [(row["epoch"], row[name]) for row in self.rows if name in row]
        return [epoch for epoch, _ in found], [value for _, value in found]

    def last(self, name: str) -> float:
        """The newest value of the figure `name`; nan if there is none."""
        return float((self.of(name)[1] or [math.nan])[-1])

    def left(self) -> float:
        """Seconds to the end of the run, by its newest speed."""
        images = self.recipe["batch"] * (self.rows[-1]["step"] + 1) / self.rows[-1]["epoch"]
        speed = self.last("images_per_s")
        return max(0.0, self.recipe["epochs"] - self.rows[-1]["epoch"]) * images / speed


def pictures_of(run: Path) -> Path:
    """The folder of the strips of a run."""
    return run / "pictures"


def write_page(run: Path) -> Path:
    """Write the page of the run in folder `run`; returns its path. It has a row at least."""
    path, found = run / PAGE, Read(run)
    parts = [_where(found), _warning(found), f"<div class=charts>{''.join(charts(found))}</div>"]
    parts += [*_strips(run), _facts(found)]
    write_atomically(path, page(run.name, parts, STYLE).encode("utf-8"), durable=False)
    return path


def _where(found: Read) -> str:
    """What runs, how far it is, and when it ends."""
    row, recipe, facts = found.rows[-1], found.recipe, found.facts
    speed, spent = found.last("images_per_s"), found.last("seconds")
    weights = f"{facts['detector']} weights" if facts["detector"] else "no weights"
    ended = row["epoch"] * (1 + 1 / (row["step"] + 1)) > recipe["epochs"]  # no room for a step
    state = "finished" if ended else f"about {duration(found.left())} left"
    looks = sum(found.of("look_seconds")[1])
    cost = f", {looks / spent:.1%} of them for looks at the features" if looks else ""
    return (
        f"<p>{text(recipe['model'])}, {text(recipe['method'])}, {text(weights)}, seed "
        f"{facts['seed']}, on {text(facts['shards_folder'])}<p><b>Step {row['step'] + 1:,}, epoch "
        f"{row['epoch']:.2f} of {recipe['epochs']:g}: {state}</b>. {speed:,.0f} images per second; "
        f"{duration(spent)} so far{cost}; {found.last('waiting'):.1%} of the time waiting for data."
    )


def _warning(found: Read) -> str:
    if not found.last("attention_nmi") < COLLAPSED:
        return ""
    return (
        f"<p class=warning>Attention is uniform: mutual information of query and key is below "
        f"{COLLAPSED} in every block, so it does not depend on the image."
    )


def charts(found: Read) -> list[str]:
    """The charts of a run, of what it has rows of."""

    def line(key: str, name: str = "", number: int = 0) -> Line:
        return Line(name, *found.of(key), COLOURS[number], dotted=number == 7)

    uniform = line("attention_uniform", "uniform attention", 7)
    looked = {
        "top-1 on the held-out tenth": [
            line("probe_top1", "linear probe"),
            line("knn_top1", "20-NN", 1),
        ],
        "effective rank of the features": [line("effective_rank")],
        "attention distance, px": [line("attention_distance", "mean of the blocks"), uniform],
        "mutual information, best block": [line("attention_nmi")],
    }
    plain = {
        "images per second": [line("images_per_s")],
        "share of time waiting for data": [line("waiting")],
        "learning rate": [line("lr")],
        "share of steps whose gradient was clipped": [line("clip_rate")],
    }
    if any(share < 1 for share in found.of("effective_share")[1]):
        plain["effective share of an image's weights"] = [line("effective_share")]
    made = [chart("loss", [line("loss")])]
    made += [chart(name, of, low=0, marks=True) for name, of in looked.items() if of[0].x]
    made += deciles(found)
    return made + [chart(name, of, low=0) for name, of in plain.items() if of[0].x]


def deciles(found: Read) -> list[str]:
    """The chart of the error by density, of a few looks from the first to the last."""
    rows = [row for row in found.rows if DECILES[0] in row]
    if not rows:
        return []
    places = sorted({round(n * (len(rows) - 1) / 3) for n in range(4)})
    tenths = range(1, len(DECILES) + 1)
    lines = [
        Line(f"epoch {row['epoch']:.3g}", tenths, [row[name] for name in DECILES], colour)
        for row, colour in zip([rows[place] for place in places], COLOURS, strict=False)
    ]
    name = "tenth of the masked cells, by density"
    return [chart("error by density", lines, name, low=0, marks=True, across=(1, len(tenths)))]


def _strips(run: Path) -> list[str]:
    """Reconstructions of the same images at several saves, beside what they are made of."""
    folder = pictures_of(run)
    saves = sorted(folder.glob("step-*.jpg"))
    if not saves:
        return []
    titles = {"crop": "crop", "weight": "loss weight", "visible": "visible"}
    parts = [
        "<h2>What the model makes of images</h2><p>The same images at "
        f"{min(SHOWN, len(saves))} of {counted(len(saves), 'save')}: the model sees the visible "
        "cells and makes the others. Colours of weights are of their logarithm, each image's in "
        f"its own range.<div class=strips style='max-width:{132 * (SHOWN + 3)}px'>"
    ]
    for name, form in GIVEN.items():
        if (folder / f"{name}.{form}").exists():
            kind = " class=cells" if form == "png" else ""
            picture = image((folder / f"{name}.{form}").read_bytes(), form, titles[name])
            parts.append(f"<figure{kind}>{picture}<figcaption>{titles[name]}</figcaption></figure>")
    for path in chosen(saves):
        title = f"step {int(path.stem[5:]):,}"
        picture = image(path.read_bytes(), "jpg", f"reconstructions at {title}")
        parts.append(f"<figure>{picture}<figcaption>{title}</figcaption></figure>")
    return [*parts, "</div>"]


def chosen(saves: Sequence[Path], most: int = SHOWN) -> list[Path]:
    """At most `most` of `saves`: the first and the last, more of the early ones."""
    count = len(saves)
    if count <= most:
        return list(saves)
    places = {round(count ** (n / (most - 1))) - 1 for n in range(most)}
    later = (place for place in range(count) if place not in places)
    while len(places) < most:
        places.add(next(later))
    return [saves[place] for place in sorted(places)]


def _facts(found: Read) -> str:
    """All that decides the run's numbers."""
    facts = {k: v for k, v in found.facts.items() if k != "recipe"}
    rows = "".join(f"<tr><th>{text(k)}<td>{text(v)}" for k, v in (found.recipe | facts).items())
    head = "<h2>Settings</h2><details><summary>recipe, seed, shards</summary>"
    return f"{head}<table>{rows}</table></details>"
