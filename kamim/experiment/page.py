"""runs.jsonl in; results.json, two figures and the tables of README.md out, by the plan's rules."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kamim.bench import markdown
from kamim.bench.markdown import deviation, renewed_parts
from kamim.bench.plots import picture
from kamim.experiment.keypoints import COLLAPSE, MAIN, METHODS, MORE, read
from train.metrics import COLLAPSED

EMPTY = "<!-- results: begin -->\n<!-- results: end -->\n"
POINTS = 0.5  # a smaller gain does not matter
LEAST = 3  # pairs that a verdict needs
TITLES = {"simmim": "SimMIM", "mae": "MAE", "fast": "FAST", "orb": "ORB", "sift": "SIFT"}
PAIRS = (("fast", "uniform"), ("fast", "contrast"), ("fast", "shuffled"), ("fast", "inverse"))
Row = dict[str, Any]


def write(out: Path) -> list[Path]:
    """Render the page in `out`. Returns what was written."""
    rows = read(out / "runs.jsonl")
    results = {"provenance": provenance_of(rows), "verdicts": verdicts(rows), "runs": rows}
    written = [out / "results.json"]
    written[0].write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if any(row["stage"] == "main" for row in rows):
        written += [draw_top1(rows, out / "top1.png"), draw_attention(rows, out / "attention.png")]
    page = out / "README.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else EMPTY
    page.write_text(renewed_parts(text, {"results": f"{tables(rows)}\n"}), encoding="utf-8")
    return [*written, page]


def provenance_of(rows: Sequence[Row]) -> Row:
    """What the runs were made on: every value of each fact."""
    names = ("device", "date", "commit", "dirty", "cpu", "cores", "python")
    facts: Row = {name: sorted({row[name] for row in rows}) for name in names}
    kinds = {json.dumps(row["versions"], sort_keys=True) for row in rows}
    return facts | {"versions": [json.loads(each) for each in sorted(kinds)], "runs": len(rows)}


def at_end(rows: Iterable[Row], method: str, arm: str, stage: str = "main") -> dict[int, Row]:
    """By seed the last look of the runs of an arm; runs that diverged are left out."""
    found = {}
    for row in rows:
        if (row["stage"], row["method"], row["arm"]) == (stage, method, arm) and row["finite"]:
            found[row["seed"]] = row["looks"][-1]
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, lower, upper) with the 95 % interval by Student's t; two values at least."""
    from scipy.stats import t

    mean, count = statistics.fmean(values), len(values)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5
    return mean, mean - half, mean + half


def verdict(count: int, low: float, high: float) -> str:
    """By the plan, of a difference in points."""
    if count < LEAST:
        return "undecided"
    if high < 0:
        return "no: it hurts"
    if low > 0:
        return "yes" if high >= POINTS else f"yes, by less than {POINTS:g} points"
    return "no" if high < POINTS else "undecided"


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """Each pair of arms of each method: difference of top-1 in points, interval, verdict."""
    found = []
    for method in METHODS:
        for arm, other in PAIRS:
            one, two = at_end(rows, method, arm), at_end(rows, method, other)
            seeds = sorted(one.keys() & two.keys())
            values = [100 * (one[seed]["top1"] - two[seed]["top1"]) for seed in seeds]
            if len(values) < 2:
                continue
            mean, low, high = interval(values)
            found.append(
                {
                    "method": method,
                    "arm": arm,
                    "minus": other,
                    "pairs": len(values),
                    "mean": round(mean, 3),
                    "low": round(low, 3),
                    "high": round(high, 3),
                    "verdict": verdict(len(values), low, high),
                }
            )
    return found


def able(rows: Sequence[Row], method: str) -> list[str]:
    """What the plan asks before an answer counts, each as a sentence."""
    untrained = {
        row["seed"]: row["looks"][0]["top1"]
        for row in rows
        if (row["stage"], row["method"], row["arm"]) == ("main", method, "uniform")
        and row["looks"][0]["step"] == 0
    }
    uniform, fast = at_end(rows, method, "uniform"), at_end(rows, method, "fast")
    seeds, both = sorted(untrained.keys() & uniform.keys()), sorted(uniform.keys() & fast.keys())
    if not seeds or not both:
        return []
    gain = 100 * statistics.fmean(uniform[seed]["top1"] - untrained[seed] for seed in seeds)
    ratio = [
        statistics.fmean(of[seed]["held_loss_fast"] / of[seed]["held_loss"] for seed in both)
        for of in (uniform, fast)
    ]
    said = "" if gain >= 1 else ": it cannot answer"
    worked = "" if ratio[1] < ratio[0] else ": the weights did nothing"
    return [
        f"{TITLES[method]}: training gains {gain:.2f} points over the untrained encoder{said}; "
        f"the FAST-weighted loss on photos kept out is {ratio[0]:.4f} of the plain one with "
        f"uniform weights, {ratio[1]:.4f} with FAST weights{worked}."
    ]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, or nothing where there are no lines."""
    rows = markdown.table(head, lines)
    return "\n".join(rows) if len(rows) > 2 else ""


FIGURES: dict[str, Callable[[Row], float]] = {
    "top-1, %": lambda look: 100 * look["top1"],
    "20-NN, %": lambda look: 100 * look["knn"],
    "retrieval, %": lambda look: 100 * look["retrieval"],
    "effective rank": lambda look: look["rank"],
    "loss kept out": lambda look: look["held_loss"],
    "most mutual information": lambda look: max(each["nmi"] for each in look["attention"]),
    "least distance, px": lambda look: min(each["distance"] for each in look["attention"]),
}


def of_arm(rows: Sequence[Row], method: str, arm: str, stage: str) -> list[str] | None:
    """The line of an arm, or None if it has no run."""
    looks = at_end(rows, method, arm, stage)
    if not looks:
        return None
    values = [deviation([figure(look) for look in looks.values()]) for figure in FIGURES.values()]
    return [TITLES[method], TITLES.get(arm, arm), str(len(looks)), *values]


def tables(rows: Sequence[Row]) -> str:
    """All tables, with what was run on what, as Markdown."""
    parts = []
    found = [
        [
            TITLES[v["method"]],
            f"FAST - {TITLES.get(v['minus'], v['minus'])}",
            str(v["pairs"]),
            f"{v['mean']:+.2f} ({v['low']:+.2f} to {v['high']:+.2f})",
            v["verdict"],
        ]
        for v in verdicts(rows)
    ]
    parts.append(
        table(("method", "top-1, points", "pairs", "mean (95 % interval)", "verdict"), found)
    )
    parts += ["\n".join(f"- {line}" for method in METHODS for line in able(rows, method))]
    if found:
        parts.append("![Top-1 of each arm, a line per seed](top1.png)")
    head = ("method", "weights", "seeds", *FIGURES)
    stages = {"main": MAIN, "more": MORE, "rate": ("uniform", "fast")}
    for stage, arms in stages.items():
        lines = [of_arm(rows, method, arm, stage) for method in METHODS for arm in arms]
        title = {"main": "", "more": "Other detectors:\n\n", "rate": "At twice the rate:\n\n"}[
            stage
        ]
        made = table(head, [line for line in lines if line])
        parts.append(title + made if made else "")
    parts.append(early(rows))
    if found:
        parts.append("![Attention by block](attention.png)")
    parts.append(collapse(rows))
    parts.append(tuning(rows))
    parts.append(made_on(rows))
    return "\n\n".join(part for part in parts if part)


def early(rows: Sequence[Row]) -> str:
    """Top-1 at each look, the mean over seeds; runs that diverged are left out."""
    lines = []
    for method in METHODS:
        for arm in MAIN:
            mine = [
                row["looks"]
                for row in rows
                if (row["stage"], row["method"], row["arm"]) == ("main", method, arm)
                and row["finite"]
            ]
            steps = sorted({look["step"] for looks in mine for look in looks if look["step"]})
            if mine:
                values = [
                    deviation(
                        [
                            100 * look["top1"]
                            for looks in mine
                            for look in looks
                            if look["step"] == at
                        ]
                    )
                    for at in steps
                ]
                lines.append([TITLES[method], TITLES.get(arm, arm), *values])
    width = max((len(line) for line in lines), default=2) - 2
    shares = ("25 %", "50 %", "100 %")[-width:] if 0 < width <= 3 else [""] * width
    made = table(("method", "weights", *shares), lines)
    return f"Top-1 on the way, at shares of a run:\n\n{made}" if made else ""


def collapse(rows: Sequence[Row]) -> str:
    """Attention of ViT-B."""
    lines = []
    for arm in COLLAPSE:
        for look in at_end(rows, "simmim", arm, "collapse").values():
            blocks = look["attention"]
            most = max(block["nmi"] for block in blocks)
            far = max(blocks, key=lambda block: abs(block["distance"] - block["uniform"]))
            said = "collapsed" if most < COLLAPSED else "depends on the image"
            name = {"uniform": "1", "times26": "26 everywhere", "kamim": "FAST, least weight 1"}[
                arm
            ]
            lines.append(
                [name, f"{most:.4f}", f"{far['distance']:.2f} (uniform {far['uniform']:.2f})", said]
            )
    head = ("weights", "most mutual information", "distance furthest from uniform, px", "attention")
    made = table(head, lines)
    return f"ViT-B, SimMIM, one seed:\n\n{made}" if made else ""


def tuning(rows: Sequence[Row]) -> str:
    """What each rate gave, with uniform weights."""
    lines = [
        [TITLES[row["method"]], f"{row['rate']:g}", f"{100 * row['looks'][-1]['chosen_on']:.2f}"]
        for row in sorted(rows, key=lambda row: (row["method"], row["rate"]))
        if row["stage"] == "tune"
    ]
    made = table(("method", "peak rate", "top-1 on the images it was chosen on, %"), lines)
    edges = "\n".join(f"- {line}" for method in METHODS for line in at_edge(rows, method))
    title = "Tuning, with uniform weights:"
    return "\n\n".join(part for part in (title, made, edges) if part) if made else ""


def at_edge(rows: Sequence[Row], method: str) -> list[str]:
    """That the best of several rates has no neighbour on one side, as a sentence."""
    scores = {
        row["rate"]: row["looks"][-1]["chosen_on"]
        for row in rows
        if (row["stage"], row["method"]) == ("tune", method)
    }
    ends = {min(scores): "lowest", max(scores): "highest"} if len(scores) > 1 else {}
    best = max(scores, key=lambda rate: scores[rate], default=0)
    if best not in ends:
        return []
    where = f"{TITLES[method]}: the best rate, {best:g}, is the {ends[best]} tried"
    return [f"{where}; a {'lower' if best == min(scores) else 'higher'} one may be better."]


def made_on(rows: Sequence[Row]) -> str:
    """One line: hardware, versions, n."""
    if not rows:
        return "No run yet."
    facts = provenance_of(rows)
    versions = ", ".join(sorted({f"torch {each['torch']}" for each in facts["versions"]}))
    seconds = sum(row["train_seconds"] for row in rows)
    lost = [row for row in rows if not row["finite"]]
    names = ", ".join(f"{row['stage']} {row['method']} {row['arm']} {row['seed']}" for row in lost)
    images = sum(row["steps"] * row["batch"] for row in rows)
    return (
        f"{len(rows)} runs, {images:,} crops, {seconds:,.0f} s of training; "
        f"{', '.join(facts['device'])}; {versions}; {', '.join(facts['date'])}. "
        f"Runs left out because they diverged: {names or 'none'}."
    )


def draw_top1(rows: Sequence[Row], path: Path) -> Path:
    """Top-1 of each arm, a line per seed: the pairs can be seen."""
    with picture(path, 10, 4, (1, len(METHODS))) as axes:
        for panel, method in zip(axes, METHODS, strict=True):
            looks = {arm: at_end(rows, method, arm) for arm in MAIN}
            for seed in sorted({seed for each in looks.values() for seed in each}):
                at = [n for n, arm in enumerate(MAIN) if seed in looks[arm]]
                values = [100 * looks[MAIN[n]][seed]["top1"] for n in at]
                panel.plot(at, values, "o-", ms=4, lw=0.8, alpha=0.8, label=f"seed {seed}")
            panel.set(title=TITLES[method], ylabel="top-1 of the linear probe, %")
            panel.set_xticks(range(len(MAIN)), [TITLES.get(arm, arm) for arm in MAIN])
            panel.grid(alpha=0.3)
        axes[-1].legend(fontsize=7)
    return path


def draw_attention(rows: Sequence[Row], path: Path) -> Path:
    """Mutual information and distance of attention by block, the mean over seeds."""
    names = {"nmi": "normalised mutual information", "distance": "attention distance, px"}
    with picture(path, 10, 6.4, (2, len(METHODS))) as axes:
        for line, (name, label) in enumerate(names.items()):
            for panel, method in zip(axes[line], METHODS, strict=True):
                for arm in MAIN:
                    looks = [row["attention"] for row in at_end(rows, method, arm).values()]
                    if not looks:
                        continue
                    each = zip(*([b[name] for b in blocks] for blocks in looks), strict=True)
                    means = [statistics.fmean(values) for values in each]
                    blocks = [block["block"] for block in looks[0]]
                    panel.plot(blocks, means, "o-", ms=3, label=TITLES.get(arm, arm))
                    if name == "distance" and arm == MAIN[0]:
                        uniform = looks[0][0]["uniform"]
                        panel.axhline(uniform, color="#999999", ls=":", label="uniform attention")
                panel.set(xlabel="block", ylabel=label, title=TITLES[method])
                panel.grid(alpha=0.3)
        axes[-1][-1].legend(fontsize=7)
    return path
