"""A finished set as one HTML page: frames, densities, weights of a crop, histograms, ledger.

The page holds its pictures and runs no scripts; every name from the data is escaped.
"""

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.correction import correction
from shards.crops import read_crop, read_map, weights
from shards.dataset import ShardSet
from shards.errors import UserError
from shards.html import encoded, heat, image, page, text
from shards.order import Plan
from shards.progress import counted
from shards.record import Record, decode_frame
from shards.spec import Manifest

SHADES = "#440154,#3b528b,#21918c,#5ec962,#fde725"  # viridis, dark to light
STYLE = f"""svg text{{font:11px system-ui,sans-serif;fill:#555}}
.plots{{display:flex;flex-wrap:wrap;gap:1.5rem}}.plots svg{{max-width:100%;height:auto}}
.card{{display:grid;grid-template-columns:repeat(5,1fr);gap:.8rem .6rem;
border-top:1px solid #ddd;padding:.9rem 0}}.card dl{{grid-column:1/-1;margin:0}}
dl div{{display:flex;gap:.5rem}}dt{{flex:0 0 2.6rem;color:#555}}dd{{margin:0;min-width:0}}
.density{{grid-column-start:3}}
.picture{{position:relative;overflow:hidden;border-radius:3px}}
.picture img{{width:100%;display:block}}.cells img{{image-rendering:pixelated}}
.box{{position:absolute;box-sizing:border-box;border:2px solid #fff;
box-shadow:0 0 0 99rem #0006,inset 0 0 0 1px #000}}
.bar{{height:8px;margin-top:4px;background:linear-gradient(90deg,{SHADES})}}
.ends{{display:flex;justify-content:space-between;font-size:12px;color:#555}}
@media(max-width:700px){{.card{{grid-template-columns:repeat(2,1fr)}}
.density{{grid-column-start:1}}}}"""


BLANK = np.full((216, 216, 3), 255, np.uint8)  # where a set has no frames


def inspect_page(records: ShardSet, temperature: float, w_ps: int, samples: int) -> str:
    """The page as HTML text.

    It shows `samples` records, spread evenly, each with the crop that a run of seed 0 makes of it
    in its first epoch. The histograms are of the weights of up to 512 frames, each read whole (no
    crop) with as many cells per side as a crop. Raises UserError if w_ps does not divide the crop
    or the temperature is out of range.
    """
    crop = records.manifest.settings.crop
    if w_ps < 1 or crop % w_ps:
        raise UserError(f"w_ps {w_ps} does not divide {crop}; use 8, 16 or 32")
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature {temperature} is out of range; the published one is 0.25")
    manifest = records.manifest
    measured = [records[n].maps for n in spread(len(records), 512)]
    cells = crop // w_ps
    parts = [
        _facts(manifest),
        _ledger(manifest),
        f"<h2>Weights at T = {temperature:g}, w_ps = {w_ps}</h2><p>Over {len(measured)} whole "
        f"frames of {cells} x {cells} cells. A weight is exp(density / T) over the frame's "
        "smallest, so the least is 1.</p><div class=plots>",
    ]
    for detector in manifest.settings.detectors:
        if not detector.has_keypoints:
            continue
        found = [
            weights(read_map(m[detector.name], (0, 0, 1, 1), cells), temperature) for m in measured
        ]
        parts.append(_histogram(detector.name, np.concatenate([w.ravel() for w in found])))
    parts.append(
        "</div><h2>Frames, densities and weights</h2><p>A density is the share of a cell's pixels "
        "that keypoint marks cover, or of the greatest low-frequency amplitude: 0 to 1. The white "
        "rectangle is the crop that a run of seed 0 makes of the frame in its first epoch; the "
        f"weights, of {cells} x {cells} cells, are those that this run reads for it: how many "
        "times as much a cell's error counts as that of the cell with the least weight.</p>"
    )
    for n in spread(len(records), samples):
        parts.append(_card(records[n], n, manifest, cells, temperature))
    return page(records.folder.name, parts, STYLE)


def spread(count: int, samples: int) -> list[int]:
    """Up to `samples` of the numbers 0 to count - 1, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(samples, count)).astype(int)).tolist()


def _facts(manifest: Manifest) -> str:
    settings = manifest.settings
    frame = "raw" if settings.quality == 0 else f"JPEG quality {settings.quality}, 4:2:0"
    size = sum(shard.bytes for shard in manifest.shards)
    facts = {
        "records": f"{manifest.count:,} in {counted(len(manifest.shards), 'shard')}, "
        f"{size / 1e6:,.1f} MB, {size / max(1, manifest.count):,.0f} bytes per record",
        "classes": f"{len(manifest.classes):,}",
        "frame": f"{settings.frame} px, {frame}" if settings.frame else "none",
        "maps": f"{settings.grid} x {settings.grid}, {settings.mark} marks detected on the "
        f"{settings.detect_on}: the whole and {settings.map_crops} random crops, for training "
        f"crops of {settings.crop} px",
        "bank": f"{settings.bank} stored crops per image" if settings.bank else "none",
        "stored weights": "none"
        if settings.weights is None
        else "T {:g}, w_ps {}".format(*settings.weights),
        "fidelity": _fidelity(manifest),
        "detectors": "; ".join(
            f"{d.name} ({', '.join(f'{k} {v}' for k, v in d.options.items())})"
            for d in settings.detectors
        ),
        "versions": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        "fingerprint": manifest.fingerprint[:16],
    }
    rows = "".join(f"<tr><th>{name}<td>{text(value)}" for name, value in facts.items())
    return f"<table>{rows}</table>"


def _fidelity(manifest: Manifest) -> str:
    found = manifest.fidelity
    if not found:
        return "not measured yet: kamim shards fidelity"
    errors = "; ".join(
        f"{name} {what}: correlation {e['correlation']:.3f}, {e['wrong']:.1%} of the weight on the "
        f"wrong cell"
        for name, of_detector in found["detectors"].items()
        for what, e in of_detector.items()
    )
    return f"{errors}; against detection on crops, T {found['temperature']}, w_ps {found['w_ps']}"


def _ledger(manifest: Manifest) -> str:
    ledger = manifest.ledger
    lines = {"inputs": ledger.inputs, "written": ledger.written}
    lines |= {f"rejected: {reason}": n for reason, n in sorted(ledger.rejected.items())}
    rows = "".join(f"<tr><th>{text(name)}<td class=n>{n:,}" for name, n in lines.items())
    verdict = "balances" if ledger.balanced else "DOES NOT BALANCE"
    return f"<h2>Ledger</h2><table>{rows}</table><p>The ledger {verdict}.</p>"


def _histogram(name: str, values: NDArray[np.float64]) -> str:
    """Shares of cells by weight on a logarithmic axis, as inline SVG."""
    bins = 32
    end = np.log(max(float(values.max()), np.e))
    counts, _ = np.histogram(np.log(values), bins=bins, range=(0, end))
    shares = counts / counts.sum()
    width, height = 340, 130
    bars = "".join(
        f"<rect x='{i * width / bins:.1f}' y='{10 + height * (1 - s / shares.max()):.1f}' "
        f"width='{width / bins - 1:.1f}' height='{height * s / shares.max():.1f}' fill='#31688e'/>"
        for i, s in enumerate(shares)
    )
    ticks = "".join(
        f"<text x='{width * f:.0f}' y='{height + 26}' text-anchor='{anchor}'>{np.exp(end * f):.3g}"
        "</text>"
        for f, anchor in (
            (0, "start"),
            (0.25, "middle"),
            (0.5, "middle"),
            (0.75, "middle"),
            (1, "end"),
        )
    )
    return (
        f"<figure style='flex:0 1 {width}px'>"
        f"<svg viewBox='0 0 {width} {height + 32}' width='{width}' role='img' "
        f"aria-label='weights of {text(name)}'>{bars}{ticks}</svg><figcaption>"
        f"<b>{text(name)}</b>, share of cells by weight (log scale): mean {values.mean():.2f}, "
        f"median {np.median(values):.2f}, largest {values.max():.1f}; highest bar "
        f"{shares.max():.0%} of cells</figcaption></figure>"
    )


def _card(record: Record, number: int, manifest: Manifest, cells: int, temperature: float) -> str:
    """What record `number` is, its frame with a crop on it, that crop, and what detectors say."""
    settings = manifest.settings
    plan, first = Plan(manifest.count, 1, area=settings.area), np.array([0])
    size = np.array([record.height]), np.array([record.width])
    boxes, turned = plan.boxes(first, np.array([number]), *size)
    box, flips = boxes[0].tolist(), turned[0].tolist()
    frame = decode_frame(record.frame) if record.frame else BLANK
    how = " and ".join(w for w, on in zip(("left-right", "upside down"), flips, strict=True) if on)
    parts = [
        _heading(record, manifest),
        _figure(frame, "the frame, and a crop", box=box),
        _figure(
            crop_picture(frame, box, flips, settings.crop),
            f"the crop{f', flipped {how}' if how else ''}",
        ),
    ]
    for detector in settings.detectors:
        density, name = record.maps[detector.name], detector.name
        lit = frame * (0.25 + 0.75 * cv2.resize(density / 255, frame.shape[:2])[:, :, None])
        end = "1, all of a cell" if detector.has_keypoints else "1, the greatest"
        mean = f"{name}: density of the frame, mean {density.mean() / 255:.3f}"
        parts.append(_figure(heat(density), mean, "density", ("0", end)))
        parts.append(_figure(lit, f"{name}: the frame, bright where density is high"))
        if not detector.has_keypoints:
            continue
        found = read_crop(density, detector, settings, box, flips, cells)
        table = correction(detector, settings.mark, temperature, settings.crop // cells, cells)
        read = table.weights(found, temperature) if table else weights(found, temperature)
        levels = np.rint(255 * (read - 1) / max(float(read.max()) - 1, 1e-9)).astype(np.uint8)
        title = f"{name}: weights of the crop, mean {read.mean():.2f}"
        ends = ("x 1", f"x {read.max():.3g} the least")
        parts.append(_figure(heat(levels), title, "weights", ends))
    return f"<div class=card>{''.join(parts)}</div>"


def _heading(record: Record, manifest: Manifest) -> str:
    """File name, class and size, a line each; a long name may break after / _ and - alone."""
    name = text(record.source or f"record {record.key}")
    for mark in "/_-":
        name = name.replace(mark, f"{mark}<wbr>")
    known = 0 <= record.label < len(manifest.classes)
    of_class = f"{manifest.classes[record.label]} (label {record.label})" if known else "none"
    lines = {
        "file": name,
        "class": text(of_class),
        "size": f"{record.width} x {record.height} px, the source's",
    }
    rows = "".join(f"<div><dt>{title}<dd>{line}</div>" for title, line in lines.items())
    return f"<dl>{rows}</dl>"


def crop_picture(
    frame: NDArray[np.uint8], box: Sequence[float], flips: Sequence[bool], side: int
) -> NDArray[np.uint8]:
    """The crop of `frame` (RGB [F, F, 3]) as training makes it, uint8 [side, side, 3].

    `box` is (top, left, height, width) in the unit square, `flips` are (horizontal, vertical).
    """
    top, left, height, width = (part * len(frame) for part in box)
    x, y = width / side, height / side  # px of the frame a px of the crop
    places = np.array([[x, 0, left + x / 2 - 0.5], [0, y, top + y / 2 - 0.5]])
    how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    crop = cv2.warpAffine(frame, places, (side, side), flags=how, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(crop[:: -1 if flips[1] else 1, :: -1 if flips[0] else 1], np.uint8)


def _figure(
    rgb: NDArray[np.generic],
    caption: str,
    kind: str = "",
    ends: tuple[str, str] | None = None,
    box: Sequence[float] | None = None,
) -> str:
    """A picture over its caption: cells and the bar of their colours where there are `ends`, and
    `box`, of the unit square, drawn on it.
    """
    form, inside, bar = ("png" if ends else "jpg"), "", ""
    if box:
        style = ";".join(
            f"{side}:{100 * part:.2f}%"
            for side, part in zip(("top", "left", "height", "width"), box, strict=True)
        )
        inside = f"<div class=box style='{style}'></div>"
    if ends:
        bar = f"<div class=bar></div><div class=ends><span>{ends[0]}</span>{ends[1]}</div>"
    return (
        f"<figure class='{kind}'><div class='picture{' cells' if ends else ''}'>"
        f"{image(encoded(rgb, form), form)}{inside}</div>{bar}"
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )
