"""The inspect page: escapes what it shows, holds what it promises."""

import os

import numpy as np
import pytest
from conftest import settings

import preprocess
from preprocess import build_shards, open_source
from shards import ShardSet, decode_frame, inspect_page
from shards.order import Plan
from shards.report import crop_picture

EVIL = "<script>alert('x')<&>\".jpg"


def test_the_page_shows_frames_maps_histograms_and_the_ledger(small_source, tmp_path):
    folder = small_source / "class0"
    os.rename(folder / "000.jpg", folder / EVIL)
    detectors = tuple(preprocess.detector_settings(name) for name in ("fast", "sift"))
    (small_source / "class0" / "empty.jpg").write_bytes(b"")
    out = tmp_path / "<b>out"
    build_shards(
        open_source(str(small_source)), out, settings(detectors=detectors), 1, "quarantine", 1
    )
    page = inspect_page(ShardSet(out), 0.25, 8, 40)
    assert "<script" not in page
    assert "<b>out" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;&amp;&gt;&quot;.jpg" in page
    # A frame and a crop; a map, a lit frame and the crop's weights per detector.
    assert page.count("<img") == 40 * 8
    assert page.count("<svg") == 2
    assert "rejected: empty<td class=n>1" in page
    assert "http" not in page.replace("http-equiv", "")
    for temperature, w_ps in ((0, 8), (float("nan"), 8), (0.25, 7)):
        with pytest.raises(ValueError, match=r"out of range|divide"):
            inspect_page(ShardSet(out), temperature, w_ps, 3)


@pytest.fixture
def records(small_source, tmp_path, build_once):
    detectors = tuple(preprocess.detector_settings(name) for name in ("fast", "sift"))
    chosen = settings(frame=96, crop=96, detectors=detectors)
    return ShardSet(build_once(small_source, tmp_path / "set", chosen))


def test_a_phone_shows_the_page_at_its_own_width_and_each_fact_in_a_line_of_its_own(records):
    page = inspect_page(records, 0.25, 8, 2)
    assert "<meta name=viewport content='width=device-width,initial-scale=1'>" in page
    assert "@media(max-width:700px)" in page
    record, name = records[0], records.manifest.classes[records[0].label]
    assert f"<dt>file<dd>{record.source.replace('/', '/<wbr>')}</div>" in page
    assert f"<dt>class<dd>{name} (label {record.label})</div>" in page
    assert "<dt>size<dd>96 x 80 px, the source's</div>" in page


def test_the_crop_and_its_weights_are_those_of_training(records):
    torch = pytest.importorskip("torch")
    from shards.weighting import WeightedCrops, crop_frames

    number, chosen = 39, records.manifest.settings
    record, rows = records[number], records.index[[number]]
    size = rows["height"].astype(np.int64), rows["width"].astype(np.int64)
    plan = Plan(40, 16, area=chosen.area)
    boxes, flips = plan.boxes(np.array([0]), np.array([number]), *size)
    place = torch.from_numpy(boxes), torch.from_numpy(flips)
    page = inspect_page(records, 0.25, 8, 2)
    top, left, tall, wide = (100 * boxes[0]).tolist()
    assert (
        f"<div class=box style='top:{top:.2f}%;left:{left:.2f}%;height:{tall:.2f}%;"
        f"width:{wide:.2f}%'>"
    ) in page
    for detector in chosen.detectors:
        maps = {detector.name: torch.from_numpy(record.maps[detector.name][None])}
        batch = {"maps": maps, "boxes": place[0], "flips": place[1]}
        read = WeightedCrops(records, detector.name, size=96, w_ps=8).weigh(batch)[0]
        assert f"{detector.name}: weights of the crop, mean {read.mean():.2f}" in page
        assert f"x {read.max():.3g} the least" in page
        assert f"<div class=bar></div><div class=ends><span>x 1</span>x {read.max():.3g}" in page
    frame = decode_frame(record.frame)
    expected = crop_frames(torch.from_numpy(frame)[None], *place, 96)[0].permute(1, 2, 0).numpy()
    ours = crop_picture(frame, boxes[0].tolist(), flips[0].tolist(), 96)
    assert np.abs(ours[1:-1, 1:-1] - expected[1:-1, 1:-1]).max() < 8
    assert np.abs(ours - expected).mean() < 1
