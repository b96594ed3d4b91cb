"""The inspect page: escapes what it shows, holds what it promises."""

import os

import pytest
from conftest import settings

import preprocess
from preprocess import build_shards, open_source
from shards import ShardSet, inspect_page

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
    assert page.count("<img") == 40 * 5  # a frame, and a map and a lit frame per detector
    assert page.count("<svg") == 2
    assert "rejected: empty<td class=n>1" in page
    assert "http" not in page.replace("http-equiv", "")
    for temperature, w_ps in ((0, 8), (float("nan"), 8), (0.25, 7)):
        with pytest.raises(ValueError, match=r"positive|divide"):
            inspect_page(ShardSet(out), temperature, w_ps, 3)
