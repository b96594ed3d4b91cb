"""The examples of densities beside a data set as it is: each lowers its loss, by the right maps."""

import importlib.util
import subprocess
import sys
import tarfile

import cv2
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from test_examples import STEPS, loaded, lowered

import shards
from preprocess import build_shards, detector_settings, open_source


def maps_of(where, out):
    chosen = shards.Settings(
        frame=0, quality=0, detectors=(detector_settings("fast"),), shard_size=64, crop=96
    )
    build_shards(open_source(str(where)), out, chosen)
    return out


@pytest.fixture(scope="module")
def images(demo_images, tmp_path_factory):
    """A folder of two classes; all of it is one batch, so losses differ by learning alone."""
    root = tmp_path_factory.mktemp("maps") / "images"
    for number, image in enumerate(demo_images[::4][:64]):
        path = root / f"c{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(image, (160, 128))[:, :, ::-1])
    return root


@pytest.mark.slow
def test_an_image_folder(images, tmp_path, printed):
    lowered(printed("maps_imagefolder", images, maps_of(images, tmp_path / "maps"), STEPS))


@pytest.mark.slow
def test_a_webdataset_by_key(images, tmp_path, printed):
    pytest.importorskip("webdataset")
    (tmp_path / "tars").mkdir()
    for place, class_ in enumerate(("c0", "c1")):
        with tarfile.open(tmp_path / "tars" / f"{place:03d}.tar", "w") as tar:
            for path in sorted((images / class_).iterdir()):
                tar.add(path, path.name)
    out = maps_of(f"webdataset:{tmp_path / 'tars'}", tmp_path / "maps")
    lowered(printed("maps_webdataset", tmp_path / "tars", out, STEPS))


CHUNKS = """
import sys
from pathlib import Path
import litdata

def item(name):
    return {"image": (Path(sys.argv[1]) / name).read_bytes(), "name": name}

if __name__ == "__main__":
    names = sorted(str(p.relative_to(sys.argv[1])) for p in Path(sys.argv[1]).rglob("*.jpg"))
    litdata.optimize(item, names, sys.argv[2], chunk_bytes="1MB", num_workers=1)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_litdata_by_name(images, tmp_path, printed):
    if importlib.util.find_spec("litdata") is None:
        pytest.skip("litdata is not installed")
    (tmp_path / "chunks.py").write_text(CHUNKS)
    words = [sys.executable, tmp_path / "chunks.py", images, tmp_path / "chunks"]
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    out = maps_of(images, tmp_path / "maps")
    lowered(printed("maps_litdata", tmp_path / "chunks", out, STEPS))


class Squares:
    """The images in the order of the listing, squeezed, with their numbers."""

    def __init__(self, root):
        self.paths = [root / entry.name for entry in open_source(str(root)).entries]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        image = cv2.imread(str(self.paths[number]))[:, :, ::-1]
        return np.ascontiguousarray(cv2.resize(image, (128, 128))), number


def test_a_beton_by_index(images, tmp_path, printed):
    if importlib.util.find_spec("ffcv") is None:
        pytest.skip("ffcv is not installed")
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    kinds = {"image": RGBImageField(), "index": IntField()}
    DatasetWriter(str(tmp_path / "x.beton"), kinds, num_workers=1).from_indexed_dataset(
        Squares(images)
    )
    out = maps_of(images, tmp_path / "maps")
    lowered(printed("maps_ffcv", tmp_path / "x.beton", out, STEPS))
    maps = shards.open(out)
    batch = next(
        loaded("maps_ffcv").batches(
            str(tmp_path / "x.beton"), maps, shards.Plan(len(maps), batch=64)
        )
    )
    names = [entry.name for entry in open_source(str(images)).entries]
    by_name = maps.densities([names[n] for n in batch["labels"].tolist()], "fast")
    np.testing.assert_array_equal(batch["maps"]["fast"].numpy(), by_name)
    assert batch["samples"].tolist() == batch["labels"].tolist()
