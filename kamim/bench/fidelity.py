"""What accuracy of the maps costs in build time; run by `make bench-fidelity`.

Error against detection on new crops, over milliseconds per image of one thread, by number of crops
(docs/fidelity.png), and the other settings that decide a map, one changed at a time.
"""

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from kamim.bench.measuring import keep, temporary_set
from kamim.bench.plots import picture
from preprocess import decode_image, density_maps, open_source
from preprocess.fidelity import measure_fidelity
from preprocess.source import Source
from shards import Settings

DETECTORS = {"fast": "#31688e", "orb": "#35b779", "sift": "#c0392b"}
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
    """Median milliseconds per image that the maps take on one thread, decoding left out."""
    cv2.setNumThreads(1)
    spent = []
    for number, entry in enumerate(source.entries[:: max(1, len(source.entries) // TIMED)]):
        rgb = decode_image(source.read(entry))
        begin = time.perf_counter()
        density_maps(rgb, number, settings)
        spent.append(1000 * (time.perf_counter() - begin))
    return float(np.median(spent))


def measure(where: str, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One row: the errors of `name`'s maps with the defaults but for `changes`, and their cost."""
    source = open_source(where)
    with temporary_set(where, detectors=(name,), max_rejected=1, **changes) as records:
        settings = records.manifest.settings
        errors = measure_fidelity(records, source, len(source.entries))
    row = {"bench": "fidelity", "detector": name, "changes": changes, "ms": cost(source, settings)}
    row |= errors[name]["map"] | {"rulers": {k: v for k, v in errors[name].items() if k != "map"}}
    found = f"{row['correlation']:.4f} {row['wrong']:.4f} {row['ms']:6.2f} ms"
    print(f"{name:5s} {changes!s:24s} {found}", flush=True)
    return row


def draw(rows: list[dict[str, Any]]) -> None:
    """docs/fidelity.png: misplaced weight over cost, a line per detector, a point per crops."""
    title = "Numbers: random crops beside the whole; dotted: the crop itself, 2 px aside; "
    number: Any = {"xytext": (0, 5), "textcoords": "offset points", "fontsize": 8, "ha": "center"}
    of_crops = [row for row in rows if set(row["changes"]) == {"map_crops"}]
    with picture(PICTURE, 8, 4.4) as axes:
        for name, colour in DETECTORS.items():
            mine = [row for row in of_crops if row["detector"] == name]
            points = [(row["ms"], 100 * row["wrong"]) for row in mine]
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name.upper(), ms=4)
            for row, point in zip(mine, points, strict=True):
                axes.annotate(str(row["changes"]["map_crops"]), point, **number)
            ruler = 100 * mine[0]["rulers"]["shifted"]["wrong"]
            axes.axhline(ruler, color=colour, linestyle=":", linewidth=1)
        axes.set_title(f"{title}{rows[0]['samples']} photos", fontsize=9)
        axes.set(xscale="log", xlabel="ms per image for the map, one thread")
        axes.set(ylabel="% of an image's loss weight on the wrong cell")
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.legend()


def measure_all(where: str) -> list[dict[str, Any]]:
    """A row per detector and variant, drawn."""
    variants = [*({"map_crops": crops} for crops in CROPS), *OTHERS]
    rows = [measure(where, name, changes) for name in DETECTORS for changes in variants]
    draw(rows)
    return rows


if __name__ == "__main__":
    keep("fidelity", measure_all)
