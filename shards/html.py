"""Self-contained pages: head, harmless text, pictures and tables. They run no scripts."""

import base64
import html
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;
padding:0 1rem;color:#1d2026;background:#fff;overflow-wrap:break-word}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}
table{border-collapse:collapse}td,th{padding:.25rem .8rem .25rem 0;text-align:left;
vertical-align:top}td{overflow-wrap:anywhere}td.n{text-align:right;
font-variant-numeric:tabular-nums}
figure{margin:0;min-width:0}figcaption{font-size:12px;margin-top:3px;color:#555}
.wide{overflow-x:auto}.wide td{white-space:nowrap}.wide th{text-align:right;
vertical-align:bottom}.wide th:first-child{text-align:left;
overflow-wrap:anywhere;min-width:6.5rem}
@media(max-width:700px){.wide{font-size:12px}.wide td,.wide th{padding-right:.5rem}}"""


def text(value: object) -> str:
    """`value` as harmless HTML text. Bytes that are not UTF-8 show as question marks."""
    return html.escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def page(title: str, parts: Iterable[str], style: str = "") -> str:
    """A whole page under its title, for screens from 360 px on; `style` is added to STYLE."""
    name = text(title)
    head = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<link rel=icon href=data:,><title>{name}</title><style>{STYLE}{style}</style>"
    )
    return "".join([head, f"<h1>{name}</h1>", *parts, "</html>\n"])


def heat(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Levels [h, w] as colours, RGB [h, w, 3]: 0 is dark, 255 yellow."""
    return np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[:, :, ::-1], np.uint8)


def encoded(rgb: NDArray[np.generic], form: str = "jpg") -> bytes:
    """Pixels [h, w, 3] as a file, `jpg` or `png`."""
    bgr = np.ascontiguousarray(rgb[:, :, ::-1]).astype(np.uint8)
    options = [cv2.IMWRITE_JPEG_QUALITY, 88] if form == "jpg" else []
    return cv2.imencode(f".{form}", bgr, options)[1].tobytes()


def image(file: bytes, form: str = "jpg", alt: str = "") -> str:
    """An <img> that holds its `file`."""
    kind, data = {"jpg": "jpeg"}.get(form, form), base64.b64encode(file).decode("ascii")
    return f"<img alt='{text(alt)}' src='data:image/{kind};base64,{data}'>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table under a `head`. All cells of a row but the first are numbers. On a narrow screen it
    scrolls within itself.
    """
    lines = ["<div class=wide><table><tr>", *(f"<th>{text(name)}" for name in head)]
    for first, *numbers in rows:
        lines.append(f"<tr><th>{text(first)}" + "".join(f"<td class=n>{text(n)}" for n in numbers))
    return "".join([*lines, "</table></div>"])
