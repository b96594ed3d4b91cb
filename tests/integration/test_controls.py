"""Weights by controls: each keeps what it should of a detector's, and takes the rest away."""

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from shards.errors import UserError
from shards.weighting import loss_weights
from train.controls import check_source, contrast, control_weights
from train.loop import pretrain
from train.metrics import read_metrics
from train.recipes import changed, find_recipe
from train.request import Run


@pytest.fixture
def crops():
    """(densities [6, 12, 12], images [6, 3, 96, 96], samples and epochs)."""
    generator = torch.Generator().manual_seed(0)
    density = torch.rand(6, 12, 12, generator=generator)
    images = torch.rand(6, 3, 96, 96, generator=generator)
    return density, images, {"samples": torch.arange(6), "epochs": torch.zeros(6).long()}


def weights(source, crops, **changes):
    return control_weights(*crops, source=source, **{"normalise": "batch", **changes})


def of_each(values):
    """Each image's values, from least to most."""
    return values.flatten(1).sort(1).values


def test_batch_weights_have_mean_one_over_the_batch_only(crops):
    found = weights("detector", crops)
    assert found.mean().item() == pytest.approx(1, rel=1e-6)
    assert found.mean((1, 2)).std() > 0.01
    assert torch.equal(found, loss_weights(crops[0], 0.25, "batch"))


@pytest.mark.parametrize("source", ["permuted", "contrast"])
def test_a_crop_keeps_its_weights_in_other_places(source, crops):
    plain, moved = weights("detector", crops), weights(source, crops)
    torch.testing.assert_close(of_each(plain), of_each(moved))
    together = torch.stack([plain.flatten(), moved.flatten()])
    assert abs(torch.corrcoef(together)[0, 1]) < 0.2


def test_contrast_puts_the_most_weight_where_an_image_is_steepest(crops):
    density, images, batch = crops
    images = images * 0.01
    images[:, :, 40:48, 16:24] *= 100
    found = control_weights(density, images, batch, source="contrast")
    assert (found.flatten(1).argmax(1) == 5 * 12 + 2).all()
    assert (contrast(images, 12).flatten(1).argmax(1) == 5 * 12 + 2).all()


def test_shuffled_weights_are_another_crops(crops):
    plain, moved = weights("detector", crops), weights("shuffled", crops)
    assert torch.equal(moved, plain.roll(1, 0))


def test_inverse_weights_are_one_over_the_detectors(crops):
    plain, turned = (weights(name, crops, normalise="min") for name in ("detector", "inverse"))
    product = plain * turned
    torch.testing.assert_close(product / product[:, :1, :1], torch.ones_like(product))


def test_constants_are_what_they_say(crops):
    assert (weights("uniform", crops) == 1).all()
    assert (weights("constant:26", crops) == 26).all()


def test_a_permutation_is_one_of_its_sample_and_epoch(crops):
    density, images, batch = crops
    again = {"samples": batch["samples"].flip(0), "epochs": batch["epochs"]}
    flipped = control_weights(density.flip(0), images, again, source="permuted")
    assert torch.equal(flipped.flip(0), control_weights(*crops, source="permuted"))
    later = batch | {"epochs": batch["epochs"] + 1}
    assert not torch.equal(
        flipped.flip(0), control_weights(density, images, later, source="permuted")
    )


@pytest.mark.parametrize("source", ["keypoints", "constant:", "constant:0", "constant:x"])
def test_an_unknown_source_is_named(source):
    with pytest.raises(UserError, match="unknown"):
        check_source(source)


def test_a_run_weighs_by_its_control_in_cells_of_16_px(built, tmp_path):
    small = replace(find_recipe("small"), batch=8, cell=16, weights="contrast", normalise="batch")
    for name in ("contrast", "detector"):
        recipe = replace(small, weights=name)
        pretrain(
            Run(
                shards=built,
                out=tmp_path / name,
                recipe=recipe,
                detector="fast",
                steps=2,
                device="cpu",
            )
        )
    rows = {name: read_metrics(tmp_path / name) for name in ("contrast", "detector")}
    for each in rows.values():
        assert np.allclose([row["mean_weight"] for row in each], 1, atol=1e-5)
    assert rows["contrast"][0]["loss"] != rows["detector"][0]["loss"]


def test_fields_of_a_recipe_are_set_by_words():
    words = [
        "cell=16",
        "weights=contrast",
        "normalise=batch",
        "area=0.08,0.3",
        "temperature=none",
        "decay_all=false",
        'options={"depth": 4}',
        "peak=1e-3",
    ]
    found = changed(find_recipe("small"), words)
    assert found == replace(
        find_recipe("small"),
        cell=16,
        weights="contrast",
        normalise="batch",
        area=(0.08, 0.3),
        temperature=None,
        decay_all=False,
        options={"depth": 4},
        peak=1e-3,
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sell=16", "no 'sell'; did you mean cell"),
        ("cell=x", "cell=x does not fit; it takes: whole number"),
        ("normalise=most", "it takes: min, mean, batch"),
        ("area=0.1", "it takes: 2 numbers"),
        ("decay_all=perhaps", "it takes: true, false"),
        ("options=3", "it takes: table"),
        ("cell", "cell has no value; give cell=VALUE"),
    ],
)
def test_a_wrong_word_is_told_apart(word, said):
    with pytest.raises(UserError, match=said):
        changed(find_recipe("small"), [word])
