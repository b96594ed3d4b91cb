"""Marks: the fast bitmap equals OpenCV's drawing, pixel for pixel."""

import cv2
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.densities import published_grey
from preprocess.detectors import detect, detector_settings
from preprocess.rings import MARKS, draw, mark


@pytest.mark.parametrize("name", ["fast", "orb", pytest.param("sift", marks=pytest.mark.slow)])
def test_rings_equal_the_published_drawing_on_real_crops(name, photos):
    rng = np.random.default_rng(0)
    detector = detector_settings(name)
    painted = 0
    for path in photos[::4]:
        rgb = cv2.imread(str(path))[:, :, ::-1]
        top, left, height, width = oracle.random_box(*rgb.shape[:2], rng)
        crop = oracle.resized(rgb[top : top + height, left : left + width], 192)
        bitmap = mark(detect(detector, published_grey(crop)), 192, 192, "ring")
        np.testing.assert_array_equal(bitmap, oracle.rings(crop, name), str(path))
        painted += int(bitmap.sum())
    assert len(photos[::4]) == 200
    assert painted > 100_000


@pytest.mark.parametrize("name", ["fast", "orb", "sift"])
def test_rings_equal_the_published_drawing_on_demo_images(name, demo_images):
    detector = detector_settings(name)
    for image in demo_images[::6]:
        crop = oracle.resized(image, 192)
        bitmap = mark(detect(detector, published_grey(crop)), 192, 192, "ring")
        np.testing.assert_array_equal(bitmap, oracle.rings(crop, name))


@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("whole", [True, False])
@settings(max_examples=150)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 40))
def test_any_points_are_marked_as_drawn(kind, whole, seed, count):
    """Whole or fractional, inside, on and beyond the border, alone or crowded."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(8, 48, 2)
    points = rng.uniform(-2, [width + 1, height + 1], (count, 2)).astype(np.float32)
    points = np.rint(points) if whole else points
    expected = draw(points, height, width, kind)
    np.testing.assert_array_equal(mark(points, height, width, kind), expected)


@pytest.mark.parametrize("kind", MARKS)
def test_every_sub_pixel_phase_is_marked_as_drawn_near_every_border(kind):
    for phase_y, phase_x in np.ndindex(16, 16):
        for x, y in [(4, 20), (20, 4), (27, 20), (20, 27), (2, 2), (29, 29), (15, 15)]:
            point = np.array([[x + phase_x / 16, y + phase_y / 16]], np.float32)
            np.testing.assert_array_equal(
                mark(point, 32, 32, kind), draw(point, 32, 32, kind), f"{point}"
            )


def test_a_lone_ring_is_48_pixels_with_a_hole():
    """The stencil of the published code: a 9 x 9 box whose inner 3 x 3 stays empty."""
    bitmap = mark(np.array([[20, 20]], np.float32), 40, 40, "ring")
    assert bitmap.sum() == 48
    assert bitmap[19:22, 19:22].sum() == 0
    assert bitmap[16:25, 16:25].sum() == 48
    assert mark(np.array([[20, 20]], np.float32), 40, 40, "point").sum() == 1
    assert mark(np.array([[20, 20]], np.float32), 40, 40, "disc").sum() == 48 + 9
