"""Small experiments that try the papers' claims: results.json and tables from folders of runs.

`python -m kamim.bench.experiments NAME RUNS...` gathers what docs/results/NAME/README.md says how
to run, and renders the tables of that page.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from kamim.bench.markdown import deviation, line, renewed_parts, table
from kamim.bench.provenance import provenance
from train.metrics import read_facts, read_metrics

FOLDER = Path(__file__).parents[2] / "docs" / "results"
TITLES = {
    "small_simmim": "SimMIM",
    "small": "KAMIM, FAST, T 0.25, least weight 1 (published)",
    "small_mean": "KAMIM, FAST, T 0.25, mean weight 1",
    "small_famt": "KAMIM + FAMT",
    "small_mae": "MAE",
    "small_mae_amt": "MAE + AMT",
    "small_mae_famt": "MAE + FAMT",
    "random": "random weights, not trained",
}


def gather(runs: Path) -> list[dict[str, Any]]:
    """A row per method: probes and diagnostics of each seed. `runs` holds METHOD-seed-N folders."""
    found: dict[str, list[Path]] = {}
    for probe in sorted(runs.glob("*-seed-*/probe/probe.json")):
        found.setdefault(probe.parts[-3].rpartition("-seed-")[0], []).append(probe.parent.parent)
    diagnoses = json.loads((runs / "analysis" / "analysis.json").read_text())
    by_run = {Path(title).name: facts for title, facts in diagnoses.items()}
    rows = [_row(method, folders, by_run) for method, folders in found.items()]
    if (runs / "random" / "probe.json").exists():
        untrained = json.loads((runs / "random" / "probe.json").read_text())
        rows.append({"method": "random", **_accuracies([untrained]), **by_run["random:small"]})
    return sorted(rows, key=lambda row: list(TITLES).index(row["method"]))


def _row(method: str, folders: list[Path], by_run: dict[str, Any]) -> dict[str, Any]:
    probes = [json.loads((folder / "probe" / "probe.json").read_text()) for folder in folders]
    facts = read_facts(folders[0])
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
    """One number per pretrained encoder: the mean over its heads."""
    names = ("top1", "top5")
    heads = {name: [round(statistics.mean(p[name]), 4) for p in probes] for name in names}
    return heads | {"knn": [p["knn"] for p in probes]}


def seconds(row: dict[str, Any], costs: dict[str, dict[str, float]]) -> float:
    """CPU seconds that a run's steps and attention passes take by their measured costs."""
    recipe, cost = row["recipe"], costs[row["method"]]
    if recipe.get("sample_by", "none") == "none":
        return row["steps"] * cost["step_ms"] / 1000
    an_epoch, early = row["steps"] / recipe["epochs"], recipe["random_epochs"]
    passes = 1 + int((recipe["epochs"] - early - 1e-9) / recipe["refresh_epochs"])
    plain = costs["small_mae" if recipe["method"] == "mae" else "small"]["step_ms"]
    steps = early * plain + (recipe["epochs"] - early) * cost["step_ms"]
    return an_epoch * (steps + passes * cost["look_ms"]) / 1000


def render(results: dict[str, Any]) -> str:
    """The tables and their circumstances, as Markdown."""
    rows, costs = results["rows"], results.get("costs", {})
    heads = ["mean ± deviation", "seeds", "epochs", "CPU s", "top-1, %", "top-5, %", "20-NN, %"]
    lines = table([*heads, "masked PSNR, dB", "mean weight"], [])
    for row in rows:
        trained = "steps" in row
        epochs = f"{row['recipe']['epochs']:g}" if trained else ""
        spent = f"{seconds(row, costs):.0f}" if trained and costs else ""
        cells = [TITLES[row["method"]], str(row.get("seeds", 1)), epochs, spent]
        cells += [deviation(row[name], 100) for name in ("top1", "top5", "knn")]
        cells += [deviation(row[n]) if trained else "" for n in ("psnr_masked", "mean_weight")]
        lines.append(line(cells))
    depth = len(rows[0]["blocks"])
    uniform = rows[0]["blocks"][0]["uniform"]
    title = f"attention distance, px (uniform {uniform:.2f}) / mutual information"
    lines += ["", *table([title, *(f"block {number}" for number in range(1, depth + 1))], [])]
    for row in rows:
        cells = [f"{block['distance']:.2f} / {block['nmi']:.4f}" for block in row["blocks"]]
        epochs = f", {row['recipe']['epochs']:g} epochs" if "recipe" in row else ""
        lines.append(line([f"{TITLES[row['method']]}{epochs}", *cells]))
    recipe = rows[0]["recipe"]
    lines += [
        "",
        f"CIFAR-10, 50,000 images at {recipe['size']} px, batch {recipe['batch']}; fast probe of "
        f"block 3 of {depth}, 10,000 test images, 3 heads an encoder; {results['cores']} cores of "
        f"an {results['cpu']}, no GPU; torch {results['versions'].get('torch')}; "
        f"{results['date']}.",
    ]
    if costs:
        measured = "at what each costs on one core, measured apart in turn."
        lines.append(f"CPU s: steps and attention passes of a run, {measured}")
    return "\n".join([*lines, ""])


def renewed(text: str, results: dict[str, Any]) -> str:
    """`text` with what stands between its markers rendered anew."""
    return renewed_parts(text, {"tables": render(results)})


def main(name: str, folders: list[Path]) -> None:
    """Gather `folders` of runs into docs/results/`name` and render its README.

    costs.json in the first, of kamim.bench.throw.costs, gives the seconds of runs.
    """
    rows = gather(folders[0])  # with the untrained encoder, which is the same in all
    rows += [r for folder in folders[1:] for r in gather(folder) if r["method"] != "random"]
    results: dict[str, Any] = {"rows": rows, **provenance()}
    if (folders[0] / "costs.json").exists():
        results["costs"] = json.loads((folders[0] / "costs.json").read_text())
    (FOLDER / name / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    readme = FOLDER / name / "README.md"
    readme.write_text(renewed(readme.read_text(), results))
    print(readme)


if __name__ == "__main__":
    main(sys.argv[1], [Path(word) for word in sys.argv[2:]])
