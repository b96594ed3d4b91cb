"""A finished set as one HTML page to look at: frames, heat maps, weight histograms, ledger.

In: a set of shards, a temperature and w_ps. Out: a self-contained page without scripts; every
name from the data is escaped.
"""

import base64
import html

import cv2
import numpy as np
from numpy.typing import NDArray

from shards.manifest import Manifest
from shards.reader import ShardSet
from shards.record import Record, decode_frame
from shards.weights import read_map, weights

CROP = 192  # px; the published crop, whose w_ps cells the weights are shown for
STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;
padding:0 1rem;color:#1d2026;background:#fff}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.25rem .8rem .25rem 0;text-align:left;
vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}
.row{display:flex;gap:.6rem;margin:0 0 1rem}.wide{flex-wrap:wrap;gap:1.5rem}figure{margin:0}
img{width:100%;display:block;border-radius:3px}.row>figure{flex:0 1 208px;min-width:0}
figcaption{font-size:12px;color:#555;overflow-wrap:anywhere}code{font-size:13px}
svg text{font:11px system-ui,sans-serif;fill:#555}"""


def inspect_page(records: ShardSet, temperature: float, w_ps: int, samples: int) -> str:
    """The page as HTML text. `samples` records, spread evenly, are shown; the weights of up to
    512 make the histograms, each frame read whole (no crop) with CROP / w_ps cells a side.

    Raises ValueError if w_ps does not divide CROP or the temperature is not positive.
    """
    if w_ps < 1 or CROP % w_ps:
        raise ValueError(f"w_ps {w_ps} does not divide {CROP}; use 8, 16 or 32")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive; the published one is 0.25")
    manifest = records.manifest
    shown = [records[n] for n in _spread(len(records), samples)]
    measured = [records[n].maps for n in _spread(len(records), 512)]
    cells = CROP // w_ps
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{_text(records.folder.name)}"
        f"</title><style>{STYLE}</style><h1>{_text(records.folder.name)}</h1>",
        _facts(manifest),
        _ledger(manifest),
        f"<h2>Weights at T = {temperature:g}, w_ps = {w_ps}</h2><p>Over {len(measured)} whole "
        f"frames of {cells} x {cells} cells. A weight is exp(density / T) over the frame's "
        "smallest, so the least is 1.</p><div class='row wide'>",
    ]
    for row, detector in enumerate(manifest.settings.detectors):
        if not detector.has_keypoints:
            continue
        found = [weights(read_map(m[row], (0, 0, 1, 1), cells), temperature) for m in measured]
        parts.append(_histogram(detector.name, np.concatenate([w.ravel() for w in found])))
    parts.append(
        "</div><h2>Frames and densities</h2><p>Dark is density 0, yellow is 1: the share of a "
        "cell's pixels that keypoint marks cover, or of the greatest low-frequency amplitude.</p>"
    )
    parts += [_pictures(record, manifest.detectors) for record in shown]
    return "".join(parts) + "</html>\n"


def _text(value: object) -> str:
    """`value` as harmless HTML text; bytes that are no UTF-8 show as question marks."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def _spread(count: int, samples: int) -> list[int]:
    numbers = np.linspace(0, count - 1, min(samples, count)).astype(int)
    return [int(number) for number in np.unique(numbers)]


def _facts(manifest: Manifest) -> str:
    settings = manifest.settings
    frame = "raw" if settings.quality == 0 else f"JPEG quality {settings.quality}, 4:2:0"
    size = sum(shard.bytes for shard in manifest.shards)
    facts = {
        "records": f"{manifest.count:,} in {len(manifest.shards)} shards, {size / 1e6:,.1f} MB, "
        f"{size / max(1, manifest.count):,.0f} bytes a record",
        "classes": f"{len(manifest.classes):,}",
        "frame": f"{settings.frame} px, {frame}",
        "maps": f"{settings.grid} x {settings.grid}, {settings.mark} marks detected on the "
        f"{settings.detect_on}: the whole and {settings.map_crops} random crops, for training "
        f"crops of {settings.crop} px",
        "bank": f"{settings.bank} stored crops an image" if settings.bank else "none",
        "fidelity": _fidelity(manifest),
        "detectors": "; ".join(
            f"{d.name} ({', '.join(f'{k} {v}' for k, v in d.options.items())})"
            for d in settings.detectors
        ),
        "versions": ", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        "fingerprint": manifest.fingerprint[:16],
    }
    rows = "".join(f"<tr><th>{name}<td>{_text(value)}" for name, value in facts.items())
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
    rows = "".join(f"<tr><th>{_text(name)}<td class=n>{n:,}" for name, n in lines.items())
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
        f"<figure style='flex:0 0 {width}px'>"
        f"<svg width='{width}' height='{height + 32}' role='img' "
        f"aria-label='weights of {_text(name)}'>{bars}{ticks}</svg><figcaption>"
        f"<b>{_text(name)}</b>, share of cells by weight (log scale): mean {values.mean():.2f}, "
        f"median {np.median(values):.2f}, largest {values.max():.1f}; highest bar "
        f"{shares.max():.0%} of cells</figcaption></figure>"
    )


def _pictures(record: Record, detectors: list[str]) -> str:
    frame = decode_frame(record.frame)
    figures = [
        _figure(
            frame,
            f"{record.source} (label {record.label}, source {record.width} x {record.height})",
        )
    ]
    for name, density in zip(detectors, record.maps, strict=True):
        heat = cv2.applyColorMap(density, cv2.COLORMAP_VIRIDIS)[:, :, ::-1]
        heat = cv2.resize(heat, frame.shape[:2], interpolation=cv2.INTER_NEAREST)
        figures.append(_figure(heat, f"{name}: mean {density.mean() / 255:.3f}"))
        lit = frame * (0.25 + 0.75 * cv2.resize(density / 255, frame.shape[:2])[:, :, None])
        figures.append(_figure(lit, f"{name}: the frame lit by its density"))
    return f"<div class=row>{''.join(figures)}</div>"


def _figure(rgb: NDArray[np.generic], caption: str) -> str:
    bgr = np.ascontiguousarray(rgb[:, :, ::-1]).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
    data = base64.b64encode(jpeg.tobytes()).decode("ascii")
    return (
        f"<figure><img alt='' src='data:image/jpeg;base64,{data}'>"
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )
