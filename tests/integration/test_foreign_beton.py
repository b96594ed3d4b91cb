"""A .beton that others wrote as a source: images by index, labels, and what is no .beton."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
from conftest import settings

import shards
from preprocess import build_shards, open_source
from preprocess.decode import decode_image
from shards.beton import HEADER, convert_to_ffcv


class Samples:
    """Images of sides that differ, with what people put beside them."""

    def __init__(self, images):
        self.images = [
            np.ascontiguousarray(cv2.resize(image, (90 + 7 * n, 80 + 5 * n)))
            for n, image in enumerate(images[:12])
        ]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        array = np.arange(6, dtype=np.float32)
        text = np.frombuffer(b"never read", np.uint8)
        return self.images[number], 2.5, number % 3, text, array, {"pickle": "never"}


@pytest.fixture(scope="module")
def samples(demo_images):
    return Samples(demo_images)


@pytest.fixture(scope="module", params=["raw", "jpg", "proportion"])
def beton(request, samples, tmp_path_factory):
    pytest.importorskip("ffcv")
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path_factory.mktemp("foreign") / f"{request.param}.beton"
    kinds = {
        "image": RGBImageField(request.param, jpeg_quality=95),
        "weight": FloatField(),
        "label": IntField(),
        "name": BytesField(),
        "array": NDArrayField(np.dtype(np.float32), (6,)),
        "facts": JSONField(),
    }
    DatasetWriter(str(path), kinds, num_workers=1).from_indexed_dataset(samples)
    return path


def test_its_images_are_read_by_their_index(beton, samples):
    source = open_source(f"ffcv:{beton}")
    assert [entry.name for entry in source.entries] == [str(number) for number in range(12)]
    assert [entry.label for entry in source.entries] == [number % 3 for number in range(12)]
    assert source.classes == ["0", "1", "2"]
    exact = 0
    for entry, image in zip(source.entries, samples.images, strict=True):
        found = decode_image(source.read(entry))
        assert found.shape == image.shape
        assert np.abs(found.astype(int) - image).mean() < 6
        exact += np.array_equal(found, image)
    assert {"raw": exact == 12, "jpg": exact == 0, "proportion": 0 < exact < 12}[beton.stem]


def test_its_densities_are_built_beside_it(beton, tmp_path):
    words = ["maps", "build", f"ffcv:{beton}", str(tmp_path / "maps"), "--jobs", "1"]
    done = subprocess.run([sys.executable, "-m", "kamim", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    source, maps = open_source(f"ffcv:{beton}"), shards.open(tmp_path / "maps")
    for entry in source.entries:
        path = tmp_path / "images" / f"{int(entry.name):02d}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), decode_image(source.read(entry))[:, :, ::-1])
    plain = settings(frame=0, quality=0, crop=192, map_crops=3, grid=54, shard_size=16)
    build_shards(open_source(str(tmp_path / "images")), tmp_path / "plain", plain, 1)
    same = shards.open(tmp_path / "plain")
    for number in range(12):
        density = maps.density(number, "fast")
        np.testing.assert_array_equal(density, maps.density(str(number), "fast"))
        np.testing.assert_array_equal(density, same.density(number, "fast"))


def test_ours_is_read_as_anybodys(converted):
    source, records = open_source(f"ffcv:{converted}/records.beton"), shards.ShardSet(converted)
    assert [entry.label for entry in source.entries] == [record.label for record in records]
    for entry, record in zip(source.entries, records, strict=True):
        np.testing.assert_array_equal(
            decode_image(source.read(entry)), shards.decode_frame(record.frame)
        )


@pytest.mark.parametrize(
    ("name", "value"),
    [("version", 3), ("fields", 0), ("fields", 900), ("samples", 1 << 60), ("table", 1 << 60)],
)
def test_what_is_no_beton_is_one_line(name, value, built, tmp_path):
    convert_to_ffcv(built, tmp_path / "set")
    path = tmp_path / "set" / "records.beton"
    content = bytearray(path.read_bytes())
    head = np.frombuffer(content, HEADER, 1)
    head[name] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"records.beton is no .beton of FFCV, or is damaged \("):
        open_source(f"ffcv:{path}")


def test_other_places_and_pointers_are_told(built, tmp_path):
    (tmp_path / "empty.beton").touch()
    with pytest.raises(ValueError, match=r"empty.beton is no .beton of FFCV"):
        open_source(f"ffcv:{tmp_path}/empty.beton")
    with pytest.raises(ValueError, match=r"is no .beton file on this machine"):
        open_source(f"ffcv:{tmp_path}")
    convert_to_ffcv(built, tmp_path / "set")
    path = tmp_path / "set" / "records.beton"
    with pytest.raises(ValueError, match="has no split val"):
        open_source(f"ffcv:{path}", "val")
    source = open_source(f"ffcv:{path}")
    content = bytearray(path.read_bytes())
    at = content.index(int(source.entries[3].offset).to_bytes(8, "little"))
    content[at : at + 8] = (12345).to_bytes(8, "little")
    path.write_bytes(content)
    assert [entry.name for entry in open_source(f"ffcv:{path}").entries if entry.flaw] == ["3"]
