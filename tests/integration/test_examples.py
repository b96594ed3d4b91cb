"""The examples of stock readers: each lowers its loss, and its crops and weights are ours."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from conftest import REPOSITORY

torch = pytest.importorskip("torch")

import shards
from preprocess import build_shards, detector_settings, open_source
from shards.beton import convert_to_ffcv
from train.loss import masked_l1
from train.masking import block_masks

STEPS = 20
NEEDS = {"stock_webdataset": "webdataset", "stock_datasets": "datasets", "stock_ffcv": "ffcv"}
NAMES = [*NEEDS, "own_model"]
LONG = ("stock_datasets", "stock_ffcv", "stock_webdataset")  # to import and compile


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """80 images of the demo: a batch holds most of them, so losses differ by learning alone."""
    out, source = tmp_path_factory.mktemp("examples") / "demo", open_source("demo")
    chosen = shards.Settings(
        detectors=(detector_settings("fast"),), shard_size=16, crop=96, frame=128
    )
    build_shards(replace(source, entries=source.entries[::3][:80]), out, chosen, 1)
    return out


@pytest.fixture(scope="module")
def beton(demo):
    convert_to_ffcv(demo, demo.with_name("ffcv"))
    return demo.with_name("ffcv")


@pytest.fixture
def folder(request):
    """The set that an example is for; skips, visibly, where its library is missing."""
    name = request.node.callspec.params["name"]
    if importlib.util.find_spec(NEEDS.get(name, "torch")) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    return request.getfixturevalue("beton" if name == "stock_ffcv" else "demo")


def loaded(name):
    path = REPOSITORY / "examples" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def lowered(losses):
    """Holds the losses of STEPS steps to falling: of 8 seeds to 0.84 to 0.88 of the first ones."""
    assert len(losses) == STEPS
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:3])


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*.py")), ids=str)
def test_each_is_short(path):
    assert len([line for line in path.read_text().splitlines() if line]) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_model", *NEEDS])
def test_it_lowers_its_loss(name, folder, printed):
    lowered(printed(name, folder, STEPS))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in NAMES],
)
def test_its_crops_weights_and_losses_are_ours(name, folder, demo, tmp_path, monkeypatch):
    """Of each sample the same as our own loader's, in whatever order the reader has them."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    records = shards.open(demo)
    plan = shards.Plan(len(records), batch=64)
    crops = shards.WeightedCrops(records, "fast", size=96)
    ours = {}
    for _, tensors in shards.to_device(
        records.loader(plan, 0, 12, maps=["fast"]), torch.device("cpu")
    ):
        found = crops(tensors)
        for place, key in enumerate(
            zip(found.epochs.tolist(), found.samples.tolist(), strict=True)
        ):
            ours[key] = [each[place].clone() for each in found[:3]]
    batches = loaded(name).batches(folder, plan)
    for _ in range(6):  # an epoch each, of which what fills no batch is left out
        theirs = crops(next(batches))
        keys = list(zip(theirs.epochs.tolist(), theirs.samples.tolist(), strict=True))
        images, weights, labels = (
            torch.stack(part) for part in zip(*map(ours.get, keys), strict=True)
        )
        # FFCV decodes with the fast DCT, which is up to 16 of 255 off; the others as we do.
        torch.testing.assert_close(
            theirs.images, images, atol=16 / 255 if name == "stock_ffcv" else 1e-6, rtol=0
        )
        torch.testing.assert_close(theirs.weights, weights)
        assert theirs.labels.tolist() == labels.tolist()
        mask = block_masks(0, 0, len(images), 3, 0.6, images.device)
        pair = [
            masked_l1(i * 0.5, i, mask, w)
            for i, w in ((theirs.images, theirs.weights), (images, weights))
        ]
        torch.testing.assert_close(*pair, rtol=1e-2 if name == "stock_ffcv" else 1e-6, atol=0)
    assert {epoch for epoch, _ in keys} == {4 if name == "own_model" else 5}


def test_a_loss_of_ones_own_is_the_same_number():
    found = loaded("own_model").loss_of
    images, output = torch.rand(3, 3, 96, 96), torch.rand(3, 3, 96, 96)
    weights, mask = 1 + torch.rand(3, 6, 6), torch.rand(3, 6, 6) < 0.6
    patches = torch.nn.functional.unfold(output, 16, stride=16).mT
    mine = found(patches, images, mask.float().view(3, 36, 1), weights)
    torch.testing.assert_close(mine, masked_l1(output, images, mask, weights))
