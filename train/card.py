"""A model card of an exported encoder, of what its run knows: data, recipe, numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from train.metrics import read_facts, read_metrics
from train.recipe_file import RUN_FILE, used
from train.recipes import recipe_of

METHODS = {
    "kamim": "KAMIM (arXiv 2407.13873), masked image modelling with keypoint-weighted loss",
    "simmim": "SimMIM (arXiv 2111.09886), masked image modelling",
    "mae": "MAE (arXiv 2111.06377), a masked autoencoder",
}
LEFT_OUT = {
    "step",
    "lr",
    "grad_norm",
    "waiting",
    "temperature",
    "clip_rate",
}  # what says nothing of a model


def card(state: dict[str, Any], source: Path, name: str, line: str, form: str, ema: bool) -> str:
    """The README.md of `name`, exported as `form` from the checkpoint `source`, of that `state`.

    line: loads it. ema: it is the mean of the weights.
    """
    facts, run = state["run"], source.parent.parent
    recipe = replace(recipe_of(facts["recipe"]), micro_batch=facts.get("micro_batch", 0))
    weighted = recipe.temperature is not None
    method = METHODS["kamim" if weighted and recipe.method == "simmim" else recipe.method]
    method += " and keypoint-weighted loss" if weighted and recipe.method == "mae" else ""
    rows = [row for row in read_metrics(run) if row["step"] < state["step"]]
    last = {key: value for row in rows for key, value in row.items() if key not in LEFT_OUT}
    told = read_facts(run)
    places = told.get("shards_folder", "unknown")
    names = [Path(place).name for place in ([places] if isinstance(places, str) else places)]
    weights = f"weights of `{facts['detector']}` densities" if facts["detector"] else "no weights"
    library = {"timm": "timm", "hf": "transformers"}[form]
    numbers = [f"| {k} | {v:.4g} |" for k, v in last.items() if isinstance(v, int | float)]
    init = facts.get("init", "")
    init = init if init.startswith("timm:") else Path(init).name  # no path of this machine
    options = {"window": 0, "decode": "cpu", **facts, "init": init}
    options["deterministic"] = told.get("deterministic", False)
    start = f" It started from `{init}`." if init else ""
    mean = f" These are a mean of its weights over steps, of decay {recipe.ema:g}." if ema else ""
    return "\n".join(
        [
            "---",
            f"library_name: {library}",
            "tags: [image-feature-extraction, self-supervised, masked-image-modelling]",
            "license: unknown  # to fill in: what the images and you allow",
            "---",
            f"# {name}",
            "",
            f"The encoder of `{recipe.model}` for crops of {recipe.size} px, without a head, "
            f"pretrained without labels by {method}.{start}{mean}",
            "",
            "```python",
            f"import {library}",
            "",
            f"model = {line}.eval()",
            "```",
            "",
            f"Images are squeezed to {recipe.size} x {recipe.size} px and normalised by ImageNet's "
            "mean and deviation.",
            "",
            "## Data",
            "",
            f"Shards `{', '.join(names)}`, of fingerprint "
            f"`{facts['shards']}`; {weights}. To fill in: what the images show, and who took them.",
            "",
            "## Numbers",
            "",
            f"After {state['step']:,} steps of {recipe.batch:,} images; the last of each that the "
            "run wrote. To fill in: probes on a set of yours (`kamim probe`).",
            "",
            "| what | value |",
            "|---|---|",
            *numbers,
            "",
            "## Recipe",
            "",
            f"As `{RUN_FILE}`: with the same shards, `kamim pretrain SHARDS --recipe {RUN_FILE}` "
            "repeats the run.",
            "",
            "```toml",
            used(recipe, options, told.get("versions", {})) + "```",
            "",
        ]
    )
