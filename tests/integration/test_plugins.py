"""A person's own detector, and OpenCV's by name: built, checked, read, done again."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, contents, settings

import preprocess
import shards
from preprocess import (
    BuildError,
    build_shards,
    detector_settings,
    isolation,
    measure_fidelity,
    open_source,
)
from preprocess.detectors import CREATE, parsed_detectors
from preprocess.edges import measure_edge, with_edge, write_edge
from preprocess.plugins import Rejected, checked, found
from preprocess.repair import repair_shards
from shards.beton import convert_to_ffcv
from shards.crops import visible, visible_cells
from shards.errors import UserError
from shards.spec import Edge, parse, to_json

MODULE = '''
import os, time
import numpy as np
__version__ = "1.5"

def Corners(rgb, step: int = 16, shift: float = 0.5):
    """Points on a lattice."""
    assert rgb.dtype == np.uint8 and rgb.shape[2] == 3
    y, x = np.mgrid[: rgb.shape[0] - 1 : step, : rgb.shape[1] - 1 : step]
    rgb[:] = 0  # the build's own pixels stay
    return np.stack([x.ravel(), y.ravel()], 1).astype(np.float32) + shift

def ramp(rgb):
    return np.linspace(0, 1, 8, dtype=np.float32)[None].repeat(5, 0)

def picky(rgb):
    if rgb[..., 0].mean() > rgb[..., 2].mean():
        raise KeyError("too red")
    return ramp(rgb)

def nonsense(rgb):
    return ramp(rgb) * (1.5 if rgb[..., 0].mean() > rgb[..., 2].mean() else 1)

def broken(rgb):
    raise SystemExit(3)

def hangs(rgb):
    while rgb.max() < 50:
        pass
    return ramp(rgb)

def dies(rgb):
    if rgb.max() < 50:
        os.kill(os.getpid(), 9)
    return ramp(rgb)

def leaves(rgb):
    if rgb.max() < 50:
        os._exit(0)
    return ramp(rgb)

def waits(rgb):
    with open("waits.pid", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(9999)
'''


def kamim(*words):
    command = [sys.executable, "-m", "kamim", "shards", *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def own(tmp_path, monkeypatch, request):
    """A module of a person's own in a folder that is worked in; returns its name."""
    monkeypatch.chdir(tmp_path)
    name = f"own{abs(hash(request.node.name)) % 10**9}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"])
    return name


def test_points_and_a_map_are_built_read_and_done_again(own, small_source, tmp_path):
    source = open_source(str(small_source))
    detectors = parsed_detectors(f"fast,{own}:Corners,slope={own}:ramp", ["corners.step=8"])
    assert [d.name for d in detectors] == ["fast", "corners", "slope"]
    assert detectors[1].options == {"step": 8, "shift": 0.5}
    assert detectors[1].plugin.version == "1.5"
    chosen = settings(detectors=detectors, bank=2, weights=(0.25, 8))
    build_shards(source, tmp_path / "one", chosen, 1)
    build_shards(source, tmp_path / "two", chosen, 2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    records = shards.ShardSet(tmp_path / "one")
    assert records.manifest.settings.detectors == detectors
    assert shards.verify(tmp_path / "one", "decode") == []
    assert preprocess.redetect_maps(records, source, 5) == []
    measured = measure_fidelity(records, source, 4, jobs=1)
    assert set(measured) == {"fast", "corners", "slope"}
    assert measured["corners"]["bank"]["equal"] == measured["slope"]["bank"]["equal"] == 1
    page = shards.inspect_page(records, 0.25, 8, 2)
    assert "weights of corners" in page
    assert "weights of slope" in page
    record = records[0]
    # A ramp from left to right of every view; flipped crops show it as it is, too.
    assert (record.maps["slope"].mean(axis=0)[[0, 8, 15]] // 64).tolist() in ([0, 1, 3], [0, 2, 3])
    np.testing.assert_allclose(
        record.bank.counts["slope"][0].mean(axis=0) / 64, (np.arange(8) + 0.5) / 8, atol=0.07
    )
    assert record.bank.counts["corners"].any()
    assert {"slope", "corners"} <= set(record.weights)
    convert_to_ffcv(tmp_path / "one", tmp_path / "ffcv")
    assert shards.verify(tmp_path / "ffcv", "decode") == []
    # Beside FAST that is there: the bytes of one build.
    build_shards(source, tmp_path / "fast", replace(chosen, detectors=detectors[:1]), 1)
    build_shards(source, tmp_path / "more", chosen, 1, reuse=tmp_path / "fast")
    assert contents(tmp_path / "more") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "reason", "words"),
    [
        ("picky", "detector-failed", "picky: KeyError: 'too red'"),
        ("nonsense", "detector-output", "nonsense returned a map of 0 to 1.5; give 0 to 1"),
    ],
)
def test_an_image_that_it_fails_on_is_rejected_and_the_build_goes_on(
    own, name, reason, words, small_source, tmp_path
):
    source, out = open_source(str(small_source)), tmp_path / "out"
    chosen = settings(detectors=(detector_settings(f"{own}:{name}"),))
    manifest = build_shards(source, out, chosen, 2, max_rejected=1)
    bad = manifest.ledger.rejected[reason]
    assert 0 < bad < 40
    assert manifest.ledger.written == 40 - bad
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert all(words in line["detail"] for line in lines)
    assert {line["source"] for line in lines} < {entry.name for entry in source.entries}
    assert shards.verify(out, "decode") == []
    kept = (out / "rejected.jsonl").read_bytes()
    (out / "rejected.jsonl").unlink()
    assert repair_shards(source, out, chosen, 1) == ["rejected.jsonl"]
    assert (out / "rejected.jsonl").read_bytes() == kept
    with pytest.raises(BuildError, match=rf"\.jpg' was rejected \({reason}: {own}:{name}"):
        build_shards(source, tmp_path / "strict", chosen, 1, "fail")


@pytest.mark.parametrize(
    ("name", "reason", "words"),
    [
        ("hangs", "detector-hung", "hangs: no answer in 3 s; --detector-seconds allows more"),
        ("dies", "detector-died", "dies: its process ended, signal 9"),
        pytest.param(
            *("leaves", "detector-died", "leaves: its process ended, exit status 0"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_image_that_it_hangs_or_dies_on_is_rejected_and_the_build_goes_on(
    own, name, reason, words, small_source, tmp_path, allowed
):
    folder = small_source / "class0"
    black = [sorted(folder.iterdir())[number] for number in (5, 9)]
    for path in black:
        cv2.imwrite(str(path), np.zeros((80, 96, 3), np.uint8))
    chosen = settings(detectors=(detector_settings(f"{own}:{name}"),))
    allowed(3)
    for jobs, out in ((1, tmp_path / "one"), (2, tmp_path / "two")):
        manifest = build_shards(open_source(str(folder)), out, chosen, jobs, max_rejected=1)
        assert (manifest.ledger.written, manifest.ledger.rejected) == (8, {reason: 2})
        lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert [line["source"] for line in lines] == [path.name for path in black]
        assert all(words in line["detail"] for line in lines)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.fixture
def allowed():
    yield isolation.allow
    isolation.allow(isolation.SECONDS)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
def test_seconds_that_are_none_are_refused(seconds):
    with pytest.raises(UserError, match="is out of range; give 0"):
        isolation.allow(seconds)


def test_what_hangs_ends_with_the_build_that_was_killed(own, tmp_path):
    code = (
        "import numpy as np; from preprocess import detector_settings, isolation; "
        f"isolation.allow(0); isolation.found(detector_settings('{own}:waits'), "
        "np.zeros((8, 8, 3), np.uint8))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    pid = tmp_path / "waits.pid"
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    while True:  # the test's own limit ends it
        status = Path(f"/proc/{pid.read_text()}/status")
        try:
            if "State:\tZ" in status.read_text():
                return
        except FileNotFoundError:
            return
        time.sleep(0.02)


def test_what_it_prints_is_no_result(own, tmp_path, small_source):
    with (tmp_path / f"{own}.py").open("a") as file:
        file.write("\ndef Loud(rgb):\n    print('HERE')\n    return ramp(rgb)\n")
        file.write("print('THERE')\n")
    words = ["build", str(small_source / "class0"), str(tmp_path / "out"), "--frame", "64"]
    done = kamim(*words, "--detector", f"{own}:Loud", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert "HERE" not in done.stdout
    assert "HERE" in done.stderr
    assert "THERE" in done.stderr


def test_one_that_leaves_rejects_all_and_nothing_is_published(own, small_source, tmp_path):
    chosen = settings(detectors=(detector_settings(f"{own}:broken"),))
    said = (
        r"all 40 inputs were rejected \(40 detector-failed\); the first, 'class0/000.jpg': "
        r".*SystemExit.*; nothing was published: remove /.*/out, mend the cause"
    )
    with pytest.raises(BuildError, match=said):
        build_shards(open_source(str(small_source)), tmp_path / "out", chosen, 1)


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_other_engines_import_it_by_name(own, backend, small_source, tmp_path):
    pytest.importorskip({"dask": "distributed", "ray": "ray"}[backend])
    source = open_source(str(small_source))
    chosen = settings(detectors=(detector_settings(f"{own}:ramp"),))
    build_shards(source, tmp_path / "here", chosen, 1)
    build_shards(source, tmp_path / "there", chosen, 2, backend=backend)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


def test_other_code_is_other_settings(own, small_source, tmp_path):
    source, out = open_source(str(small_source)), tmp_path / "out"
    before = detector_settings(f"{own}:ramp")
    build_shards(source, out, settings(detectors=(before,)), 1)
    path = tmp_path / f"{own}.py"
    path.write_text(MODULE.replace("(0, 1, 8", "(0, 0.5, 8"))
    after = detector_settings(f"{own}:ramp")
    image = np.zeros((20, 20, 3), np.uint8)
    assert found(after, image).max() == 0.5
    with pytest.raises(UserError, match=r"ramp\.sha256 is .* there"):
        build_shards(source, out, settings(detectors=(after,)), 1)
    verify = ["verify", str(out), "--level", "redetect", "--source", str(small_source)]
    done = kamim(*verify)
    assert done.returncode == 1
    assert "is not the one of these shards" in done.stderr
    path.write_text(MODULE)
    assert kamim(*verify).returncode == 0


@pytest.mark.parametrize(
    ("at", "share"),
    [([0], [0.5, 1]), ([1, 0], [0.5, 1]), ([0, 1], [0.5, 2]), ([0, "1"], [0.5, 1]), ([], [])],
)
def test_a_rule_that_is_none_is_damage(own, at, share, small_source, tmp_path):
    chosen = settings(detectors=(detector_settings(f"{own}:ramp"),))
    manifest = build_shards(open_source(str(small_source)), tmp_path / "out", chosen, 1)
    for edge, sound in ((Edge([0, 3], [0.5, 1], "ring", 9), True), (Edge(at, share, "ring", 9), 0)):
        detector = replace(chosen.detectors[0], edge=edge)
        there = replace(manifest, settings=replace(manifest.settings, detectors=(detector,)))
        if sound:
            assert parse("m", to_json(there)) == there
            continue
        with pytest.raises(UserError, match="damaged"):
            parse("m", to_json(there))


@pytest.mark.parametrize(
    "text", ["", "{", '"x"', "5", "[]", "null", '{"checksum": 1}', "[" * 10**5]
)
def test_a_file_that_is_no_rule_is_one_line(text, tmp_path):
    (tmp_path / "fast.edge.json").write_text(text)
    with pytest.raises(UserError, match=r"fast.edge.json is no edge rule that kamim wrote"):
        with_edge((detector_settings("fast"),), tmp_path / "fast.edge.json")


def test_a_rule_of_other_options_says_what_measures_it_again(tmp_path):
    path, other = tmp_path / "fast.edge.json", {"threshold": "5"}
    write_edge(path, replace(detector_settings("fast"), edge=Edge([0, 3], [0.5, 1], "disc", 9)), {})
    again = r"again: kamim shards edge-rule fast SOURCE --detector-option fast.threshold=5 --mark d"
    with pytest.raises(UserError, match=again):
        with_edge((detector_settings("fast", other),), path, "disc")
    with pytest.raises(UserError, match="is the edge rule of fast; this build has orb alone"):
        with_edge((detector_settings("orb"),), path)


BAD = [
    ([1, 2], "returned list"),
    (np.zeros((3, 2)).astype(int), r"int64 \[3, 2\]"),
    (np.zeros((3, 4, 5), np.float32), r"float32 \[3, 4, 5\]"),
    (np.zeros((0, 5), np.float32), "without rows"),
    (np.full((4, 4), np.nan, np.float32), "not finite"),
    (np.full((4, 4), -0.1, np.float32), "-0.1 to -0.1"),
    (np.full((4, 2), 30.0, np.float32), "outside of 30 x 20 px"),
    (np.full((4, 2), np.inf, np.float32), "not finite"),
]


@pytest.mark.parametrize(("result", "words"), BAD)
def test_what_is_returned_is_checked(result, words):
    with pytest.raises(Rejected, match=f"m:f .*{words}"):
        checked("m:f", result, (20, 30))


def test_points_and_maps_of_any_float_are_taken():
    assert checked("m:f", np.zeros((0, 2)), (20, 30)).shape == (0, 2)
    assert checked("m:f", np.array([[29.4, 19.4]]), (20, 30)).dtype == np.float32
    assert checked("m:f", np.ones((1, 1), np.float16), (20, 30)).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("nosuchmodule:f", "no module 'nosuchmodule'"),
        ("json:nosuch", "json has no function 'nosuch'"),
        ("json:a.b", "not MODULE:FUNCTION"),
        ("fast=json:dumps", "'fast' is OpenCV's; name it otherwise"),
        ("Big=json:dumps", "'Big' is not of a-z"),
        ("nosuch", "unknown detector 'nosuch'.*MODULE:FUNCTION"),
        ("json:dumps,dumps=json:dumps", "names a detector twice"),
        ("points=cv2:goodFeaturesToTrack", "cv2:goodFeaturesToTrack does not say its arguments"),
        ("f=shutil:copy", "shutil:copy is called with an image alone; give dst a default"),
        ("f=leaving:f", "importing leaving failed: SystemExit: 0"),
        ("f=raising.inside:f", "there is no module 'raising.inside'.* RuntimeError: no GPU"),
    ],
)
def test_what_cannot_be_named_is_one_line(call, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving.py").write_text("import sys\ndef f(rgb): ...\nsys.exit(0)\n")
    (tmp_path / "raising").mkdir()
    (tmp_path / "raising" / "__init__.py").write_text("raise RuntimeError('no GPU')\n")
    with pytest.raises(UserError, match=words):
        parsed_detectors(call, [])


@pytest.mark.parametrize("name", ["aliked", "disk"])
def test_a_network_is_a_file_of_the_users(name, tmp_path, monkeypatch):
    """No published file is at hand: what OpenCV finds by one is stood in for."""
    path = tmp_path / "network.onnx"
    with pytest.raises(UserError, match=rf"there is no file .*name {name}'s network"):
        detector_settings(f"{name}:{path}")
    path.write_bytes(b"no network")
    if hasattr(cv2, f"{name.upper()}_create"):
        with pytest.raises(UserError, match=rf"network.onnx is no network for {name}: "):
            detector_settings(f"{name}:{path}")

    class Network:
        def detect(self, pixels):
            assert pixels[0, 0].tolist() == [3, 2, 1]  # BGR, as OpenCV's own code has it
            return [cv2.KeyPoint(4.5, 2.25, 1), cv2.KeyPoint(0, 0, 1)]

    monkeypatch.setattr(cv2, f"{name.upper()}_create", lambda path: Network(), raising=False)
    detector = detector_settings(f"{name}:{path}")
    assert (detector.name, detector.options) == (name, {})
    assert detector.plugin.version == cv2.__version__
    assert detector_settings(f"mine={name}:{path}").name == "mine"
    rgb = np.tile(np.array([1, 2, 3], np.uint8), (6, 8, 1))
    assert found(detector, rgb).tolist() == [[4.5, 2.25], [0, 0]]
    path.write_bytes(b"another")
    with pytest.raises(BuildError, match=r"network.onnx is not the one of these shards"):
        found(replace(detector, plugin=replace(detector.plugin, sha256="0" * 64)), rgb)
    monkeypatch.delattr(cv2, f"{name.upper()}_create")
    with pytest.raises(UserError, match=rf"has no {name}; version 5 has: type pip install"):
        detector_settings(f"{name}:{path}")


def test_a_package_offers_its_own_by_entry_point(own, tmp_path, monkeypatch):
    folder = tmp_path / "lattice-2.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: lattice\nVersion: 2.0\n")
    (folder / "entry_points.txt").write_text(f"[kamim.maps]\nlattice = {own}:Corners\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    chosen = detector_settings("lattice", {"step": "4"})
    assert (chosen.name, chosen.plugin.function) == ("lattice", f"{own}:Corners")
    assert chosen.options["step"] == 4


@pytest.mark.parametrize("name", CREATE)
def test_each_of_opencvs_is_built_or_says_what_to_install(name, demo_images):
    if not hasattr(cv2, f"{CREATE[name]}_create"):
        with pytest.raises(UserError, match="opencv-python-headless<5"):
            detector_settings(name)
        return
    chosen = detector_settings(name)
    maps = preprocess.density_maps(demo_images[3], 3, settings(detectors=(chosen,), crop=192))
    assert 0.01 < maps[name].mean() / 255 < 0.9


EXAMPLES = ["edges", "saliency", "attention"]


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_example_gives_a_map_that_differs_from_place_to_place(name, demo_images, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    options = {}
    if name == "attention":
        if importlib.util.find_spec("timm") is None:
            pytest.skip("timm is not installed")
        options = {"pretrained": "false"}
    detector = detector_settings(f"examples.{name}:{name}", options)
    chosen = settings(detectors=(detector,), bank=1)
    for image in demo_images[3:40:18]:
        density = preprocess.density_maps(image, 3, chosen)[name]
        assert 0.01 < density.mean() / 255 < 0.95
        assert len(np.unique(density)) > 10
        assert preprocess.bank_of(image, 3, chosen).counts[name].max() <= 64


def test_edges_lie_where_the_picture_has_some(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    image = np.zeros((128, 128, 3), np.uint8)
    image[:, :64] = np.random.default_rng(0).integers(0, 256, (128, 64, 1))
    for name in EXAMPLES[:2]:
        density = found(detector_settings(f"examples.{name}:{name}"), image)
        middle = density.shape[1] // 2
        assert density[:, :middle].mean() > 2 * density[:, middle:].mean()


@pytest.mark.slow
def test_the_command_says_that_no_rule_is_there_and_takes_one_measured(own, small_source, tmp_path):
    call, small = f"slope={own}:ramp", ["--frame", "64", "--crop", "64", "--grid", "16"]
    bare = kamim("build", small_source, "bare", "--detector", call, *small)
    assert bare.returncode == 0, bare.stderr
    assert f"measure one by kamim shards edge-rule {call} {small_source}" in bare.stderr
    measured = kamim("edge-rule", "gftt", "demo", "--samples", "24", "--jobs", "1")
    assert "--edge-rule gftt.edge.json" in measured.stderr
    words = ["build", small_source, "ruled", "--detector", "gftt", *small]
    ruled = kamim(*words, "--edge-rule", "gftt.edge.json")
    assert "edge rule" not in ruled.stderr
    detector = shards.load(tmp_path / "ruled").settings.detectors[0]
    assert detector.edge.photos == 24
    assert visible_cells(detector, 64, 8)[0] < 0.95
    assert (visible_cells(detector, 64, 8)[3:5] > 0.95).all()
    refused = kamim(*words)
    assert refused.returncode == 2
    assert "gftt.edge" in refused.stderr


# Distances, px, and how far from the tables of shards/crops.py a measurement may be. ORB's table is
# no measurement (docs/decisions.md): only where it begins is one.
NOISE = {"fast": (range(7), 0.03), "sift": ([0, 1, 2, 3, 4, 5, 6, 8, 10, 14, 30], 0.03)}


@pytest.mark.release
@pytest.mark.parametrize("name", NOISE)
def test_the_tables_that_are_kept_come_out_again(name, photos):
    source = open_source(str(photos[0].parent.parent))
    detector = detector_settings(name)
    rule = replace(detector, edge=measure_edge(source, detector, samples=200))
    at, noise = NOISE[name]
    assert np.abs(visible(rule, 192)[at] - visible(detector, 192)[at]).max() < noise


def test_fasts_table_and_orbs_margin_come_out_of_the_demo():
    for name, at in (("fast", range(7)), ("orb", range(28))):
        detector = detector_settings(name)
        rule = replace(
            detector, edge=measure_edge(open_source("demo"), detector, samples=100, jobs=1)
        )
        assert np.abs(visible(rule, 192)[at] - visible(detector, 192)[at]).max() < 0.12
