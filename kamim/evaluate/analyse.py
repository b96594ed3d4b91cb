"""Several encoders side by side: attention, frequencies, tokens and reconstructions on one page.

analysis.html is for reading, analysis.svg has all its panels as one figure, analysis.json and the
tables have the numbers.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards import ShardSet, crop_frames, decode_frame
from shards.html import page, table, text
from shards.progress import counted, waiting
from shards.report import spread
from train import checkpoint
from train.charts import COLOURS, WIDTH, Line, chart, grid, scatter, svg, words
from train.diagnosis import diagnose, is_readable
from train.features import Encoder, tokens
from train.masking import block_masks, counts, drawn, races
from train.metrics import COLLAPSED
from train.models import MEAN, STD, Cells, make_model
from train.recipes import Recipe, recipe_of

MASK_RATIO = {"simmim": 0.6, "mae": 0.75}  # at random, whatever a run drew by
TOKENS = 2000  # that t-SNE draws of each encoder
CLASSES = 8  # that t-SNE tells apart, by colour
PANELS = {  # a row of the grid each
    "distance": "attention distance, px (dotted: uniform)",
    "nmi": "mutual information of query and key",
    "frequency": "log amplitude, high against low",
}
STYLE = """.panels{display:grid;gap:.8rem}.panels figcaption{font-weight:600}
.panels svg{width:100%;height:auto;display:block}
.warning{border-left:4px solid #d1495b;padding-left:.7rem}
pre{overflow-x:auto;user-select:all;font-size:12px}summary{cursor:pointer}"""


def of_classes(records: ShardSet, count: int) -> tuple[list[int], list[int], list[str]]:
    """(numbers of about `count` records, group of each, names of groups): as many of each of up to
    CLASSES classes; of a set without classes, CLASSES records by their sources' names.
    """
    labels, classes = records.index["label"].astype(int), records.manifest.classes
    there = np.unique(labels[(labels >= 0) & (labels < len(classes))])
    if len(there) < 2:
        numbers = spread(len(records), CLASSES)
        named = [records[n].source or f"record {records[n].key}" for n in numbers]
        return numbers, list(range(len(numbers))), named
    shown = there[spread(len(there), CLASSES)]
    numbers, groups = [], []
    for group, label in enumerate(shown):
        mine = np.flatnonzero(labels == label)[: max(1, count // len(shown))]
        numbers += mine.tolist()
        groups += [group] * len(mine)
    return numbers, groups, [classes[label] for label in shown]


def images_of(records: ShardSet, encoder: Encoder, numbers: list[int]) -> Tensor:
    """Whole frames of records `numbers` as `encoder` takes them, float32 [count, 3, size, size]."""
    frames = torch.from_numpy(np.stack([decode_frame(records[n].frame) for n in numbers]))
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(frames), 4)
    flips = torch.zeros(len(frames), 2, dtype=torch.bool)
    return encoder.normalised(crop_frames(frames, whole, flips, encoder.size))


def reconstruction(path: Path, images: Tensor, seed: int) -> dict[str, float]:
    """PSNR in dB and SSIM of masked pixels only, colours 0 to 1, by the whole model in `path`.

    Masks are random: a SimMIM's hides 0.6, a MAE's 0.75, so compare those of one kind.
    """
    from skimage.metrics import structural_similarity

    state = checkpoint.load(path)
    recipe = recipe_of(state["run"]["recipe"])
    model = make_model(recipe).eval()
    model.load_state_dict(state["model"])
    shown = random_cells(recipe, model.patch, seed, images)
    with torch.inference_mode():
        made, masks, _ = model.picture(model(images, *shown), images, shown)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    truth, made = ((x * std + mean).clamp(0, 1) for x in (images, made))
    cell = images.shape[-1] // masks.shape[-1]
    where_hidden = masks.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    made = torch.where(where_hidden[:, None], made, truth)  # SSIM's windows reach beyond the cells
    error = ((truth - made) ** 2).mean(1)[where_hidden].mean()
    similar = []
    for a, b, where in zip(truth, made, where_hidden, strict=True):
        pair = (x.permute(1, 2, 0).numpy() for x in (a, b))
        similarity: Any = structural_similarity
        _, each = similarity(*pair, channel_axis=2, data_range=1.0, full=True)
        similar.append(each.mean(2)[where.numpy()].mean())
    psnr = round(float(-10 * torch.log10(error)), 3)
    return {"psnr_masked": psnr, "ssim_masked": round(float(np.mean(similar)), 4)}


def random_cells(recipe: Recipe, patch: int, seed: int, images: Tensor) -> Cells:
    """Random cells as the recipe's model takes them: SimMIM's mask, MAE's masked and visible."""
    ratio, size, count = MASK_RATIO[recipe.method], recipe.size, len(images)
    if recipe.method == "simmim":
        return Cells(block_masks(seed, 0, count, size // recipe.cell, ratio, images.device))
    patches = (size // patch) ** 2
    order = drawn(races(seed, 0, count, patches)).to(images.device)
    masked = counts(patches, ratio, 0, "mae")[0]
    return Cells(order[:, :masked], order[:, masked:])


def analyse(
    encoders: dict[str, Encoder], models: dict[str, Path], records: ShardSet, out: Path, count: int
) -> tuple[dict[str, Any], list[str]]:
    """Write analysis.html, analysis.svg and analysis.json into `out`; returns the figures, and a
    warning for each encoder whose attention collapsed.

    `models` are the checkpoints of ours among them, for reconstructions. Swins have no figures of
    attention: their windows see 7 x 7 tokens at most. Nor have ViTs of other blocks than the plain.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    maps, warnings = [], []
    numbers, groups, named = of_classes(records, count)
    for number, (title, encoder) in enumerate(encoders.items(), start=1):
        which = f"{title} ({number} of {len(encoders)})"
        with waiting(f"{which}: attention"):
            images = images_of(records, encoder, spread(len(records), count))
            rows = diagnose(encoder.model, images) if is_readable(encoder.model) else []
        found[title] = {"blocks": rows}
        if rows and max(row["nmi"] for row in rows) < COLLAPSED:
            warnings.append(
                f"{title}: attention has collapsed: normalised mutual information is below "
                f"{COLLAPSED} in every block, so it does not depend on the image"
            )
        if title in models:
            with waiting(f"{which}: reconstructions"):
                found[title] |= reconstruction(models[title], images, seed=0)
        with waiting(f"{which}: t-SNE of tokens"), torch.inference_mode():
            images = images_of(records, encoder, numbers)
            patches, _ = tokens(encoder, images, encoder.default_block)
            places, of = _places(patches, groups)
            block = f"t-SNE of tokens after block {encoder.default_block}"
            maps.append(scatter(block, places, of, named))
    (out / "analysis.json").write_text(json.dumps(found, indent=2) + "\n")
    panels = {**_panels(found), "tokens": maps}
    headed = [[_heading(title) for title in found], *panels.values()]
    (out / "analysis.svg").write_text(grid(headed), encoding="utf-8")
    (out / "analysis.html").write_text(_page(found, warnings, panels, records), encoding="utf-8")
    return found, warnings


def _places(patches: Tensor, groups: list[int]) -> tuple[np.ndarray, list[int]]:
    """t-SNE of up to TOKENS of the `patches` [b, n, d]: places [m, 2], and the group of each."""
    from sklearn.manifold import TSNE

    b, n, _ = patches.shape
    chosen = np.random.default_rng(0).permutation(b * n)[:TOKENS]
    flat = patches.flatten(0, 1).numpy()[chosen]
    perplexity = min(30, max(2, len(flat) // 4))
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat)
    return places, np.repeat(groups, n)[chosen].tolist()


def _panels(found: dict[str, Any]) -> dict[str, list[str]]:
    """By figure a chart of each encoder, all of a row on the same axes."""
    rows = [row for facts in found.values() for row in facts["blocks"]]
    most = max((int(row["block"]) for row in rows), default=1)
    made: dict[str, list[str]] = {}
    for key, title in PANELS.items():
        values = [row[key] for row in rows] or [0.0]
        low, high = min(values) if key == "frequency" else 0.0, max(values)
        if key == "distance":
            high = max([high, *(row["uniform"] for row in rows)])
        made[key] = []
        for facts in found.values():
            blocks = [row["block"] for row in facts["blocks"]]
            lines = [Line("", blocks, [row[key] for row in facts["blocks"]])]
            if key == "distance":
                uniform = [row["uniform"] for row in facts["blocks"]]
                lines.append(Line("", blocks, uniform, COLOURS[7], dotted=True))
            made[key].append(chart(title, lines, "block", low, high, True, (1, most)))
    return made


def _heading(title: str) -> str:
    """The name of a column of the figure."""
    return svg([words(title, 8, 16)], title, WIDTH, 22)


def _page(
    found: dict[str, Any], warnings: list[str], panels: dict[str, list[str]], records: ShardSet
) -> str:
    """Tables and panels, self-explaining, every name escaped."""
    count = len(found)
    columns = f"repeat(auto-fill,minmax(max(220px,calc((100% - {count - 1}*.8rem)/{count})),1fr))"
    style = f"body{{max-width:{max(720, 360 * count)}px}}.panels{{grid-template-columns:{columns}}}"
    parts = [f"<p class=warning>{text(warning)}" for warning in warnings]
    parts.append(
        f"<p>{counted(count, 'encoder')} on images of {text(records.folder.name)}. All panels of a "
        "kind have the same axes. <code>analysis.svg</code> beside this page holds them as one "
        "figure, <code>analysis.json</code> the numbers."
    )
    for row in panels.values():
        parts.append("<div class=panels>")
        for title, panel in zip(found, row, strict=True):
            parts.append(f"<figure><figcaption>{text(title)}</figcaption>{panel}</figure>")
        parts.append("</div>")
    head, rows = _table(found)
    sheet = io.StringIO()
    csv.writer(sheet, lineterminator="\n").writerows([head, *rows])
    parts += ["<h2>Numbers</h2>", _summary(found)]
    parts.append(f"<details><summary>Every block</summary>{table(head, rows)}</details>")
    parts.append(
        "<details><summary>The same as CSV: one click selects all of it</summary>"
        f"<pre>{text(sheet.getvalue())}</pre></details>"
    )
    return page("Analysis", parts, STYLE + style)


def _table(found: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows: each block of each encoder."""
    keys = ["block", "distance", "uniform", "nmi", "frequency"]
    of = [(title, row) for title, facts in found.items() for row in facts["blocks"]]
    return ["encoder", *keys], [[title, *(row[key] for key in keys)] for title, row in of]


def _summary(found: dict[str, Any]) -> str:
    """A table of what encoders have one figure of."""
    rows = []
    for title, facts in found.items():
        blocks = facts["blocks"]
        distance = f"{np.mean([row['distance'] for row in blocks]):.1f}" if blocks else ""
        best = f"{max(row['nmi'] for row in blocks):.4f}" if blocks else ""
        psnr = f"{facts['psnr_masked']:.2f}" if "psnr_masked" in facts else ""
        ssim = f"{facts['ssim_masked']:.3f}" if "ssim_masked" in facts else ""
        rows.append([title, distance, best, psnr, ssim])
    note = (
        "<p>Distance is the mean of the blocks, information that of the block with most; PSNR and "
        "SSIM are of masked pixels."
    )
    return table(["encoder", "distance, px", "information", "PSNR, dB", "SSIM"], rows) + note
