"""The tables of docs/gpu.md, from the lines of `kamim bench --gpu`; what has no line says so."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from kamim.bench.markdown import line, table
from kamim.bench.provenance import RESULTS

Row = dict[str, Any]
Rows = dict[tuple[str, str], Row]  # by part and case
Cell = Callable[[Row], str]
RECIPES = ("vit_tiny", "vit_small", "vit_base", "swin_tiny", "swin_base")
IMAGENET, EPOCHS = 1_281_167, 110  # as the published code runs: the last ten at the floor
NOTHING = "not measured"
KINDS = ("products", "attention", "convolution", "compiled", "eager", "copies")


def rows_of(path: Path) -> list[Row]:
    """The lines of results in `path`, if there are any; not one that a kill cut short."""
    rows = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(text))
    return rows


def measured() -> dict[str, Rows]:
    """The newest row of each (part, case), by GPU."""
    found: dict[str, Rows] = {}
    for row in rows_of(RESULTS / "gpu.jsonl"):
        if row["gpu"]:
            found.setdefault(row["gpu"], {})[row["part"], row["case"]] = row
    return found


def render(part: str, lines_of: Callable[[Rows], list[str]]) -> str:
    """A table for each GPU that has rows of `part`, with their circumstances, as Markdown."""
    lines: list[str] = []
    for gpu, rows in measured().items():
        of_part = [row for (name, _), row in rows.items() if name == part]
        if not of_part:
            continue
        last = of_part[-1]
        dates = " and ".join(sorted({row["date"] for row in of_part}))
        n, versions = last.get("n", 1), last["versions"]
        often = f"medians of {n}" if n > 1 else "measured once"
        origin = f"{gpu}, driver {last['driver']}, CUDA {last['cuda']}, torch {versions['torch']}, "
        origin += f"{last['cores']} cores of an {last['cpu']}; {often}; {dates}."
        lines += [*lines_of(rows), "", origin, ""]
    return "\n".join(lines or ["Not measured yet: `make bench-gpu`.", ""])


def middle(row: Row, key: str, form: str = ",.0f") -> str:
    """The median of a figure of `row`, or the figure itself."""
    value = row.get(key)
    if value is None:
        return NOTHING
    return f"{value['median'] if isinstance(value, dict) else value:{form}}"


def of(key: str, form: str = ",.0f") -> Cell:
    """The cell of a figure."""
    return lambda row: middle(row, key, form)


def cases(rows: Rows, part: str, first: tuple[str, ...] = ()) -> list[tuple[str, Row]]:
    """(case, row) of a part: those of `first`, measured or not, and the others."""
    others = [case for name, case in rows if name == part and case not in first]
    return [(case, rows.get((part, case), {})) for case in [*first, *others]]


def figures(
    part: str, title: str, columns: dict[str, Cell], first: tuple[str, ...] = ()
) -> Callable[[Rows], list[str]]:
    """A table of `part` with a line per case and these columns."""

    def lines(rows: Rows) -> list[str]:
        each = cases(rows, part, first)
        return table(
            [title, *columns],
            ([case, *(cell(row) for cell in columns.values())] for case, row in each),
        )

    return lines


def bandwidth(row: Row) -> str:
    """Bytes or products per second."""
    if "gb_per_s" in row:
        return f"{middle(row, 'gb_per_s')} GB/s"
    return f"{middle(row, 'tflop_per_s')} TFLOP/s"


def counted(row: Row) -> str:
    """Graphs, where they broke, and those that were made again."""
    names = ("graphs", "graph_breaks", "recompiles")
    return ", ".join(str(row[name]) for name in names if name in row) or NOTHING


def hours(row: Row) -> str:
    """Of a run on ImageNet-1K."""
    if not row:
        return NOTHING
    return f"{EPOCHS * IMAGENET / row['images_per_s']['median'] / 3600:.1f}"


def share_of(kind: str) -> Cell:
    """The share of a micro-step's device time that kernels of a kind take."""

    def share(row: Row) -> str:
        whole, kinds = row.get("device_ms"), row.get("device_ms_by_kind", {})
        return f"{kinds.get(kind, 0) / whole:.0%}" if whole else NOTHING

    return share


def steps(rows: Rows) -> list[str]:
    """Rates of steps on one batch, and what weights cost them."""
    columns: dict[str, Cell] = {
        "micro-batch": of("micro_batch", "d"),
        "images/s": of("images_per_s"),
        "MFU": of("mfu", ".1%"),
        "peak memory": lambda row: f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else NOTHING,
        "per image": lambda row: (
            f"{middle(row, 'peak_mb_per_image', '.1f')} MB" if row else NOTHING
        ),
        "micro-step, ms": of("micro_step_ms", ".1f"),
        "host, ms": of("host_ms", ".1f"),
        "waits": of("synchronisations_of_a_step", "d"),
        "graphs, breaks, recompiles": counted,
    }
    lines = figures("step", "step on one batch", columns, RECIPES)(rows)
    for case, row in cases(rows, "weights"):
        ratio = row["weighted_over_unweighted"]
        lines += [
            "",
            f"{case}: a weighted step takes {ratio['median']:.3f} of the time of one "
            f"without weights ({ratio['min']:.3f} to {ratio['max']:.3f}).",
        ]
    return lines


def loader(rows: Rows) -> list[str]:
    """Rates of the loader by threads."""
    by_kind: dict[str, dict[int, Row]] = {}
    for case, row in cases(rows, "loader"):
        by_kind.setdefault(case.partition(",")[0], {})[row.get("threads", 0)] = row
    threads = sorted({count for found in by_kind.values() for count in found if count})
    lines = table(["loader alone, images/s by threads", *map(str, threads)], [])
    for kind, found in by_kind.items():
        missing = next((row["missing"] for row in found.values() if "missing" in row), NOTHING)
        rates = (middle(found[n], "images_per_s") if n in found else missing for n in threads)
        lines.append(line([kind, *rates]))
    return lines


def decode(rows: Rows) -> list[str]:
    """Rates of nvJPEG, its pixels, and the crops that come of it."""
    crops = "weighted crops"
    alone = {key: row for key, row in rows.items() if key[1] != crops}
    lines = figures("decode", "JPEG frames decoded on the GPU", DECODE)(alone)
    if row := rows.get(("decode", crops)):
        rate, times = middle(row, "images_per_s"), middle(row, "device_over_threads", ".2f")
        lines += [
            "",
            f"Weighted crops from frames decoded on the GPU: {rate} images/s, {times} times the "
            "rate from frames that the loader's threads decode.",
        ]
    return lines


def deterministic(rows: Rows) -> list[str]:
    """Killed and resumed against unbroken, and what determinism costs."""
    heads = ["losses equal", "largest relative difference", "first step that differs"]
    lines, costs = table(["killed and resumed, against uninterrupted", *heads], []), list[str]()
    for case, row in cases(rows, "deterministic"):
        if "equal" not in row:
            rate, plain = row["images_per_s"]["median"], rows.get(("step", case), {})
            without = f", of {middle(plain, 'images_per_s')} without" if plain else ""
            costs += ["", f"Steps of {case} with --deterministic: {rate:,.0f} images/s{without}."]
            continue
        equal, apart = row["equal"], middle(row, "largest_relative_difference", ".2g")
        which = str(row["first_step_that_differs"] or "none")
        lines.append(
            line([f"{case}, {row['steps']} steps", "yes" if equal else "no", apart, which])
        )
    return [*lines, *costs]


ATTENTION: dict[str, Cell] = {
    "forward, ms": of("forward_ms", ".2f"),
    "forward and backward, ms": of("forward_backward_ms", ".2f"),
    "TFLOP/s": of("tflop_per_s"),
    "relative error": of("relative_error", "g"),
}
KERNELS = {"ms": of("device_ms", ".1f"), "launches": of("launches", "d")}
KERNELS |= {kind: share_of(kind) for kind in KINDS}
END_TO_END: dict[str, Cell] = {
    "images/s": of("images_per_s"),
    "share of the rate on one batch": of("end_to_end_over_synthetic", ".3f"),
    "waiting": of("waiting", ".1%"),
    f"hours of {EPOCHS} epochs of ImageNet-1K (an estimate)": hours,
}
DECODE: dict[str, Cell] = {
    "images/s": of("images_per_s"),
    "largest difference, of 255": of("largest_difference", "d"),
    "mean difference": of("mean_difference", ".3f"),
    "one thread of simplejpeg, images/s": of("one_thread_of_simplejpeg"),
}
METHODS: dict[str, Cell] = {
    "micro-batch": of("micro_batch", "d"),
    "images/s": of("images_per_s"),
    "GFLOP per image": of("gflop_per_image", ".1f"),
    "MFU": of("mfu", ".1%"),
}
TABLES = {
    "ceilings": figures("ceilings", "ceiling", {"measured": bandwidth}),
    "attention": figures("attention", "256 images, 12 heads of 64", ATTENTION),
    "step": steps,
    "kernels": figures("kernels", "device time of a micro-step", KERNELS, RECIPES),
    "end to end": figures("end to end", "steps from JPEG shards", END_TO_END, RECIPES),
    "loader": loader,
    "decode": decode,
    "methods": figures("methods", "step of other methods", METHODS),
    "deterministic": deterministic,
}
PARTS: dict[str, Callable[[], str]] = {
    f"gpu-{'steps' if part == 'step' else part.replace(' ', '-')}": partial(render, part, lines_of)
    for part, lines_of in TABLES.items()
}
