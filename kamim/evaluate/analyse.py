"""Several encoders side by side: attention, frequencies, tokens and reconstructions on one page."""

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kamim.evaluate.attention import COLLAPSED, diagnose
from kamim.evaluate.encoder import Encoder, tokens
from shards import ShardSet, crop_frames, decode_frame
from shards.progress import waiting
from train import checkpoint
from train.masking import block_masks, counts, drawn, races
from train.models import MEAN, STD, Cells, make_model, normalised
from train.recipes import Recipe, recipe_of

MASK_RATIO = {"simmim": 0.6, "mae": 0.75}  # at random, whatever a run drew by
TOKENS = 2000  # that t-SNE draws of each encoder


def images_of(records: ShardSet, size: int, count: int) -> Tensor:
    """`count` whole frames, spread over the set, normalised, float32 [count, 3, size, size]."""
    numbers = np.unique(np.linspace(0, len(records) - 1, count).astype(int)).tolist()
    frames = torch.from_numpy(np.stack([decode_frame(records[n].frame) for n in numbers]))
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(frames), 4)
    flips = torch.zeros(len(frames), 2, dtype=torch.bool)
    return normalised(crop_frames(frames, whole, flips, size))


def reconstruction(path: Path, images: Tensor, seed: int) -> dict[str, float]:
    """PSNR in dB and SSIM of masked pixels only, colours 0 to 1, by the whole model in `path`.

    Masks are random: a SimMIM's hides 0.6, a MAE's 0.75, so compare those of one kind.
    """
    from skimage.metrics import structural_similarity

    state = checkpoint.load(path)
    recipe = recipe_of(state["run"]["recipe"])
    model = make_model(recipe).eval()
    model.load_state_dict(state["model"])
    shown = hidden(recipe, model.patch, seed, images)
    with torch.inference_mode():
        made, masks, _ = model.picture(model(images, *shown), images, shown)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    truth, made = ((x * std + mean).clamp(0, 1) for x in (images, made))
    cell = images.shape[-1] // masks.shape[-1]
    where_hidden = masks.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
    error = ((truth - made) ** 2).mean(1)[where_hidden].mean()
    similar = []
    for a, b, where in zip(truth, made, where_hidden, strict=True):
        pair = (x.permute(1, 2, 0).numpy() for x in (a, b))
        similarity: Any = structural_similarity
        _, each = similarity(*pair, channel_axis=2, data_range=1.0, full=True)
        similar.append(each.mean(2)[where.numpy()].mean())
    psnr = round(float(-10 * torch.log10(error)), 3)
    return {"psnr_masked": psnr, "ssim_masked": round(float(np.mean(similar)), 4)}


def hidden(recipe: Recipe, patch: int, seed: int, images: Tensor) -> Cells:
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
    """Write analysis.html, its plots and analysis.json into `out`; returns the figures, and a
    warning for each encoder whose attention collapsed.

    `models` are the checkpoints of ours among them, for reconstructions. Swins have no figures of
    attention: their windows see 7 x 7 tokens at most.
    """
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    warnings = []
    for number, (title, encoder) in enumerate(encoders.items(), start=1):
        which = f"{title} ({number} of {len(encoders)})"
        with waiting(f"{which}: attention"):
            images = images_of(records, encoder.size, count)
            rows = [] if hasattr(encoder.model, "layers") else diagnose(encoder.model, images)
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
            patches, _ = tokens(encoder, images, encoder.default_block)
            _draw_tokens(patches, out / f"tokens-{number}.png", title)
    (out / "analysis.json").write_text(json.dumps(found, indent=2) + "\n")
    _draw_blocks(found, out / "blocks.png")
    (out / "analysis.html").write_text(_page(found, warnings), encoding="utf-8")
    return found, warnings


def _draw_tokens(patches: Tensor, path: Path, title: str) -> None:
    """t-SNE of up to TOKENS patch tokens, coloured by image."""
    from matplotlib import pyplot
    from sklearn.manifold import TSNE

    b, n, _ = patches.shape
    owner = np.repeat(np.arange(b), n)
    chosen = np.random.default_rng(0).permutation(b * n)[:TOKENS]
    flat = patches.flatten(0, 1).numpy()[chosen]
    perplexity = min(30, max(2, len(flat) // 4))
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat)
    figure, axes = pyplot.subplots(figsize=(4, 4), layout="constrained")
    axes.scatter(places[:, 0], places[:, 1], c=owner[chosen], cmap="tab20", s=3)
    axes.set(xticks=[], yticks=[], title=title)
    axes.title.set_fontsize(9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_blocks(found: dict[str, Any], path: Path) -> None:
    """Distance, mutual information and frequency by block, a line per encoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    names = {
        "distance": "attention distance, px",
        "nmi": "normalised mutual information",
        "frequency": "log amplitude, highest against lowest frequency",
    }
    for panel, (key, label) in zip(axes, names.items(), strict=True):
        for title, facts in found.items():
            blocks = [row["block"] for row in facts["blocks"]]
            panel.plot(blocks, [row[key] for row in facts["blocks"]], "o-", ms=3, label=title)
            if key == "distance" and blocks:
                panel.axhline(facts["blocks"][0]["uniform"], color="#999999", ls=":")
        panel.set(xlabel="block", title=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _page(found: dict[str, Any], warnings: list[str]) -> str:
    """Tables and pictures, self-explaining, every name escaped."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        "<title>Analysis</title><style>"
        "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1180px;"
        "padding:0 1rem;overflow-wrap:anywhere}img{max-width:100%;height:auto}"
        ".wide{overflow-x:auto}td,th{padding:.2rem .8rem .2rem 0;text-align:right;"
        "overflow-wrap:normal}</style><h1>Analysis</h1>"
    ]
    parts += [f"<p><b>{html.escape(warning)}</b>" for warning in warnings]
    parts.append("<p><img src=blocks.png alt='figures by block'><p>Dotted: uniform attention.")
    for number, (title, facts) in enumerate(found.items(), start=1):
        parts.append(f"<h2>{html.escape(title)}</h2>")
        if "psnr_masked" in facts:
            psnr, ssim = facts["psnr_masked"], facts["ssim_masked"]
            parts.append(f"<p>Masked pixels: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}")
        if facts["blocks"]:
            parts.append(
                "<div class=wide><table><tr>" + "".join(f"<th>{key}" for key in facts["blocks"][0])
            )
            for row in facts["blocks"]:
                parts.append("<tr>" + "".join(f"<td>{value}" for value in row.values()))
            parts.append("</table></div>")
        parts.append(f"<img src=tokens-{number}.png alt='t-SNE of tokens'>")
    return "".join(parts) + "</html>\n"
