"""Few labels and masks: what is chosen, scores that can be reckoned, and the commands."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
from test_evaluate import clusters, labelled
from test_recipe_file import kamim

from kamim.evaluate import dense
from kamim.evaluate.dense import read_pair
from kamim.evaluate.fewshot import few, few_shot
from shards.errors import UserError

__all__ = ["labelled"]
CPU = torch.device("cpu")
COLOURS = np.array([[250, 30, 30], [30, 250, 30], [30, 30, 250]], np.uint8)


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_share_has_as_many_of_each_class_and_depends_on_the_seed_alone(share):
    labels = torch.randint(0, 5, (3000,), generator=torch.Generator().manual_seed(1))
    chosen = few(labels, share, 5, seed=3)
    assert labels[chosen].bincount().tolist() == [round(share * 600)] * 5
    assert torch.equal(chosen, few(labels.clone(), share, 5, seed=3))
    assert not torch.equal(chosen, few(labels, share, 5, seed=4))
    assert set(few(labels, 0.01, 5, 3).tolist()) <= set(chosen.tolist())
    assert few(labels[:40], 0.01, 5, 0).unique().numel() == 10  # two of each, at least


def test_few_labels_of_clusters_are_enough_and_of_nothing_are_chance():
    val = clusters(500, 7, 2)
    row = few_shot(clusters(2000, 7, 1), val, 7, 0.01, 2, 5, CPU)
    assert row["images"] == 21
    assert row["top1"] == row["knn"] == [1.0, 1.0]
    row = few_shot(clusters(2000, 7, 1, True), val, 7, 0.1, 1, 5, CPU)
    assert abs(row["top1"][0] - 1 / 7) < 0.15


def test_the_probe_of_few_labels_from_the_command_line(labelled, tmp_path):
    words = ["probe", "random:small", labelled, labelled, "--protocol", "fewshot", "--seeds", 2]
    done = kamim(*words, "--device", "cpu", "--out", tmp_path / "out")
    lines = done.stdout.splitlines()
    assert [line.partition(", labels of ")[2][:8] for line in lines] == ["8 images", "8 images"]
    row = json.loads((tmp_path / "out" / "probe-fewshot.json").read_text())
    assert [(each["share"], len(each["top1"])) for each in row["few"]] == [(0.01, 2), (0.1, 2)]


def scenes(folder, count, seed, palette=False):
    """Images of two halves, each of one colour, which is the class; a rim has none."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        classes = np.zeros((90, 120), np.uint8)
        pair = rng.permutation(3)[:2]
        classes[:, :60], classes[:, 60:] = pair
        image = COLOURS[classes] - rng.integers(0, 25, (90, 120, 1)).astype(np.uint8)
        classes[:6] = 255
        for name in ("images", "masks"):
            (folder / name / "a").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / "images" / "a" / f"{number}.jpg"), image[:, :, ::-1])
        mask = Image.fromarray(classes)
        if palette:
            mask.putpalette(list(range(256)) * 3)
        mask.save(folder / "masks" / "a" / f"{number}.png")
    return folder


@pytest.mark.parametrize("by", ["knn", "linear"])
def test_what_colour_tells_is_segmented_from_the_command_line(by, tmp_path):
    train, val = scenes(tmp_path / "train", 8, 0), scenes(tmp_path / "val", 4, 1, palette=True)
    words = ["dense", "random:small", train, val, "--by", by, "--device", "cpu", "--block", "1"]
    done = kamim(*words, "--out", tmp_path / "out", "--json")
    row = json.loads(done.stdout)
    name = {"knn": "dense.json", "linear": "dense-linear.json"}[by]
    assert row == json.loads((tmp_path / "out" / name).read_text())
    assert sorted(row["iou"]) == ["0", "1", "2"]
    assert row["miou"] > 0.8
    again = json.loads(kamim(*words, "--out", tmp_path / "other", "--json").stdout)
    assert again == row
    refused = kamim(*words, "--block", "2", "--out", tmp_path / "out", check=False)
    assert "holds a result of block 1, not 2; move it, or name another --out" in refused.stderr
    (val / "masks" / "a" / "2.png").unlink()
    refused = kamim(*words, check=False)
    assert (refused.returncode, "2.jpg has no mask" in refused.stderr) == (2, True)
    refused = kamim("dense", "random:small", tmp_path, val, check=False)
    assert "has no images; lay them into" in refused.stderr


def test_pixels_are_counted_as_they_are_said_to_be():
    """Four patches, of which the guess takes one for another; one pixel column has no class."""
    size, side = 4, 2
    truth = torch.tensor([[0, 0, 1, 1]] * 2 + [[1, 1, 0, 255]] * 2)
    assert dense.patch_classes(truth[:, [0, 0, 2, 2]], side).tolist() == [0, 1, 1, 0]
    said = torch.tensor([0, 1, 0, 0])
    nearest = torch.nn.functional.one_hot(said, 2).float() * 100

    def pairs(*_):
        yield nearest, truth

    before = dense.read_tokens
    dense.read_tokens = pairs
    try:
        counts = dense.segment(SimpleNamespace(size=size), [], 1, lambda scores: scores, CPU)
    finally:
        dense.read_tokens = before
    # Bilinear from two patches a side: each pixel is nearest to the centre of its own.
    assert counts[:2, :2].tolist() == [[6, 0], [4, 4]]
    assert counts.sum() == 14
    found = dense.intersections_over_unions(counts)
    assert found == {0: round(6 / 10, 4), 1: round(4 / 8, 4)}


def test_masks_lie_where_their_images_do(tmp_path):
    """Discs of colour: what is brighter than half is the disc, but for the pixels at its edge."""
    rows, columns = np.mgrid[:500, :500]
    disc = ((rows - 247) ** 2 + (columns - 261) ** 2 < 40**2).astype(np.uint8)
    Image.fromarray(np.repeat(disc[..., None] * 255, 3, axis=2)).save(tmp_path / "a.png")
    Image.fromarray(disc).save(tmp_path / "b.png")
    image, classes = read_pair((tmp_path / "a.png", tmp_path / "b.png"), 192)
    guess = image.mean(0) > 127.5
    assert (guess & (classes == 1)).sum() / (guess | (classes == 1)).sum() > 0.98


@pytest.mark.parametrize("which", ["image", "mask", "size"])
def test_a_pair_that_is_not_sound_is_named(tmp_path, which):
    image, mask = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(image)
    Image.fromarray(np.zeros((40, 50 - (which == "size")), np.uint8)).save(mask)
    if which != "size":
        path = {"image": image, "mask": mask}[which]
        path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(UserError, match="a.png is no" if which == "image" else "b.png is "):
        read_pair((image, mask), 32)


def test_a_mask_of_colours_is_refused(tmp_path):
    scenes(tmp_path, 1, 0)
    path = tmp_path / "masks" / "a" / "0.png"
    Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"0.png is uint8 \(90, 120, 3\); a mask has one channel"):
        dense.read_pair(dense.list_pairs(tmp_path)[0], 96)


def test_a_linear_head_guesses_no_number_that_no_patch_has():
    known = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    labels = (known[:, 0] > 0).long() * 40  # of two classes, 0 and 40
    found = dense.by_head(known, labels, 41, 0)(known)
    assert found[:, 1:40].max() == 0
    assert set(found.argmax(1).tolist()) == {0, 40}
