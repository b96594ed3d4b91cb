"""Density maps: equal to the definition, and as near to detection on crops as measured."""

import cv2
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.densities import density_maps, grid_counts, published_grey
from preprocess.detectors import DEFAULTS, detect, detector_settings
from shards.weights import read_map, weights

SCALES = (192, 208, 224)


@settings(max_examples=60, deadline=None)
@given(st.integers(5, 90), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_grid_counts_are_the_exact_overlaps(side, grid, seed):
    bitmap = (np.random.default_rng(seed).random((side, side)) < 0.4).astype(np.uint8)
    share = oracle.overlaps(grid, side) * grid  # in 1/grid px, as the counts are
    np.testing.assert_allclose(grid_counts(bitmap, grid), share @ bitmap @ share.T, atol=1e-6)


def test_a_full_bitmap_has_density_one_everywhere():
    assert (grid_counts(np.ones((224, 224), np.uint8), 52) == 224 * 224).all()


def test_maps_equal_the_definition(demo_images):
    detectors = [detector_settings(name) for name in DEFAULTS]
    for image in demo_images[::24]:
        maps = density_maps(image, detectors, SCALES, 52, "ring")
        for row, name in enumerate(DEFAULTS):
            expected = oracle.density_map(image, name, SCALES, 52) * 255
            assert np.abs(maps[row] - expected).max() <= 0.5 + 1e-9


def test_an_image_without_keypoints_has_an_empty_map():
    flat = np.full((50, 70, 3), 90, np.uint8)
    assert not density_maps(flat, [detector_settings("fast")], SCALES, 52, "ring").any()


@pytest.mark.parametrize("name", DEFAULTS)
def test_grey_is_what_the_published_detectors_see(name, demo_images):
    """The published code hands RGB to OpenCV, which weighs it as BGR."""
    crop = oracle.resized(demo_images[5], 192)
    theirs = np.array([k.pt for k in oracle.DETECTORS[name]().detect(crop)], np.float32)
    ours = detect(detector_settings(name), published_grey(crop))
    np.testing.assert_array_equal(ours, theirs)
    right_way_round = detect(detector_settings(name), cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY))
    assert len(right_way_round) != len(ours) or not np.array_equal(right_way_round, ours)


@pytest.mark.parametrize(
    ("name", "least_correlation", "most_on_wrong_cell"),
    [("fast", 0.955, 0.11), ("orb", 0.90, 0.19), ("sift", 0.81, 0.27)],
)
def test_maps_foretell_detection_on_crops(name, least_correlation, most_on_wrong_cell, photos):
    """One random crop a photo, w_ps 8, T 0.25; ORB's cells within 27 px of the edge are zero."""
    rng = np.random.default_rng(1)
    stored, detected, wrong = [], [], []
    for path in photos[::5]:
        rgb = cv2.imread(str(path))[:, :, ::-1]
        rows, columns = rgb.shape[:2]
        top, left, height, width = oracle.random_box(rows, columns, rng)
        crop = oracle.resized(rgb[top : top + height, left : left + width], 192)
        truth = oracle.crop_density(crop, name)
        whole = density_maps(rgb, [detector_settings(name)], SCALES, 52, "ring")[0]
        box = (top / rows, left / columns, height / rows, width / columns)
        read = read_map(whole, box, 24)
        if name == "orb":
            border = np.clip((np.arange(24) + 1) * 8 - 27, 0, 8) / 8
            border = np.minimum(border, border[::-1])
            read *= np.outer(border, border)
        a, b = weights(read, 0.25), oracle.weights(truth)
        wrong.append(np.abs(a / a.sum() - b / b.sum()).sum() / 2)
        stored.append(read.ravel())
        detected.append(truth.ravel())
    correlation = np.corrcoef(np.concatenate(stored), np.concatenate(detected))[0, 1]
    assert correlation >= least_correlation
    assert np.mean(wrong) <= most_on_wrong_cell


def test_reading_a_map_is_the_plain_mean_where_cells_align():
    density = np.random.default_rng(0).integers(0, 256, (52, 52)).astype(np.uint8)
    read = read_map(density, (0, 0, 1, 1), 26)
    plain = density.reshape(26, 2, 26, 2).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(read, plain, atol=1e-12)
    quarter = read_map(density, (0.5, 0, 0.5, 0.5), 13)
    np.testing.assert_allclose(quarter, plain[13:, :13], atol=1e-12)


def test_weights_follow_the_published_formula():
    density = np.array([[0.0, 0.25], [0.5, 1.0]])
    np.testing.assert_allclose(weights(density, 0.25), np.exp([[0, 1], [2, 4]]))
    assert weights(np.zeros((3, 3)), 0.25).tolist() == np.ones((3, 3)).tolist()
