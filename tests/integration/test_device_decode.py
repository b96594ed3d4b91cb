"""Frames that stay files in the loader and are decoded by the device, with stand-ins for CUDA."""

import sys

import numpy as np
import pytest
from conftest import copied, settings

pytest.importorskip("torch")

import torch
import torchvision

import shards.decoding
import shards.device
from preprocess import build_shards, detector_settings, open_source
from shards import Plan, ShardSet, decode_frame, to_device
from shards.loader import Loader
from train.loop import pretrain
from train.recipes import find_recipe
from train.request import Run

CPU = torch.device("cpu")


@pytest.fixture
def records(small_source, tmp_path, build_once):
    chosen = settings(detectors=(detector_settings("fast"),), crop=64)
    return ShardSet(build_once(small_source, tmp_path / "shards", chosen))


def test_files_come_with_all_that_belongs_to_them(records):
    plan = Plan(40, 12, seed=3)
    decoded = copied(Loader(records, plan, 0, 9, maps=["fast"]))
    for pixels, batch in zip(
        decoded, Loader(records, plan, 0, 9, maps=["fast"], coded=True), strict=True
    ):
        for number, file in zip(batch.samples.tolist(), batch.frames, strict=True):
            assert file.tobytes() == records[number].frame
        for field in ("step", "maps", "labels", "samples", "epochs", "boxes", "flips"):
            np.testing.assert_equal(getattr(batch, field), getattr(pixels, field))


def test_the_device_decodes_what_the_threads_would(records):
    """By torchvision on the CPU, which has libjpeg-turbo too."""
    plan = Plan(40, 12, seed=3)
    decoded = copied(Loader(records, plan, 0, 9, maps=["fast"]))
    loader = Loader(records, plan, 0, 9, maps=["fast"], coded=True)
    for pixels, (_, tensors) in zip(decoded, to_device(loader, CPU), strict=True):
        assert tensors["frames"].dtype == torch.uint8
        np.testing.assert_array_equal(tensors["frames"].numpy(), pixels.frames)
        np.testing.assert_array_equal(tensors["maps"]["fast"].numpy(), pixels.maps["fast"])


@pytest.mark.parametrize("end", [b"\0\0", b"\xff\xfe"])
def test_a_file_without_an_end_is_named_or_skipped(records, end):
    path, row = records.locate(17)
    with path.open("r+b") as file:
        file.seek(int(row["frame"]) + int(row["frame_bytes"]) - 2)
        file.write(end)
    with pytest.raises(ValueError, match=r"record 000000017 has a frame without an end"):
        list(Loader(records, Plan(40, 8), 0, 5, coded=True))
    loader = Loader(records, Plan(40, 8), 0, 5, coded=True, skip=True)
    for batch in loader:
        for number, coded in zip(batch.samples.tolist(), batch.frames, strict=True):
            assert coded.tobytes() == records[number].frame
    assert loader.damaged == {17}


def test_what_cannot_be_decoded_there_is_told_in_one_line(records, small_source, tmp_path):
    with pytest.raises(ValueError, match="this runs on cpu; leave decode at cpu"):
        records.loader(Plan(40, 8), decode="gpu")
    recipe = find_recipe("demo")
    run = Run(
        shards=records.folder, out=tmp_path / "run", recipe=recipe, device="cpu", decode="gpu"
    )
    with pytest.raises(ValueError, match="this runs on cpu; leave decode at cpu"):
        pretrain(run)
    cuda = torch.device("cuda")
    with pytest.raises(ValueError, match="if damage is to be skipped"):
        shards.decoding.check_decoding(records, cuda, skip=True)
    build_shards(open_source(str(small_source)), tmp_path / "raw", settings(quality=0), 1)
    with pytest.raises(ValueError, match="its frames are raw pixels"):
        shards.decoding.check_decoding(ShardSet(tmp_path / "raw"), cuda, skip=False)


def test_a_decoder_that_is_missing_or_fails_is_told_in_one_line(records, monkeypatch):
    cuda = torch.device("cuda")

    def broken(*_, **__):
        raise RuntimeError("nvjpeg is not here\nwith a long tail")

    monkeypatch.setattr(torchvision.io, "decode_jpeg", broken)
    with pytest.raises(ValueError, match=r"on cuda \(nvjpeg is not here\); decode on the CPU"):
        shards.decoding.check_decoding(records, cuda, skip=False)
    monkeypatch.setitem(sys.modules, "torchvision.io", None)
    with pytest.raises(ValueError, match=r"needs torchvision .* pip install torchvision"):
        shards.decoding.check_decoding(records, cuda, skip=False)


def test_a_trial_frame_goes_to_the_device(records, monkeypatch):
    """The check asks for what the training will: files of the set's size, on that device."""
    asked = []

    def decode(files, mode, device):
        asked.append((len(files), str(device)))
        return [torch.from_numpy(decode_frame(f.numpy().tobytes())).permute(2, 0, 1) for f in files]

    monkeypatch.setattr(torchvision.io, "decode_jpeg", decode)
    shards.decoding.check_decoding(records, torch.device("cuda", 1), skip=False)
    assert asked == [(1, "cuda:1")]


def test_one_is_made_while_another_is_used(records):
    made = []

    def items():
        try:
            for number in range(1, 6):
                made.append(number)
                yield number, {}, None
        finally:
            made.append("closed")

    ahead = shards.device._ahead(items())
    assert next(ahead)[0] == 1
    assert [item[0] for item in ahead] == [2, 3, 4, 5]
    assert made == [1, 2, 3, 4, 5, "closed"]
    made.clear()
    ahead = shards.device._ahead(items())
    next(ahead)
    ahead.close()
    assert made == [1, 2, "closed"]
