"""`kamim bench`: what offline detection gains on this machine, with every factor printed."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from shards.errors import UserError

app = typer.Typer()

PARTS = ("loaders", "step", "build", "meaning")


@app.command(short_help="Measure loaders with offline and online detection.")
def bench(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder or .tar of class folders, or demo.")
    ] = "demo",
    quick: Annotated[
        bool, typer.Option("--quick", help="Only FAST, coarser: under three minutes on two cores.")
    ] = False,
    only: Annotated[
        str,
        typer.Option(
            metavar="PARTS",
            help=f"Parts, separated by commas: {', '.join(PARTS)}; others with --gpu.",
        ),
    ] = "",
    seconds: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Seconds per loader and repeat.")
    ] = 2.5,
    repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Interleaved repeats.")] = 5,
    save: Annotated[
        bool, typer.Option("--save", help="Append to docs/results/bench and draw into docs.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Measure this GPU, and training on it.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --gpu: the file to append to.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="With --gpu: measure again.")] = False,
    micro_batch: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="With --gpu: images per micro-step. 0: as in training."
        ),
    ] = 0,
) -> None:
    """Measure loaders with offline and online detection on the same images and cores.

    Repeats are interleaved. Figures are medians, with least and most. Warm-up is not counted, and a
    machine that is too noisy is reported. `published` is KAMIM's own code, step by step.

    --gpu is another benchmark, of under ten minutes on a CUDA device. SOURCE may also be finished
    shards. Each figure is appended to docs/results/bench/gpu.jsonl or --out as soon as it is
    measured. If it is cut off, the same command continues.
    """
    if gpu:
        from kamim.bench.gpu import main

        raise typer.Exit(int(main(source, out, only, again, micro_batch) > 0))
    if out or again or micro_batch:
        raise UserError("--out, --again and --micro-batch are for --gpu; leave them out, or add it")
    parts = only.split(",") if only else list(PARTS)
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(f"--only {only!r}: there are {', '.join(PARTS)}")
    if "meaning" in parts and "loaders" not in parts:
        raise UserError("--only meaning needs the loaders' rates; add loaders")
    if save:
        from kamim.bench.provenance import check_checkout

        check_checkout()
    begin = time.perf_counter()
    rows = _measure(source, parts, quick, seconds, repeats)
    if save:
        _save(rows)
    for row in rows if json_output else []:
        print(json.dumps(row, sort_keys=True))
    if not json_output:
        _print(rows)
    print(f"took {time.perf_counter() - begin:.0f} s", file=sys.stderr)


def _measure(
    where: str, parts: list[str], quick: bool, seconds: float, repeats: int
) -> list[dict[str, Any]]:
    from shards.progress import waiting

    with waiting("loading PyTorch and the loaders"):
        import joblib

        from kamim.bench import build, meaning, step, versus
        from preprocess import open_source
        from train.setup import find_device

    source, cores = open_source(where, partial=True), joblib.cpu_count()
    effort = versus.Effort(0.7, 2) if quick else versus.Effort(seconds, repeats)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "loaders" in parts:
            rates = versus.prepare_rivals(source, folder, cores, quick)
            found, warm = versus.measure(rates, len(source.entries), effort)
            rows += versus.rows_of(found, warm, len(source.entries))
            problem = versus.noise(found)
            if problem:
                print(f"warning: {problem}", file=sys.stderr)
            rows = [row | {"noisy": bool(problem)} for row in rows]
        if "step" in parts:
            device = find_device("auto")
            cuda = device.type == "cuda"
            records = versus.prepare_set(source, folder, quick)
            recipes = ["vit_tiny", "vit_small", "vit_base", "swin_tiny", "swin_base"]
            for recipe in recipes if cuda else ["small"]:
                short = {"steps": 3, "repeats": 2} if quick else {"steps": 40 if cuda else 8}
                with waiting(f"training steps of {recipe}"):
                    row = step.measure(records, recipe, device, 256 if cuda else 64, **short)
                rows.append(row)
    if "build" in parts:
        for detector in ("fast",) if quick else build.REPEATS:
            wanted = 1 if quick else build.REPEATS[detector]
            rows.append(build.measure(source, detector, wanted, int(quick)))
    if "meaning" in parts:
        medians = {
            f"{row['loader']}: {row['detector']}": row["images_per_s"]["median"]
            for row in rows
            if row["bench"] == "versus" and row["loader"] != "chain"
        }
        steps = {
            row["recipe"]: row["images_per_s_synthetic"]
            for row in rows
            if row["bench"] == "step" and row["device"] != "cpu"
        }
        rows += meaning.rows_of(medians, cores, steps)
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    from kamim.bench.build import table

    loaders = [r for r in rows if r["bench"] == "versus" and r["loader"] != "chain"]
    if loaders:
        heads = f"{'images/s':>10s}{'least to most':>22s}{'x published':>13s}  of its ceiling"
        print(f"{'loader':42s}{heads}")
    for row in loaders:
        rate, name = row["images_per_s"], row["loader"]
        if "only" not in name:
            name += ", no weights" if row["detector"] == "None" else f", {row['detector']}"
        extent = f"{rate['min']:,.0f} to {rate['max']:,.0f}"
        times = f"{row['times_published']['median']:.1f}" if "times_published" in row else ""
        top = row.get("of_ceiling")
        share = f"{top['median']:.2f} of {top['ceiling']}" if top else ""
        print(f"{name:42s}{rate['median']:10,.0f}{extent:>22s}{times:>13s}  {share}")
    for row in rows:
        if row.get("loader") == "chain":
            factors = ", ".join(f"{k} x {v['median']:.2f}" for k, v in row["factors"].items())
            print(f"\nfrom the published loader to ours, FAST: {factors};")
            print(f"product {row['product']:.1f}, measured {row['total']['median']:.1f}")
        elif row["bench"] == "step":
            mfu = f", {row['mfu']:.0%} MFU" if row["mfu"] else ""
            share, weighing = row["end_to_end_over_synthetic"], row["weighted_over_unweighted"]
            print(f"\nstep, {row['recipe']} on {row['device']}: {row['images_per_s']:,} images/s,")
            weighing_costs = f"weighted / unweighted {weighing:.2f} in time"
            print(f"{share:.2f} of synthetic, {weighing_costs}, waiting {row['waiting']:.1%}{mfu}")
        elif row["bench"] == "build":
            print("\nbuild, " + table(row))
        elif row["bench"] == "meaning":
            hours = ", ".join(f"{way} {h:,.1f}" for way, h in row["hours_100_epochs"].items())
            takes = f"{row['gpu_images_per_s']:,} images/s ({row['gpu_is']})"
            print(f"\n{row['recipe']}: one GPU takes {takes};")
            print(f"hours of 100 epochs of ImageNet-1K with 16 cores, computed: {hours}")


def _save(rows: list[dict[str, Any]]) -> None:
    from kamim.bench.plots import draw_all
    from kamim.bench.provenance import RESULTS, append

    for name in sorted({row["bench"] for row in rows}):
        of_name = [row for row in rows if row["bench"] == name]
        print(append(name, of_name), file=sys.stderr)
    if any(row.get("loader") == "chain" for row in rows):
        for path in draw_all(rows, RESULTS.parents[1]):
            print(path, file=sys.stderr)
