"""Golden numbers: 20 losses of each method on the demo, seed 0, on a CPU.

A change that should not alter numbers leaves them equal. After one that is meant to,
`python tests/integration/test_golden.py FOLDER` writes them anew.
"""

import json
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

torch = pytest.importorskip("torch")

from preprocess import build_shards, detector_settings, open_source
from shards import Settings
from train.loop import pretrain
from train.metrics import read_metrics
from train.recipes import find_recipe
from train.request import Run

GOLDEN = REPOSITORY / "tests" / "golden" / "losses.json"
METHODS = ("small", "small_simmim", "small_mae", "small_famt")
THREADS = 2  # of torch: sums are in their order
STEPS, BATCH = 20, 64  # four epochs: attention is looked at after the first


def losses(shards: Path, recipe: str, out: Path) -> list[float]:
    """The losses of STEPS steps."""
    from dataclasses import replace

    chosen = replace(find_recipe(recipe), batch=BATCH)
    torch.set_num_threads(THREADS)
    pretrain(Run(shards=shards, out=out, recipe=chosen, detector="fast", device="cpu", steps=STEPS))
    return [row["loss"] for row in read_metrics(out)]


def build(out: Path) -> Path:
    """The demo with maps of FAST and of frequency, for crops of the recipe's size."""
    detectors = tuple(map(detector_settings, ("fast", "frequency")))
    build_shards(
        open_source("demo"), out, Settings(detectors=detectors, shard_size=64, crop=96, frame=128)
    )
    return out


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return build(tmp_path_factory.mktemp("golden") / "demo")


@pytest.mark.parametrize("recipe", METHODS)
def test_losses_are_the_golden_ones(recipe, demo, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    before = torch.get_num_threads()
    try:
        found = losses(demo, recipe, tmp_path / recipe)
    finally:
        torch.set_num_threads(before)
    # Other processors and versions of torch sum in another order.
    assert found == pytest.approx(golden[recipe], rel=1e-4)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = {recipe: losses(build(folder / "demo"), recipe, folder / recipe) for recipe in METHODS}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
