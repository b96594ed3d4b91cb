"""What accuracy of the maps costs in build time; run by `make bench-fidelity`.

In: a source of photographs. Out: a table, results/fidelity.jsonl and docs/fidelity.png: error
against detection on new crops, over milliseconds an image of one thread, by number of crops, and
the other settings that decide a map, one changed at a time.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kamim.bench.provenance import append
from preprocess import build_shards, decode_image, density_maps, detector_settings, open_source
from preprocess.building import shard_size_for
from preprocess.fidelity import measure_fidelity
from preprocess.source import Source
from shards import Settings, ShardSet

CROPS = (0, 1, 2, 3, 4, 6, 8)
OTHERS: tuple[dict[str, Any], ...] = (
    {"grid": 26},
    {"grid": 40},
    {"grid": 64},
    {"mark": "disc"},
    {"mark": "point"},
    {"detect_on": "frame"},
)
TIMED = 100  # photographs that the cost is measured on
PICTURE = Path(__file__).parents[2] / "docs" / "fidelity.png"


def cost(source: Source, settings: Settings) -> float:
    """Median milliseconds that the maps of an image take on one thread, decoding left out."""
    cv2.setNumThreads(1)
    spent = []
    for number, entry in enumerate(source.entries[:: max(1, len(source.entries) // TIMED)]):
        rgb = decode_image(source.read(entry))
        begin = time.perf_counter()
        density_maps(rgb, number, settings)
        spent.append(1000 * (time.perf_counter() - begin))
    return float(np.median(spent))


def measure(source: Source, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One row: the errors of `name`'s maps with the defaults but for `changes`, and their cost."""
    size = shard_size_for(len(source.entries))
    settings = Settings(detectors=(detector_settings(name),), shard_size=size, **changes)
    with tempfile.TemporaryDirectory() as folder:
        build_shards(source, Path(folder) / "set", settings, max_rejected=1)
        errors = measure_fidelity(ShardSet(Path(folder) / "set"), source, len(source.entries))
    row = {"bench": "fidelity", "detector": name, "changes": changes, "ms": cost(source, settings)}
    row |= errors[name]["map"] | {"rulers": {k: v for k, v in errors[name].items() if k != "map"}}
    print(f"{name:5s} {changes!s:24s} {row['correlation']:.4f} {row['wrong']:.4f} "
          f"{row['ms']:6.2f} ms", flush=True)  # fmt: skip
    return row


def draw(rows: list[dict[str, Any]]) -> None:
    """docs/fidelity.png: misplaced weight over cost for each detector, a point a crop count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.4), layout="constrained")
    for name, colour in (("fast", "#31688e"), ("orb", "#35b779"), ("sift", "#c0392b")):
        of_name = [r for r in rows if r["detector"] == name and set(r["changes"]) == {"map_crops"}]
        x, y = [r["ms"] for r in of_name], [100 * r["wrong"] for r in of_name]
        axes.plot(x, y, "o-", color=colour, label=name.upper(), markersize=4)
        for row, at, height in zip(of_name, x, y, strict=True):
            axes.annotate(str(row["changes"]["map_crops"]), (at, height), (0, 5),
                          textcoords="offset points", fontsize=8, ha="center")  # fmt: skip
        ruler = 100 * of_name[0]["rulers"]["shifted"]["wrong"]
        axes.axhline(ruler, color=colour, linestyle=":", linewidth=1)
    axes.set(xscale="log", xlabel="ms an image for the map, one thread",
             ylabel="% of an image's loss weight on the wrong cell",
             title=f"Numbers: random crops beside the whole; dotted: the crop itself, 2 px aside; "
                   f"{rows[0]['samples']} photos")  # fmt: skip
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(PICTURE, dpi=120)


def main(where: str) -> None:
    """Measure every variant, draw, append."""
    source = open_source(where)
    variants: list[dict[str, Any]] = [{"map_crops": crops} for crops in CROPS]
    rows = [measure(source, name, change) for name in ("fast", "orb", "sift")
            for change in (*variants, *OTHERS)]  # fmt: skip
    draw(rows)
    print(append("fidelity", rows))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
