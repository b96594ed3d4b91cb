"""Several runs on one page: their curves together, and means and deviations over seeds."""

import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.errors import UserError
from train.metrics import FACTS

app = typer.Typer()
FIGURES = {  # by the name in metrics.jsonl: a title, what to multiply by, digits
    "loss": ("loss, last epoch", 1, 4),
    "probe_top1": ("linear probe, %", 100, 2),
    "knn_top1": ("20-NN, %", 100, 2),
    "effective_rank": ("effective rank", 1, 1),
    "attention_distance": ("attention distance, px", 1, 1),
    "attention_nmi": ("mutual information", 1, 4),
    "images_per_s": ("images per second", 1, 0),
    "waiting": ("waiting for data, %", 100, 1),
    "seconds": ("hours", 1 / 3600, 2),
}
MEDIANS = ("images_per_s", "waiting")  # of all rows: one row's is noise
# What runs of a column may differ by.
APART = ("seed", "versions", "extended", "shards_folder", "deterministic", "micro_batch")
APART_SHARDS = (
    "<p class=warning>Not all runs have the same shards: their losses, figures and pictures are of "
    "different images."
)
Group = dict[str, Any]


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of runs of `kamim pretrain`.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder for the page.")] = Path(
        "runs/comparison"
    ),
    json_output: Annotated[
        bool, typer.Option("--json", help="Print means and deviations as JSON.")
    ] = False,
) -> None:
    """Compare runs on one page: curves, pictures and a table.

    Runs have common charts, and pictures side by side. A run is called as its folder is. Runs that
    differ only in the seed are one column of the table: mean and standard deviation over seeds. The
    settings that differ are listed below.
    """
    for run in runs:
        if not (run / FACTS).is_file():
            raise UserError(f"{run} is no run; name folders that `kamim pretrain` wrote")
    from shards.files import alone, write_atomically
    from train.page import PAGE, Read

    found = [Read(run) for run in dict.fromkeys(runs)]
    for each in found:
        if not each.rows:
            raise UserError(f"{each.run} has no step yet; leave it out, or train it first")
    groups = grouped(found)
    result = [{k: v for k, v in group.items() if k != "runs"} for group in groups]
    for row, group in zip(result, groups, strict=True):
        row["runs"] = [str(each.run) for each in group["runs"]]
    with alone(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / PAGE, _page(groups).encode("utf-8"), durable=False)
    print(json.dumps(result, indent=2) if json_output else out / PAGE)


def grouped(found: Sequence[Any]) -> list[Group]:
    """Runs (train.page.Read) that differ by their seed alone, together: name, the settings that
    other groups have not, seeds, epochs, and of each of FIGURES mean, deviation (None for one run)
    and count.
    """
    alike: dict[str, list[Any]] = {}
    for each in found:
        alike.setdefault(json.dumps(telling(each), sort_keys=True), []).append(each)
    groups, together = [], list(alike.values())
    for of, name, settings in zip(together, names(together), differing(together), strict=True):
        group: Group = {"name": name, "settings": settings}
        group["seeds"] = [each.facts["seed"] for each in of]
        group |= {"epochs": [round(each.rows[-1]["epoch"], 2) for each in of], "runs": of}
        for figure in FIGURES:
            values = [value for each in of if math.isfinite(value := figure_of(each, figure))]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                mean = statistics.fmean(values)
                group[figure] = {"mean": mean, "deviation": spread, "count": len(values)}
        groups.append(group)
    return groups


def figure_of(run: Any, name: str) -> float:
    """A run's newest value; the mean loss of its last epoch, the median of speeds; nan if none."""
    epochs, values = run.of(name)
    if name == "loss":
        late = (epoch > epochs[-1] - 1 for epoch in epochs)
        return statistics.fmean(compress(values, late))
    if name in MEDIANS and values:
        return statistics.median(values)
    return float(run.last(name))


def names(groups: Sequence[Sequence[Any]]) -> list[str]:
    """What `groups` are called: as the folder of their run, or what the folders of their seeds have
    in common; then A, B and so on, where a name would be there twice.
    """
    found = []
    for of in groups:
        folders = [os.path.basename(os.path.abspath(each.run)) for each in of]
        stems = {re.sub(r"((?<=.)[-_.]seed)?[-_.]?\d+$", "", folder) for folder in folders}
        found.append((len(of) > 1 and len(stems) == 1 and stems.pop()) or folders[0])
    often = Counter(found)
    letters = {name: iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for name in often}
    return [f"{n} {next(letters[n], '')}".rstrip() if often[n] > 1 else n for n in found]


def differing(groups: Sequence[Sequence[Any]]) -> list[dict[str, str]]:
    """Of each of `groups` the settings in which they differ, as words. Hashes have 8 digits."""
    facts = [flat(telling(of[0])) for of in groups]
    keys = [k for k in {k: 0 for f in facts for k in f} if len({str(f.get(k)) for f in facts}) > 1]
    return [{k: _said_short(f.get(k)) for k in keys} for f in facts]


def flat(facts: dict[str, Any]) -> dict[str, Any]:
    """`facts` with a dict's entries, as `options.depth`, in place of the dict."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        found |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {}
        found |= {} if isinstance(value, dict) else {key: value}
    return found


def _said_short(value: Any) -> str:
    words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "none" if value in (None, "") else re.sub(r"\b([0-9a-f]{8})[0-9a-f]{32,}", r"\1", words)


def telling(run: Any) -> dict[str, Any]:
    """The settings of a run that tell it from others: those that decide its numbers, but the seed.

    The micro-batch follows the free memory. It is one of them only where weights are of the whole
    forward pass.
    """
    facts: dict[str, Any] = whole({**run.recipe, **run.facts})
    by_pass = facts.get("normalise") == "batch" or facts.get("weights") == "shuffled"
    apart = [k for k in APART if not (by_pass and k == "micro_batch")]
    return {k: v for k, v in facts.items() if k not in ("recipe", *apart)}


def whole(value: Any) -> Any:
    """`value` with 10 in place of 10.0: a recipe in a file has numbers that one of ours has not."""
    if isinstance(value, dict):
        return {k: whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _page(groups: Sequence[Group]) -> str:
    from shards.html import page, table, text
    from shards.progress import counted
    from train.page import STYLE

    rows: list[list[object]] = [
        ["seeds", *(len(group["seeds"]) for group in groups)],
        ["epochs", *(f"{statistics.fmean(group['epochs']):g}" for group in groups)],
    ]
    for name, (title, times, digits) in FIGURES.items():
        cells = [said(group.get(name), times, digits) for group in groups]
        rows += [[title, *cells]] if any(cells) else []
    head = ["", *(group["name"] for group in groups)]
    parts = [
        table(head, rows),
        "<p>Mean ± standard deviation over runs that differ by their seed alone.",
    ]
    keys = list(groups[0]["settings"])
    if "shards" in keys:
        parts.insert(0, APART_SHARDS)
    if keys:
        differ = [[key, *(group["settings"][key] for group in groups)] for key in keys]
        parts += ["<h2>Settings that differ</h2>", table(head, differ)]
    parts.append(f"<h2>Curves</h2><div class=charts>{''.join(_charts(groups))}</div>")
    pictures = "".join(_strip(group["runs"][0], group["name"]) for group in groups)
    if pictures:
        parts.append(
            f"<h2>What the models make of images</h2><div class=strips "
            f"style='max-width:{140 * len(groups)}px'>{pictures}</div>"
        )
    listed = "".join(
        f"<li>{text(group['name'])}: {text(', '.join(str(each.run) for each in group['runs']))}"
        for group in groups
    )
    count = sum(len(group["runs"]) for group in groups)
    return page(f"{counted(count, 'run')} compared", [*parts, f"<ul>{listed}</ul>"], STYLE)


def said(figure: dict[str, float] | None, times: float, digits: int) -> str:
    """Mean ± deviation of a `figure`; nothing if there is none."""
    if figure is None:
        return ""
    spread = figure["deviation"]
    more = "" if spread is None else f" ± {times * spread:,.{digits}f}"
    return f"{times * figure['mean']:,.{digits}f}{more}"


def _charts(groups: Sequence[Group]) -> list[str]:
    """A chart per figure with a curve per run; the runs of a group have one colour."""
    from train.charts import COLOURS, Line, chart

    titles = {
        "loss": "loss",
        "probe_top1": "linear probe, top-1",
        "knn_top1": "20-NN, top-1",
        "effective_rank": "effective rank of the features",
        "attention_distance": "attention distance, px",
        "attention_nmi": "mutual information, best block",
        "images_per_s": "images per second",
    }
    made = []
    for name, title in titles.items():
        lines = [
            Line("" if nth else group["name"], x, y, COLOURS[number % len(COLOURS)])
            for number, group in enumerate(groups)
            for nth, run in enumerate(group["runs"])
            for x, y in [run.of(name)]
        ]
        if any(line.x for line in lines):
            low = None if name == "loss" else 0
            made.append(chart(title, lines, low=low, marks=name not in ("loss", "images_per_s")))
    return made


def _strip(run: Any, name: str) -> str:
    """The newest reconstructions of a run."""
    from shards.html import image, text
    from train.page import pictures_of

    newest = max(pictures_of(run.run).glob("step-*.jpg"), default=None)
    if newest is None:
        return ""
    title = f"{name}, step {int(newest.stem[5:]):,}"
    return (
        f"<figure>{image(newest.read_bytes(), 'jpg', title)}"
        f"<figcaption>{text(title)}</figcaption></figure>"
    )
