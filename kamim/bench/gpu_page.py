"""The tables of docs/gpu.md, from the lines of `kamim bench --gpu`; what has no line says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kamim.bench.provenance import RESULTS

Row = dict[str, Any]
RECIPES = ("vit_tiny", "vit_small", "vit_base", "swin_tiny", "swin_base")
IMAGENET, EPOCHS = 1_281_167, 110  # as the published code runs: the last ten at the floor
NOTHING = "not measured"
KINDS = ("products", "attention", "convolution", "compiled", "eager", "copies")


def rows_of(path: Path) -> list[Row]:
    """The lines of results in `path`, if there are any."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measured() -> dict[str, dict[tuple[str, str], Row]]:
    """The newest row of each (part, case), by GPU."""
    found: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows_of(RESULTS / "gpu.jsonl"):
        if row["gpu"]:
            found.setdefault(row["gpu"], {})[row["part"], row["case"]] = row
    return found


def render(part: str, table: Callable[[dict[tuple[str, str], Row]], list[str]]) -> str:
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
        lines += [*table(rows), "", origin, ""]
    return "\n".join(lines or ["Not measured yet: `make bench-gpu`.", ""])


def head(*titles: str) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def middle(row: Row, key: str, form: str = ",.0f") -> str:
    """The median of a figure of `row`, or the figure itself."""
    value = row.get(key)
    if value is None:
        return NOTHING
    return f"{value['median'] if isinstance(value, dict) else value:{form}}"


def of_part(
    rows: dict[tuple[str, str], Row], part: str, first: tuple[str, ...] = ()
) -> list[tuple[str, Row]]:
    """(case, row) of a part: those of `first`, measured or not, and the others."""
    others = [case for name, case in rows if name == part and case not in first]
    return [(case, rows.get((part, case), {})) for case in [*first, *others]]


def render_ceilings() -> str:
    """Bytes and products a second."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        lines = head("ceiling", "measured")
        for case, row in of_part(rows, "ceilings"):
            unit = "GB/s" if "gb_per_s" in row else "TFLOP/s"
            key = "gb_per_s" if "gb_per_s" in row else "tflop_per_s"
            lines.append(line(case, f"{middle(row, key)} {unit}"))
        return lines

    return render("ceilings", table)


def render_attention() -> str:
    """Milliseconds of each backend."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        lines = head(
            "256 images, 12 heads of 64",
            "forward, ms",
            "forward and backward, ms",
            "TFLOP/s",
            "relative error",
        )
        for case, row in of_part(rows, "attention"):
            lines.append(
                line(
                    case,
                    middle(row, "forward_ms", ".2f"),
                    middle(row, "forward_backward_ms", ".2f"),
                    middle(row, "tflop_per_s"),
                    middle(row, "relative_error", "g"),
                )
            )
        return lines

    return render("attention", table)


def render_steps() -> str:
    """Rates of steps on one batch."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        lines = head(
            "step on one batch",
            "micro-batch",
            "images/s",
            "MFU",
            "peak memory",
            "per image",
            "micro-step, ms",
            "host, ms",
            "waits",
            "graphs, breaks, recompiles",
        )
        for case, row in of_part(rows, "step", RECIPES):
            counted = ", ".join(
                str(row[k]) for k in ("graphs", "graph_breaks", "recompiles") if k in row
            )
            lines.append(
                line(
                    case,
                    middle(row, "micro_batch", "d"),
                    middle(row, "images_per_s"),
                    middle(row, "mfu", ".1%"),
                    gigabytes(row),
                    f"{middle(row, 'peak_mb_per_image', '.1f')} MB" if row else NOTHING,
                    middle(row, "micro_step_ms", ".1f"),
                    middle(row, "host_ms", ".1f"),
                    middle(row, "synchronisations_of_a_step", "d"),
                    counted or NOTHING,
                )
            )
        for case, row in of_part(rows, "weights"):
            ratio = row["weighted_over_unweighted"]
            lines += [
                "",
                f"{case}: a weighted step takes {ratio['median']:.3f} of the time of one "
                f"without weights ({ratio['min']:.3f} to {ratio['max']:.3f}).",
            ]
        return lines

    return render("step", table)


def gigabytes(row: Row) -> str:
    return f"{row['peak_gb']:.1f} GB" if "peak_gb" in row else NOTHING


def render_kernels() -> str:
    """Where a micro-step's device time goes."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        lines = head("device time of a micro-step", "ms", "launches", *KINDS)
        for case, row in of_part(rows, "kernels", RECIPES):
            whole, kinds = row.get("device_ms"), row.get("device_ms_by_kind", {})
            shares = [f"{kinds.get(kind, 0) / whole:.0%}" if whole else NOTHING for kind in KINDS]
            lines.append(
                line(case, middle(row, "device_ms", ".1f"), middle(row, "launches", "d"), *shares)
            )
        return lines

    return render("kernels", table)


def render_end_to_end() -> str:
    """Rates of steps from shards, and what they come to for ImageNet."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        lines = head(
            "steps from JPEG shards",
            "images/s",
            "of synthetic",
            "waiting",
            f"hours of {EPOCHS} epochs of ImageNet-1K (an estimate)",
        )
        for case, row in of_part(rows, "end to end", RECIPES):
            hours = NOTHING
            if row:
                hours = f"{EPOCHS * IMAGENET / row['images_per_s']['median'] / 3600:.1f}"
            lines.append(
                line(
                    case,
                    middle(row, "images_per_s"),
                    middle(row, "end_to_end_over_synthetic", ".3f"),
                    middle(row, "waiting", ".1%"),
                    hours,
                )
            )
        return lines

    return render("end to end", table)


def render_loader() -> str:
    """Rates of the loader by threads."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        by_kind: dict[str, dict[int, Row]] = {}
        for case, row in of_part(rows, "loader"):
            by_kind.setdefault(case.partition(",")[0], {})[row.get("threads", 0)] = row
        threads = sorted({count for found in by_kind.values() for count in found if count})
        lines = head("loader alone, images/s by threads", *map(str, threads))
        for kind, found in by_kind.items():
            missing = next((r["missing"] for r in found.values() if "missing" in r), NOTHING)
            lines.append(
                line(
                    kind,
                    *(middle(found[n], "images_per_s") if n in found else missing for n in threads),
                )
            )
        return lines

    return render("loader", table)


def render_decode() -> str:
    """Rates of nvJPEG, and its pixels."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        lines = head(
            "JPEG frames decoded on the GPU",
            "images/s",
            "largest difference, of 255",
            "mean difference",
            "one thread of simplejpeg, images/s",
        )
        for case, row in of_part(rows, "decode"):
            lines.append(
                line(
                    case,
                    middle(row, "images_per_s"),
                    middle(row, "largest_difference", "d"),
                    middle(row, "mean_difference", ".3f"),
                    middle(row, "one_thread_of_simplejpeg"),
                )
            )
        return lines

    return render("decode", table)


def render_methods() -> str:
    """Rates of other methods' steps."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        lines = head("step of other methods", "micro-batch", "images/s", "GFLOP per image", "MFU")
        for case, row in of_part(rows, "methods"):
            lines.append(
                line(
                    case,
                    middle(row, "micro_batch", "d"),
                    middle(row, "images_per_s"),
                    middle(row, "gflop_per_image", ".1f"),
                    middle(row, "mfu", ".1%"),
                )
            )
        return lines

    return render("methods", table)


def render_deterministic() -> str:
    """Killed and resumed against unbroken, and what determinism costs."""

    def table(rows: dict[tuple[str, str], Row]) -> list[str]:
        lines = head(
            "killed and resumed against unbroken",
            "losses equal",
            "largest relative difference",
            "first step that differs",
        )
        steps: list[str] = []
        for case, row in of_part(rows, "deterministic"):
            if "equal" not in row:
                rate, plain = row["images_per_s"]["median"], rows.get(("step", case), {})
                of = f", of {middle(plain, 'images_per_s')} without" if plain else ""
                steps += ["", f"Steps of {case} with --deterministic: {rate:,.0f} images/s{of}."]
                continue
            lines.append(
                line(
                    f"{case}, {row['steps']} steps",
                    "yes" if row["equal"] else "no",
                    middle(row, "largest_relative_difference", ".2g"),
                    str(row["first_step_that_differs"] or "none"),
                )
            )
        return [*lines, *steps]

    return render("deterministic", table)


PARTS = {
    "gpu-ceilings": render_ceilings,
    "gpu-attention": render_attention,
    "gpu-steps": render_steps,
    "gpu-kernels": render_kernels,
    "gpu-end-to-end": render_end_to_end,
    "gpu-loader": render_loader,
    "gpu-decode": render_decode,
    "gpu-methods": render_methods,
    "gpu-deterministic": render_deterministic,
}
