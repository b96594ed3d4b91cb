"""The torch side: crops, map readings and weights against their slow twins."""

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from torchvision.transforms import InterpolationMode  # noqa: E402
from torchvision.transforms.v2 import functional as v2  # noqa: E402

from preprocess import density_maps, detector_settings  # noqa: E402
from preprocess.shard import squeeze  # noqa: E402
from shards.crops import border_share, crop_frames, crop_maps, loss_weights  # noqa: E402
from shards.plan import Plan  # noqa: E402
from shards.weights import read_map, weights  # noqa: E402

FLIPS = [(False, False), (True, False), (False, True), (True, True)]


def boxes_of(count, seed=0, height=375, width=500):
    size = np.full(count, height), np.full(count, width)
    boxes, flips = Plan(count, 1, seed).boxes(np.zeros(count, int), np.arange(count), *size)
    return torch.from_numpy(boxes), torch.from_numpy(flips)


@pytest.mark.parametrize("size", [96, 192, 224])
def test_crops_equal_torchvisions_crop_and_resize(size, demo_images):
    """On boxes of whole frame pixels, where torchvision can cut the same box."""
    frames = np.stack([squeeze(image, 256) for image in demo_images[::20]])
    rng = np.random.default_rng(0)
    for number, frame in enumerate(frames):
        top, left, height, width = oracle.random_box(256, 256, rng)
        flip = FLIPS[number % 4]
        pixels = torch.from_numpy(frame).permute(2, 0, 1).float()
        expected = v2.resized_crop(pixels, top, left, height, width, [size, size],
                                   InterpolationMode.BILINEAR, antialias=False)  # fmt: skip
        expected = expected.flip(2) if flip[0] else expected
        expected = expected.flip(1) if flip[1] else expected
        box = torch.tensor([[top, left, height, width]]) / 256
        ours = crop_frames(torch.from_numpy(frame)[None], box, torch.tensor([flip]), size)[0]
        assert (ours - expected).abs().max() < 0.02  # of 255


def test_map_readings_equal_a_plain_integral(demo_images):
    fast = [detector_settings("fast")]
    maps = np.concatenate(
        [density_maps(i, fast, (192, 208), 52, "ring") for i in demo_images[::40]]
    )
    boxes, flips = boxes_of(len(maps))
    ours = crop_maps(torch.from_numpy(maps), boxes, flips, 24)
    for density, box, flip, mine in zip(maps, boxes, flips, ours, strict=True):
        plain = read_map(density, tuple(box.tolist()), 24)
        plain = plain[:, ::-1] if flip[0] else plain
        plain = plain[::-1] if flip[1] else plain
        np.testing.assert_allclose(mine.numpy(), plain, atol=2e-5)


@settings(max_examples=100, deadline=None)
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
    inside = [top * 52 < row + 0.4 and row + 0.6 < (top + height) * 52,
              left * 52 < column + 0.4 and column + 0.6 < (left + width) * 52]  # fmt: skip
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
        a, b = crop_maps(maps, boxes, turned, 12, 0.1), crop_maps(maps, boxes, plain, 12, 0.1)
        torch.testing.assert_close(a, b.flip(dims))


def test_a_full_map_is_full_everywhere_and_orbs_border_is_empty():
    maps = torch.full((5, 52, 52), 255, dtype=torch.uint8)
    boxes, flips = boxes_of(5)
    torch.testing.assert_close(crop_maps(maps, boxes, flips, 24), torch.ones(5, 24, 24))
    orb, fast = detector_settings("orb"), detector_settings("fast")
    assert border_share(fast, 192) == 0
    assert border_share(orb, 192) == 27 / 192
    read = crop_maps(maps, boxes, flips, 24, border_share(orb, 192))[0]
    assert read[:3].sum() == read[-3:].sum() == read[:, :3].sum() == read[:, -3:].sum() == 0
    torch.testing.assert_close(read[3, 4:20], torch.full((16,), 5 / 8))  # 27 = 3 cells + 3 px
    torch.testing.assert_close(read[4:20, 4:20], torch.ones(16, 16))


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
