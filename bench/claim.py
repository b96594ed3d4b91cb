"""The papers' claims tried in small: runs of several methods and seeds in, tables out.

In: the folder that docs/results/cifar10/run.sh fills. Out: results.json with provenance, and the
tables of the README.md beside it between their markers, rendered from results.json.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.provenance import provenance
from train.log import read_metrics

FOLDER = Path(__file__).parent.parent / "docs" / "results"
TITLES = {
    "small_simmim": "SimMIM",
    "small": "KAMIM, FAST, T 0.25, least weight 1 (published)",
    "small_mean": "KAMIM, FAST, T 0.25, mean weight 1",
    "random": "random weights, not trained",
}


def gather(runs: Path) -> list[dict[str, Any]]:
    """A row a method: probes and diagnostics of each seed. `runs` holds METHOD-seed-N folders."""
    found: dict[str, list[Path]] = {}
    for probe in sorted(runs.glob("*/probe/probe.json")):
        found.setdefault(probe.parts[-3].rpartition("-seed-")[0], []).append(probe.parent.parent)
    diagnoses = json.loads((runs / "analysis" / "analysis.json").read_text())
    by_run = {Path(title).name: facts for title, facts in diagnoses.items()}
    rows = [_row(method, folders, by_run) for method, folders in found.items()]
    untrained = json.loads((runs / "random" / "probe.json").read_text())
    rows.append({"method": "random", **_accuracies([untrained]), **by_run["random:small"]})
    return sorted(rows, key=lambda row: list(TITLES).index(row["method"]))


def _row(method: str, folders: list[Path], by_run: dict[str, Any]) -> dict[str, Any]:
    probes = [json.loads((folder / "probe" / "probe.json").read_text()) for folder in folders]
    facts = json.loads((folders[0] / "run.json").read_text())
    last = [read_metrics(folder)[-1] for folder in folders]
    found = [by_run[folder.name] for folder in folders]
    blocks = [
        {key: round(statistics.mean(row[key] for row in same), 4) for key in same[0]}
        for same in zip(*(each["blocks"] for each in found), strict=True)
    ]
    return {
        "method": method,
        "recipe": facts["recipe"],
        "seeds": len(folders),
        "steps": last[0]["step"] + 1,
        "mean_weight": [round(row["mean_weight"], 3) for row in last],
        **_accuracies(probes),
        "psnr_masked": [each["psnr_masked"] for each in found],
        "ssim_masked": [each["ssim_masked"] for each in found],
        "blocks": blocks,
    }


def _accuracies(probes: list[dict[str, Any]]) -> dict[str, list[float]]:
    """One number a pretrained encoder: the mean over its heads."""
    names = ("top1", "top5")
    heads = {name: [round(statistics.mean(p[name]), 4) for p in probes] for name in names}
    return heads | {"knn": [p["knn"] for p in probes]}


def spread(values: list[float], scale: float = 100, digits: int = 2) -> str:
    """Mean and sample deviation as text."""
    text = f"{scale * statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {scale * statistics.stdev(values):.{digits}f}"
    return text


def render(results: dict[str, Any]) -> str:
    """The tables and their circumstances, as Markdown."""
    rows = results["rows"]
    seeds = max(row.get("seeds", 1) for row in rows)
    lines = [f"| mean ± deviation of {seeds} seeds | top-1, % | top-5, % | 20-NN, % | "
             "masked PSNR, dB | mean weight |", "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        accuracies = " | ".join(spread(row[name]) for name in ("top1", "top5", "knn"))
        psnr = spread(row["psnr_masked"], 1) if "psnr_masked" in row else ""
        weight = spread(row["mean_weight"], 1) if "mean_weight" in row else ""
        lines.append(f"| {TITLES[row['method']]} | {accuracies} | {psnr} | {weight} |")
    depth = len(rows[0]["blocks"])
    uniform = rows[0]["blocks"][0]["uniform"]
    lines += ["", f"| attention distance, px (uniform {uniform:.2f}) / mutual information | "
              + " | ".join(f"block {n}" for n in range(1, depth + 1)) + " |"]  # fmt: skip
    lines.append("|---|" + "---|" * depth)
    for row in rows:
        cells = (f"{block['distance']:.2f} / {block['nmi']:.4f}" for block in row["blocks"])
        lines.append(f"| {TITLES[row['method']]} | {' | '.join(cells)} |")
    machine = f"{results['cores']} cores of an {results['cpu']}, no GPU"
    recipe = rows[0]["recipe"]
    lines += ["", f"CIFAR-10, 50,000 images at {recipe['size']} px, {recipe['epochs']:g} epochs of "
              f"batch {recipe['batch']} = {rows[0]['steps']} steps; fast probe of block 3 of "
              f"{depth}, 10,000 test images, 3 heads an encoder; {machine}; "
              f"torch {results['versions'].get('torch')}; {results['date']}.", ""]  # fmt: skip
    return "\n".join(lines)


def renewed(text: str, results: dict[str, Any]) -> str:
    """`text` with what stands between its markers rendered anew."""
    begin, end = "<!-- tables: begin -->\n", "<!-- tables: end -->\n"
    before, rest = text.split(begin)
    return before + begin + render(results) + end + rest.split(end)[1]


def main(runs: Path, name: str) -> None:
    """Gather `runs` into docs/results/`name` and render its README."""
    folder = FOLDER / name
    results = {"rows": gather(runs), **provenance()}
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = folder / "README.md"
    readme.write_text(renewed(readme.read_text(), results))
    print(readme)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
