"""The measured tables of README and docs, rendered from docs/results/bench; by `make readme`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kamim.bench import gpu_page
from kamim.bench.markdown import line, renewed_parts, table
from kamim.bench.meaning import ONE_PROCESS
from kamim.bench.plots import FACTORS, ORDER, WAYS
from kamim.bench.provenance import RESULTS
from train.recipe_file import documented

REPOSITORY = Path(__file__).parents[2]

SPREAD_AT = ("0.1", "0.25", "1")

Row = tuple[str, dict[str, float], int]


def kept(name: str) -> list[dict[str, Any]]:
    """All lines of results/`name`.jsonl."""
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(text) for text in lines]


def newest(name: str) -> list[dict[str, Any]]:
    """The lines of the newest run in results/`name`.jsonl: the last of each detector, if any."""
    return list({row.get("detector"): row for row in kept(name)}.values())


def render() -> str:
    """The table and the circumstances of its numbers, as Markdown."""
    rows: list[Row] = []
    for row in newest("build"):
        name = row["detector"].upper()
        share, scaling = row["share_of_ceiling_2_jobs"], row["two_jobs_over_one"]
        rows.append(
            (f"build, {name}: 2 jobs / (2 cores / sum of the stages alone)", share, row["n"])
        )
        rows.append((f"build, {name}: 2 jobs / 1 job", scaling, row["n"]))
    (loader,), (ffcv,) = newest("loader"), newest("ffcv")
    for title, key in {
        "loader / (cores x one thread that only decodes)": "loader / (cores x decode alone)",
        "loader with maps / without": "with maps / without",
        "loader from the bank / without maps": "from the bank / without maps",
        "loader, raw frames from tars / JPEG frames": "raw frames / JPEG frames",
        "loader, raw frames, with numba / without": "raw frames, with numba / without",
        "the same by 16 threads": "16 threads, raw frames, with numba / without",
        "loader, JPEG frames, with numba and libturbojpeg / without": (
            "JPEG frames, by one call / one by one"
        ),
        "the same of JPEG frames by 16 threads": (
            "16 threads, JPEG frames, by one call / one by one"
        ),
        "loader's threads / a DataLoader's processes": "threads / processes",
        "training step, weighted / unweighted": "weighted step / unweighted",
    }.items():
        if key in loader:
            rows.append((title, loader[key], loader["n"]))
    for title, key in {
        "FFCV, our square JPEG frames / its own RandomResizedCrop": (
            "square JPEG / RandomResizedCrop"
        ),
        "FFCV, raw frames / JPEG frames": "raw / JPEG",
        "FFCV JPEG with maps / without": "JPEG with maps / without",
        "FFCV, first batch at 90 % of an epoch / at 0 % (time)": "first batch at 90 % / at 0 %",
    }.items():
        rows.append((title, ffcv[key], ffcv["n"]))
    (remote,) = newest("remote")
    for title, key in {
        "S3 server on loopback, cache warm / folder": "S3, cache warm / local",
        "S3, warm, first epoch (hashed) / folder": "S3, cache warm, first epoch (hashed) / local",
        "S3, cache empty / folder": "S3, cache empty / local",
    }.items():
        rows.append((title, remote[key], remote["n"]))
    lines = table(
        ["ratio within one run", "median", "least to most", "n"],
        (
            [title, f"{v['median']:.2f}", f"{v['min']:.2f} to {v['max']:.2f}", str(n)]
            for title, v, n in rows
        ),
    )
    measured = [*newest("build"), loader, ffcv, remote]
    kinds = {f"{name} {value}" for row in measured for name, value in row["versions"].items()}
    versions = ", ".join(sorted(kinds))
    circumstances = sorted({(row["date"], row["cpu"]) for row in measured})
    dates = " and ".join(f"{date} ({cpu})" for date, cpu in circumstances)
    origin = (
        f"{ffcv['images']} ImageNet photos (several times each in builds), {ffcv['cores']} cores, "
        f"Python {ffcv['python']}, {versions}; {dates}. Raw lines with their commits: "
        "docs/results/bench."
    )
    return "\n".join([*lines, "", origin, ""])


def render_fidelity() -> str:
    """Errors of default maps and of maps of eight crops beside the rulers, as Markdown."""
    of_crops = [row for row in kept("fidelity") if set(row["changes"]) == {"map_crops"}]
    found = {(row["detector"], row["changes"]["map_crops"]): row for row in of_crops}
    names = sorted({name for name, _ in found})
    errors: dict[str, list[dict[str, float]]] = {
        "map, default (3 crops)": [found[name, 3] for name in names],
        "map of 8 crops": [found[name, 8] for name in names],
    }
    for ruler, title in {
        "shifted": "ruler: the crop moved by 2 px",
        "flipped": "ruler: the crop flipped",
        "torchvision": "ruler: torchvision's resize",
        "uniform": "ruler: no weights",
    }.items():
        errors[title] = [found[name, 3]["rulers"][ruler] for name in names]
    lines = table(
        ["correlation, and share of loss weight on the wrong cell", *map(str.upper, names)],
        (
            [title, *(f"{e['correlation']:.3f}, {e['wrong']:.1%}" for e in each)]
            for title, each in errors.items()
        ),
    )
    row = found[names[0], 3]
    taken = f"{row['samples']} ImageNet photos, a new crop each, w_ps 8, T 0.25; {row['date']}"
    plain = "" if "wrong at 0.25" in row else "Without the correction below. "
    return "\n".join([*lines, "", f"{taken}. {plain}The bank is exact. Cost of more crops:", ""])


def render_spread() -> str:
    """Bias and misplaced weight of map weights by temperature, corrected and not, as Markdown."""
    rows = newest("spread")
    lines = table(
        ["bias of the mean weight; share on the wrong cell", *(f"T {t}" for t in SPREAD_AT)], []
    )
    for row in rows:
        for what, title in {
            "map": "map, corrected",
            "uncorrected": "map, not corrected",
            "shifted": "ruler: the crop moved by 2 px",
        }.items():
            cells = (
                f"{row[what][f'bias at {t}']:+.1%}; {row[what][f'wrong at {t}']:.1%}"
                for t in SPREAD_AT
            )
            lines.append(line([f"{row['detector'].upper()}, {title}", *cells]))
    count = rows[0]["map"]["samples"]
    taken = f"{count} ImageNet photos; the correction was measured on others"
    return "\n".join([*lines, "", f"{taken}; w_ps 8; {rows[0]['date']}.", ""])


def render_frames() -> str:
    """What frames of each size cost and keep, as Markdown."""
    rows = list({row["frame"]: row for row in kept("frames")}.values())
    heads = ["kB per image", "build", "loader", "gradient energy", "PSNR, dB", "FAST keypoints"]
    lines = table(["frame", *heads], [])
    for row in rows:
        lines.append(
            line(
                [
                    f"{row['frame']} px",
                    f"{row['bytes'] / 1000:.1f}",
                    *(f"{row[f'{what} / 256']['median']:.2f}" for what in ("build", "loader")),
                    f"{row['energy']:.2f}",
                    f"{row['psnr']:.1f}",
                    f"{row['keypoints'] / row['published_keypoints']:.2f}",
                ]
            )
        )
    last = rows[-1]
    note = (
        "Crops of 192 px. Energy and keypoints are shares of those of the published crop; PSNR is "
        "against it. Build and loader: processor time per image over that of 256 px (medians of "
        f"interleaved repeats). {last['images']} ImageNet photos; {last['cores']} cores of an "
        f"{last['cpu']}; {last['date']}."
    )
    return "\n".join([*lines, "", note, ""])


def render_versus() -> str:
    """Images per second of each loader, as Markdown."""
    newest_of = _versus()
    chain = newest_of["chain", "fast"]

    def cell(loader: str, detector: str) -> str:
        row = newest_of.get((loader, detector))
        if row is None:
            return ""
        times = row.get("times_published")
        rate = f"{row['images_per_s']['median']:,.0f}"
        return f"{rate} ({times['median']:.1f})" if times else rate

    known = {name for name, _ in newest_of}
    heads = ["images per second (times the published rate)", "no weights", "FAST", "ORB", "SIFT"]
    columns = ("None", "fast", "orb", "sift")
    lines = table(
        heads, ([name, *(cell(name, each) for each in columns)] for name in ORDER if name in known)
    )
    taken = f"{chain['images']} ImageNet photos, {chain['cores']} cores of an {chain['cpu']}"
    repeats = (
        f"medians of {chain['n']} interleaved repeats, of rates and of ratios; {chain['date']}"
    )
    lines += ["", f"{taken}; {repeats}."]
    if chain["noisy"]:
        lines.append("The machine was noisier than the benchmark asks for.")
    return "\n".join([*lines, ""])


def _versus() -> dict[tuple[str, str], dict[str, Any]]:
    """The newest row of each loader and detector."""
    return {(row["loader"], row["detector"]): row for row in kept("versus")}


def render_factors() -> str:
    """Where the gain over the published loader comes from, and the ceilings, as Markdown."""
    newest_of = _versus()
    chain = newest_of["chain", "fast"]
    steps = [[name, f"{chain['factors'][name]['median']:.2f}"] for name in FACTORS]
    steps.append(["all: product", f"{chain['product']:.1f}"])
    steps.append(["all: measured", f"{chain['total']['median']:.1f}"])
    ceilings = [
        [name, f"{row['images_per_s']['median']:,.0f}"]
        for (name, _), row in newest_of.items()
        if "only" in name
    ]
    heads = ["from the published FAST loader to ours (WebDataset)", "times as fast"]
    lines = [*table(heads, steps), "", *table(["ceiling", "images per second"], ceilings)]
    return "\n".join([*lines, ""])


def render_meaning() -> str:
    """Hours of 100 epochs of ImageNet-1K by backbone and loader, an estimate, as Markdown."""
    rows = list({row["recipe"]: row for row in kept("meaning")}.values())
    ways = [way for way in WAYS if way in rows[0]["hours_100_epochs"]]
    lines = table(["100 epochs of ImageNet-1K, 16 cores, 1 GPU: hours", *ways], [])
    for row in rows:
        hours = (f"{row['hours_100_epochs'][way]:,.1f}" for way in ways)
        wants = f"{row['recipe']}: GPU {row['gpu_images_per_s']:,} images/s"
        lines.append(line([wants, *hours]))
    delivered = ", ".join(f"{k} {rows[0]['delivered_by_16_cores'][k]:,}" for k in ways)
    kinds = " or ".join(sorted({row["gpu_is"] for row in rows}))
    times, most = f"{16 / rows[0]['cores']:g}", f"{ONE_PROCESS:,}"
    lines += [
        "",
        f"An estimate. Loaders: the rates of {rows[0]['cores']} cores times {times} ({delivered} "
        f"images/s); WebDataset is limited to {most}, the rate of one process on 16 cores without "
        f"libturbojpeg (gpu.md). GPU: {kinds}. Raw frames are left out: 2 cores do not show how "
        "fast 16 cores copy from one memory.",
    ]
    return "\n".join([*lines, ""])


def render_ceiling() -> str:
    """What one process reads where decoding costs no core, as Markdown."""
    (row,) = newest("ceiling")
    pattern = re.compile(r"JPEG, images/s by (\d+ \w+)")
    workers = [found[1] for name in row if (found := pattern.fullmatch(name))]
    workers.sort(key=lambda words: (words.endswith("processes"), int(words.split()[0])))
    lines = [f"| images/s of one loader | {' | '.join(workers)} |"]
    lines.append("|---|" + "---|" * len(workers))
    for kind, what in (("JPEG", "decoding"), ("raw", "reading")):
        rates = [row[f"{kind}, images/s by {words}"]["median"] for words in workers]
        cells = " | ".join(f"{rate:,.0f}" for rate in rates)
        lines.append(f"| {kind} frames, {what} a sleep of 250 us | {cells} |")
    own, share = row["JPEG, own work per sample, us"]["median"], row["JPEG, own work / decode"]
    lines += [
        "",
        f"{row['images']:,} samples, {row['cores']} cores of an {row['cpu']}; {row['date']}. Work "
        f"other than decoding takes {own:.0f} us per sample: {share:.2f} of the time to decode a "
        f"frame ({row['decode, us']} us). `Plan.samples` of 2,048 takes "
        f"{row['samples of 2,048, ms']} ms.",
    ]
    return "\n".join([*lines, ""])


def render_throw() -> str:
    """What throwing saves beside what FAMT claims, as Markdown; or how to find out."""
    if not (RESULTS / "throw.jsonl").exists():
        return "Not measured yet on this machine: `make bench-throw`.\n"
    rows = list({(row["recipe"], row["device"]): row for row in kept("throw")}.values())
    heads = ["a step", "an attention pass, of an epoch", "a published run"]
    lines = table(["time with throwing / time without", *heads], [])
    for row in rows:
        for method in ("MAE", "SimMIM"):
            step, look, run = (row[method][key] for key in ("step", "look", "run"))
            title = f"{method}, {row['recipe']} on {row['device']}, batch {row['batch']}"
            extent = f"{step['median']:.2f} ({step['min']:.2f} to {step['max']:.2f})"
            lines.append(line([title, extent, f"{look['median']:.2f}", f"{run['median']:.2f}"]))
    last = rows[-1]
    note = (
        "FAMT claims that training time falls by nearly half. 224 px, medians of "
        f"{last['n']} interleaved repeats, {last['cores']} cores of an {last['cpu']}; "
        f"{last['date']}. A published run has random masks in its first 41 epochs; it has 400 "
        "epochs (MAE) or 200 (SimMIM)."
    )
    return "\n".join([*lines, "", note, ""])


def render_maps() -> str:
    """What a set without frames of ImageNet-1K's size costs, as Markdown."""
    rows = list({row["kind"]: row for row in kept("maps")}.values())
    heads = ["GB on disk", "MB resident", "s to open", "look-ups / s", "in batches of 256"]
    lines = table([f"{rows[0]['images']:,} images, one detector", *heads], [])
    rate = "look-ups per second of processor time"
    for row in rows:
        cells = [row["GB on disk"], row["resident MB after them"], row["open and first look-up, s"]]
        rates = [row[name]["median"] for name in (rate, f"{rate}, batches of 256")]
        names = {"folder": "paths of a folder", "tar": "members of a tar, and their keys"}
        lines.append(
            line([names[row["kind"]], *(f"{c:g}" for c in cells), *(f"{r:,.0f}" for r in rates)])
        )
    last = rows[-1]
    note = (
        f"A synthetic set, {last['lookups']:,} random names, files in the page cache; look-ups per "
        "second of processor time, medians of 7. Resident: the memory of the whole process. "
        f"One core of an {last['cpu']}; {last['date']}."
    )
    return "\n".join([*lines, "", note, ""])


def render_fields() -> str:
    """Every field of a recipe, as Markdown."""
    rows = [
        [f"`{name}`", kind, f"`{d}`" if d else "", text] for name, kind, d, text in documented()
    ]
    return "\n".join([*table(["field", "kind", "default", "what it is"], rows), ""])


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"versus": render_versus},
    "docs/benchmarks.md": {
        "factors": render_factors,
        "measured": render,
        "meaning": render_meaning,
        "ceiling": render_ceiling,
    },
    "docs/fidelity.md": {
        "fidelity": render_fidelity,
        "spread": render_spread,
        "frames": render_frames,
    },
    "docs/maps.md": {"maps": render_maps},
    "docs/masking.md": {"throw": render_throw},
    "docs/recipes.md": {"fields": render_fields},
    "docs/gpu.md": gpu_page.PARTS,
}


def renewed(page: str) -> str:
    """The text of `page`, with the parts between its markers rendered anew."""
    parts = {name: make() for name, make in PAGES[page].items()}
    return renewed_parts((REPOSITORY / page).read_text(), parts)


if __name__ == "__main__":
    for page in PAGES:
        (REPOSITORY / page).write_text(renewed(page))
