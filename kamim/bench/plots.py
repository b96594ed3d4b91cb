"""Pictures of a benchmark, for the README and docs.

loaders.png: images per second of every loader, logarithmic. factors.png: where the gain comes from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ORDER = (
    "online, published",
    "ImageFolder",
    "litdata",
    "stock webdataset",
    "FFCV's RandomResizedCrop",
    "online, optimised",
    "offline, WebDataset",
    "offline, WebDataset raw",
    "offline, FFCV JPEG",
    "offline, FFCV raw",
)
FACTORS = (
    "marks by dilation",
    "no detection",
    "smaller JPEG",
    "no crop on the CPU",
    "threads, simplejpeg, no copies",
)
WAYS = ("published", "optimised", "WebDataset")
COLOURS = {"fast": "#31688e", "orb": "#35b779", "sift": "#c0392b", "None": "#999999"}
LABELS = {"fast": "FAST", "orb": "ORB", "sift": "SIFT", "None": "no weights"}


@contextmanager
def picture(
    path: Path, width: float, height: float, panels: tuple[int, int] = (1, 1)
) -> Iterator[Any]:
    """Axes to draw on, in a figure that is `path` once the block ends; inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*panels, figsize=(width, height), layout="constrained")
    yield axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_all(rows: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Both pictures of the rows of kamim.bench.versus into `folder`; returns their paths."""
    loaders = [r for r in rows if r.get("loader") in ORDER]
    chain = next(r for r in rows if r.get("loader") == "chain")
    paths = [folder / "loaders.png", folder / "factors.png"]
    draw_loaders(loaders, paths[0])
    draw_factors(chain, paths[1])
    return paths


def draw_loaders(rows: list[dict[str, Any]], path: Path) -> None:
    """A bar per loader and detector, with least and most."""
    rows = sorted(
        rows, key=lambda r: (-ORDER.index(r["loader"]), -list(LABELS).index(r["detector"]))
    )
    with picture(path, 9, 0.27 * len(rows) + 1.2) as axes:
        for place, row in enumerate(rows):
            rate, colour = row["images_per_s"], COLOURS[row["detector"]]
            error = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
            axes.barh(place, rate["median"], xerr=error, color=colour, height=0.75)
            axes.text(rate["max"] * 1.05, place, f"{rate['median']:,.0f}", va="center", fontsize=8)
        names = [f"{row['loader']}: {LABELS[row['detector']]}" for row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.set(xscale="log", xlabel=f"images per second, median of {rows[0]['n']}, least to most")
        axes.set_xlim(right=3 * max(r["images_per_s"]["max"] for r in rows))
        axes.grid(axis="x", alpha=0.3)


def draw_factors(chain: dict[str, Any], path: Path) -> None:
    """The factors between the published loader and ours, one on the other, logarithmic."""
    at, count, total = 1.0, len(FACTORS), chain["total"]["median"]
    with picture(path, 9, 2.6) as axes:
        for place, name in zip(range(count, 0, -1), FACTORS, strict=True):
            factor = chain["factors"][name]["median"]
            axes.barh(place, at * factor - at, left=at, color="#31688e", height=0.7)
            at *= factor
            axes.text(at * 1.03, place, f"x {factor:.2f}", va="center", fontsize=9)
        axes.barh(0, total - 1, left=1, color="#35b779", height=0.7)
        axes.text(total * 1.03, 0, f"x {total:.1f}", va="center", fontsize=9)
        axes.set_yticks(range(count, -1, -1), [*FACTORS, "in all, FAST, WebDataset"], fontsize=9)
        axes.set(xscale="log", xlabel="times the published online loader", xlim=(0.9, total * 1.6))
        axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.grid(axis="x", alpha=0.3)
