"""Line charts and scatter plots as SVG: text that can be copied, figures for a paper."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shards.html import text

COLOURS = ("#0b61a4", "#d1495b", "#2e933c", "#8f5bb5", "#c77700", "#007f87", "#8a5a44", "#5d6770")
WIDTH, HEIGHT = 340, 210  # of a chart, px
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 24, 34  # of its frame, px
POINTS = 240  # that a line has; of more, neighbours are averaged
FONT = "font-family='system-ui,sans-serif' font-size='11' fill='#444'"


Points = NDArray[np.float64]


class Line(NamedTuple):
    """A curve: its name (none: not in the key), where it is, and how it is drawn."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = COLOURS[0]
    dotted: bool = False


def chart(
    title: str,
    lines: Iterable[Line],
    x_name: str = "epoch",
    low: float | None = None,
    high: float | None = None,
    marks: bool = False,
    across: tuple[float, float] | None = None,
) -> str:
    """`lines` in one frame. Its y axis goes from `low` to `high`, by default from the least value
    to the greatest.

    A curve of many points is drawn as means, over a band from least to greatest. `marks`: a dot at
    each point. `across`: ends of an x axis of whole numbers.
    """
    drawn = [line for line in lines if len(line.x)]
    thin = [_binned(line) for line in drawn]
    xs = np.concatenate([each.x for each in thin] or [np.zeros(1)])
    ys = np.concatenate([each for one in thin for each in (one.least, one.most)] or [np.zeros(1)])
    ys = ys[np.isfinite(ys)] if np.isfinite(ys).any() else np.zeros(1)
    x_ticks = ticks(*across, 7, whole=True) if across else ticks(xs.min(), xs.max())
    begin, end = across or (x_ticks[0], x_ticks[-1])
    y_ticks = ticks(ys.min() if low is None else low, ys.max() if high is None else high)
    named = [line for line in drawn if line.name]
    beside = 1 if any(len(line.name) > 24 for line in named) else 2  # names of the key, in a row
    keys = math.ceil(len(named) / beside) if len(named) > 1 else 0
    top, tall = TOP + 16 * keys, HEIGHT - TOP - BOTTOM
    bottom, right = top + tall, WIDTH - RIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        """Where a point is, px."""
        along = (x - begin) / ((end - begin) or 1)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return LEFT + along * (right - LEFT), bottom - up * tall

    parts = [words(title)]
    for number, line in enumerate(named if keys else ()):
        left, base = 8 + number % beside * (WIDTH - 8) / 2, TOP + 7 + number // beside * 15
        parts.append(f"<path d='M{left:.0f},{base - 4}h16' {_stroke(line)}/>")
        parts.append(_label(left + 20, base, _cut(line.name, 48 // beside), "start"))
    for value in y_ticks:
        _, y = at(x_ticks[0], value)
        parts.append(f"<path d='M{LEFT},{y:.1f}H{right}' stroke='#e3e5e8'/>")
        parts.append(_label(LEFT - 5, y + 4, number_of(value, y_ticks), "end"))
    for value in (each for each in x_ticks if begin <= each <= end):
        x, _ = at(value, y_ticks[0])
        parts.append(_label(x, bottom + 14, number_of(value, x_ticks), "middle"))
    parts.append(_label((LEFT + right) / 2, bottom + 28, x_name, "middle"))
    if not drawn:
        parts.append(_label((LEFT + right) / 2, top + tall / 2, "none of this kind", "middle"))
    for line, one in zip(drawn, thin, strict=True):
        if (one.most > one.least).any():
            there, back = zip(one.x, one.most, strict=True), zip(one.x, one.least, strict=True)
            around = [at(*point) for point in (*there, *reversed(list(back)))]
            shape = _joined(around)
            parts.append(f"<polygon points='{shape}' fill='{line.colour}' opacity='.18'/>")
        points = [at(x, y) for x, y in zip(one.x, one.mean, strict=True) if math.isfinite(y)]
        parts.append(f"<polyline points='{_joined(points)}' fill='none' {_stroke(line)}/>")
        for x, y in points if (marks and not line.dotted) or len(points) == 1 else ():
            parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.4' fill='{line.colour}'/>")
    return svg(parts, title, WIDTH, HEIGHT + 16 * keys)


def scatter(title: str, places: Points, groups: Sequence[int], names: Sequence[str]) -> str:
    """`places` [n, 2], coloured by their `groups`; the key has the `names` of groups."""
    side, rows = WIDTH - 2 * 10, math.ceil(len(names) / 2)
    low, span = places.min(0), np.maximum(np.ptp(places, axis=0), 1e-9)
    shown = (places - low) / span * (side - 8) + (14, TOP + 4)
    parts = [words(title)]
    parts.append(
        f"<rect x='10' y='{TOP}' width='{side}' height='{side}' fill='none' stroke='#d5d8dc'/>"
    )
    parts += [
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='1.8' fill='{COLOURS[group % len(COLOURS)]}'/>"
        for (x, y), group in zip(shown, groups, strict=True)
    ]
    for number, name in enumerate(names):
        x, y = 14 + number % 2 * side / 2, TOP + side + 16 + number // 2 * 15
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f"<circle cx='{x:.0f}' cy='{y - 4}' r='4' fill='{colour}'/>")
        parts.append(_label(x + 9, y, _cut(name, 22), "start"))
    return svg(parts, title, WIDTH, TOP + side + 10 + 15 * rows)


def grid(panels: Sequence[Sequence[str]]) -> str:
    """Rows of charts as one SVG, a figure of its own; a column is WIDTH px wide."""
    parts, y = [], 0.0
    for row in panels:
        heights = [float(panel.split("height='")[1].split("'")[0]) for panel in row]
        for number, panel in enumerate(row):
            parts.append(panel.replace("<svg ", f"<svg x='{number * WIDTH}' y='{y:g}' ", 1))
        y += max(heights, default=0)
    return svg(parts, "all panels", WIDTH * max(map(len, panels), default=1), y)


def svg(parts: Iterable[str], title: str, width: float, height: float) -> str:
    """An <svg> of that many px at most; narrower where there is less room."""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:g} {height:g}' "
        f"width='{width:g}' height='{height:g}' role='img' aria-label='{text(title)}'>"
        f"{''.join(parts)}</svg>"
    )


def ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """About `most` round numbers, evenly spaced, the first and last around `low` and `high`;
    `whole` numbers if asked.
    """
    low, high = float(low), float(high)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / (most - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw * (1 - 1e-9))
    step = float(math.ceil(step)) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, last + 1)]


def number_of(value: float, among: Sequence[float]) -> str:
    """`value` as a label, with the digits that tell it from its neighbours in `among`."""
    step = abs(among[1] - among[0])
    if max(map(abs, among)) >= 1e5 or step < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    digits = next(n for n in range(7) if abs(step * 10**n - round(step * 10**n)) < 1e-6)
    return f"{value:,.{digits}f}"


class _Thin(NamedTuple):
    """A line's points, or their means over neighbourhoods, with the least and most there."""

    x: Points
    mean: Points
    least: Points
    most: Points


def _binned(line: Line) -> _Thin:
    """At most POINTS neighbourhoods of a line's points."""
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    if len(x) <= POINTS:
        return _Thin(x, y, y, y)
    cuts = np.linspace(0, len(x), POINTS + 1).astype(int)
    first, count = cuts[:-1], np.diff(cuts)
    at, mean = (np.add.reduceat(each, first) / count for each in (x, y))
    return _Thin(at, mean, np.minimum.reduceat(y, first), np.maximum.reduceat(y, first))


def _stroke(line: Line) -> str:
    dash = " stroke-dasharray='2 3'" if line.dotted else ""
    return f"stroke='{line.colour}' stroke-width='1.6'{dash}"


def _joined(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def words(title: str, x: float = 8, y: float = 15) -> str:
    """A title at (x, y), as much of it as a chart's width takes."""
    return (
        f"<text x='{x}' y='{y}' font-family='system-ui,sans-serif' font-size='12' "
        f"font-weight='600' fill='#1d2026'>{text(_cut(title, 44))}</text>"
    )


def _label(x: float, y: float, label: str, anchor: str) -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {FONT}>{text(label)}</text>"


def _cut(label: str, most: int) -> str:
    """`label` without their middle, where there is no room for all of them."""
    keep = (most - 1) // 2
    return label if len(label) <= most else f"{label[:keep]}…{label[-keep:]}"
