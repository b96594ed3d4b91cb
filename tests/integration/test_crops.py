"""The torch side: crops, map readings and weights against their slow twins."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as v2

from preprocess import density_maps, detector_settings
from preprocess.shard import make_frame
from shards import Settings
from shards.crops import read_map, visible, visible_cells, weights
from shards.order import Plan
from shards.weighting import crop_frames, crop_maps, loss_weights, pool_counts

FLIPS = [(False, False), (True, False), (False, True), (True, True)]


def boxes_of(count, seed=0, height=375, width=500):
    size = np.full(count, height), np.full(count, width)
    boxes, flips = Plan(count, 1, seed).boxes(np.zeros(count, int), np.arange(count), *size)
    return torch.from_numpy(boxes), torch.from_numpy(flips)


@pytest.mark.parametrize("size", [96, 192, 224])
def test_crops_equal_torchvisions_crop_and_resize(size, demo_images):
    """On boxes of whole frame pixels, where torchvision can cut the same box."""
    frames = np.stack([make_frame(image, 256) for image in demo_images[::20]])
    rng = np.random.default_rng(0)
    for number, frame in enumerate(frames):
        top, left, height, width = oracle.random_box(256, 256, rng)
        flip = FLIPS[number % 4]
        pixels = torch.from_numpy(frame).permute(2, 0, 1).float()
        box = (top, left, height, width)
        expected = v2.resized_crop(
            pixels, *box, [size, size], InterpolationMode.BILINEAR, antialias=False
        )
        expected = expected.flip(2) if flip[0] else expected
        expected = expected.flip(1) if flip[1] else expected
        box = torch.tensor([[top, left, height, width]]) / 256
        ours = crop_frames(torch.from_numpy(frame)[None], box, torch.tensor([flip]), size)[0]
        assert (ours - expected).abs().max() < 0.02  # of 255


def test_map_readings_equal_a_plain_integral(demo_images):
    chosen = Settings(detectors=(detector_settings("sift"),), shard_size=1)
    maps = np.stack([density_maps(i, 0, chosen)["sift"] for i in demo_images[::40]])
    boxes, flips = boxes_of(len(maps))
    share = visible_cells(chosen.detectors[0], 192, 24)
    ours = crop_maps(torch.from_numpy(maps), boxes, flips, 24, torch.from_numpy(share).float())
    for density, box, flip, mine in zip(maps, boxes, flips, ours, strict=True):
        plain = read_map(density, tuple(box.tolist()), 24, share)
        plain = plain[:, ::-1] if flip[0] else plain
        plain = plain[::-1] if flip[1] else plain
        np.testing.assert_allclose(mine.numpy(), plain, atol=2e-5)


@settings(max_examples=100)
@given(st.integers(0, 51), st.integers(0, 51), st.integers(0, 10**6), st.sampled_from(FLIPS))
def test_a_marked_pixel_and_a_marked_cell_stay_together(row, column, number, flip):
    """The same square marked in frame and map is found at the same place of their crops."""
    frame, density = np.zeros((1, 52 * 4, 52 * 4, 3), np.uint8), np.zeros((1, 52, 52), np.uint8)
    frame[0, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 255
    density[0, row, column] = 255
    boxes, _ = boxes_of(1, seed=number)
    flips = torch.tensor([flip])
    pixels = crop_frames(torch.from_numpy(frame), boxes, flips, 192)[0, 0] / 255
    cells = crop_maps(torch.from_numpy(density), boxes, flips, 48)[0]
    top, left, height, width = boxes[0].tolist()
    inside = [
        top * 52 < row + 0.4 and row + 0.6 < (top + height) * 52,
        left * 52 < column + 0.4 and column + 0.6 < (left + width) * 52,
    ]
    if not all(inside):
        return
    assert cells.sum() > 0
    assert pixels.sum() > 0
    axis = torch.arange(192.0) + 0.5
    centre = [(pixels.sum(1 - d) * axis).sum() / pixels.sum() / 192 for d in (0, 1)]
    axis = torch.arange(48.0) + 0.5
    found = [(cells.sum(1 - d) * axis).sum() / cells.sum() / 48 for d in (0, 1)]
    np.testing.assert_allclose(centre, found, atol=0.012)


def test_flips_of_a_crop_are_crops_flipped():
    frames = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    maps = torch.randint(0, 256, (1, 20, 20), dtype=torch.uint8)
    boxes, _ = boxes_of(1)
    plain = torch.tensor([[False, False]])
    for flip in FLIPS:
        dims = [d for d, on in zip((2, 1), flip, strict=True) if on]
        turned = torch.tensor([flip])
        a, b = crop_frames(frames, boxes, turned, 96), crop_frames(frames, boxes, plain, 96)
        torch.testing.assert_close(a, b.flip([d + 1 for d in dims]), rtol=0, atol=0.01)
        share = torch.tensor([0.5, *[1.0] * 10, 0.5])
        a, b = (crop_maps(maps, boxes, f, 12, share) for f in (turned, plain))
        torch.testing.assert_close(a, b.flip(dims))


def test_a_full_map_is_full_everywhere_but_for_what_a_detector_misses_at_the_edge():
    maps = torch.full((5, 52, 52), 255, dtype=torch.uint8)
    boxes, flips = boxes_of(5)
    torch.testing.assert_close(crop_maps(maps, boxes, flips, 24), torch.ones(5, 24, 24))
    for name in ("fast", "orb", "sift"):
        share = visible_cells(detector_settings(name), 192, 24)
        pixels = oracle.seen(name, 192).reshape(24, 8).mean(1)
        np.testing.assert_allclose(share, pixels, atol=1e-12)
        read = crop_maps(maps, boxes, flips, 24, torch.from_numpy(share).float())
        for one in read.numpy():
            np.testing.assert_allclose(one, np.outer(share, share), atol=1e-5)
    assert visible_cells(detector_settings("orb"), 192, 24)[:3].sum() == 0


def test_the_edge_follows_the_detectors_margin_and_the_mark():
    wide = detector_settings("orb", {"edgeThreshold": "47"})
    wide = replace(wide, name="".join("orb"))  # a string of its own, as a manifest's is
    plain = visible(detector_settings("orb"), 224)
    np.testing.assert_allclose(visible(wide, 224)[16:112], plain[:96])
    assert visible(detector_settings("fast"), 16, "point").tolist() == [0] * 3 + [1] * 10 + [0] * 3


def test_counts_of_a_bank_pool_to_the_density_of_larger_cells():
    counts = torch.randint(0, 65, (3, 24, 24), dtype=torch.uint8)
    for part in (1, 2, 4):
        pooled = pool_counts(counts, 24 // part)
        plain = counts.numpy().reshape(3, 24 // part, part, 24 // part, part).mean((2, 4)) / 64
        np.testing.assert_allclose(pooled, plain, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.25, 1.0, 1e6])
def test_weights_equal_the_published_formula(temperature):
    density = torch.rand(6, 24, 24)
    ours = loss_weights(density, temperature)
    for one, mine in zip(density.numpy(), ours.numpy(), strict=True):
        np.testing.assert_allclose(mine, oracle.weights(one, temperature), rtol=2e-4)
        np.testing.assert_allclose(mine, weights(one, temperature), rtol=2e-4)
    assert (ours.amin((1, 2)) == 1).all()
    mean = loss_weights(density, temperature, "mean")
    torch.testing.assert_close(mean.mean((1, 2)), torch.ones(6))
    torch.testing.assert_close(mean / mean.amin((1, 2), keepdim=True), ours, rtol=1e-4, atol=0)


def test_no_keypoints_weigh_one():
    assert (loss_weights(torch.zeros(2, 24, 24), 0.25) == 1).all()
    assert (loss_weights(torch.ones(2, 24, 24), 1e-9) == 1).all()  # clipped, not infinite
