"""Compatibility: the stock webdataset library reads the shards with its own decoders."""

import json

import numpy as np
import pytest
from conftest import settings

import preprocess
from preprocess import build_shards, open_source
from shards import ShardSet, decode_frame

webdataset = pytest.importorskip("webdataset")


@pytest.mark.parametrize("quality", [90, 0])
def test_stock_webdataset_reads_every_record(quality, small_source, tmp_path):
    detectors = tuple(preprocess.detector_settings(name) for name in ("fast", "orb"))
    source, out = open_source(str(small_source)), tmp_path / "out"
    chosen = settings(quality=quality, detectors=detectors, bank=2, weights=(0.25, 16))
    build_shards(source, out, chosen, 1)
    records = ShardSet(out)
    pattern = str(out / "shard-{000000..000009}.tar")
    dataset = webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False).decode("rgb8")
    samples = list(dataset)
    assert len(samples) == len(records) == 40
    for number, sample in enumerate(samples):
        record = records[number]
        assert sample["__key__"] == record.key
        assert sample["cls"] == record.label
        meta = sample["json"] if isinstance(sample["json"], dict) else json.loads(sample["json"])
        boxes, flips = record.bank.boxes.tolist(), record.bank.flips.astype(int).tolist()
        crops = {"boxes": boxes, "flips": flips}
        assert meta == {"height": 80, "source": record.source, "width": 96, **crops}
        stored = {"density": record.maps, "counts": record.bank.counts, "weights": record.weights}
        for kind, arrays in stored.items():
            assert list(arrays) == ["fast", "orb"]
            for name, array in arrays.items():
                np.testing.assert_array_equal(sample[f"{name}.{kind}.npy"], array)
        frame = sample["jpg" if quality else "frame.npy"]
        np.testing.assert_array_equal(frame, decode_frame(record.frame))
