"""The fidelity command: its figures against hand-made cases, its headline where it belongs."""

import json

import numpy as np
import pytest
from conftest import contents, settings
from conftest import errors as lines
from typed import kamim

import preprocess
from preprocess import build_shards, measure_fidelity, open_source, storage
from preprocess.fidelity import table
from shards import Settings, ShardSet, UserError, load
from shards.verification import verify_shards


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    """The demo at the published crop, with a bank; nothing of the user's."""
    out = tmp_path_factory.mktemp("demo") / "shards"
    detectors = tuple(preprocess.detector_settings(n) for n in ("fast", "orb"))
    chosen = Settings(detectors=detectors, shard_size=64, bank=2)
    build_shards(open_source("demo"), out, chosen, 2)
    return out


@pytest.mark.slow
def test_the_figures_are_those_of_the_demo(demo_set, capsys):
    found = measure_fidelity(ShardSet(demo_set), open_source("demo"), samples=60, jobs=1)
    assert "fidelity: 100%" in capsys.readouterr().err  # it was silent for as long as it took
    assert list(found) == ["fast", "orb"]
    for name, errors in found.items():
        exact = {"correlation": 1, "wrong": 0, "bias": 0, "equal": 1, "samples": 60}
        for each in ("0.1", "0.25", "1"):
            exact |= {f"wrong at {each}": 0, f"bias at {each}": 0}
        assert errors["bank"] == exact
        assert errors["map"]["wrong"] == errors["map"]["wrong at 0.25"]
        assert errors["uncorrected"]["correlation"] == errors["map"]["correlation"]
        assert errors["uniform"]["correlation"] == 0
        assert 0.85 < errors["map"]["correlation"] < 1
        assert errors["map"]["wrong"] < 0.6 * errors["uniform"]["wrong"]
        assert errors["map"]["wrong"] > 0.01
        assert errors["shifted"]["correlation"] > 0.8
        same = errors["flipped"]["equal"] == 1
        assert same == (name == "fast")
        if "torchvision" in errors:
            assert 0.95 < errors["torchvision"]["correlation"] < 1


def test_the_table_is_in_percent():
    errors = {"correlation": 0.9651, "wrong": 0.0912, "bias": -0.0234, "equal": 0.5}
    for each in ("0.1", "0.25", "1"):
        errors |= {f"wrong at {each}": 0.1612, f"bias at {each}": 0.011}
    said = table({"fast": {"map": errors}})
    assert said[1].split() == ["fast", "map", "0.965", "9.1%", "-2.3%", "50.0%"]
    assert said[3].split() == ["fast", "map"] + 3 * ["16.1%", "+1.1%"]


def test_a_spoilt_bank_shows(demo_set, monkeypatch):
    from preprocess import fidelity

    real = fidelity._densities

    def spoilt(record, *rest):
        for counts in record.bank.counts.values():
            counts[:, 3, 4] += 1
        return real(record, *rest)

    monkeypatch.setattr(fidelity, "_densities", spoilt)
    found = measure_fidelity(ShardSet(demo_set), open_source("demo"), samples=3, jobs=1)
    assert found["fast"]["bank"]["equal"] == round(1 - 1 / 576, 4)


def test_the_command_prints_writes_the_headline_and_leaves_the_set_sound(demo_set):
    before = contents(demo_set)
    done = kamim("shards", "fidelity", demo_set, "--samples", "20", "--jobs", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert "fidelity: 100%" in done.stderr
    printed = json.loads(done.stdout)
    headline = load(demo_set).fidelity
    assert headline["detectors"]["orb"]["map"] == printed["detectors"]["orb"]["map"]
    assert headline["detectors"]["fast"]["bank"]["equal"] == 1
    assert (demo_set / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    after = contents(demo_set)
    assert {name for name in after if after[name] != before.get(name)} == {
        "manifest.json",
        "fidelity.png",
    }
    assert verify_shards(demo_set) == []
    with pytest.raises(ValueError, match="w_ps 12"):
        measure_fidelity(ShardSet(demo_set), open_source("demo"), w_ps=12, jobs=1)
    page = kamim("shards", "inspect", demo_set)
    assert "fast bank: correlation 1.000" in (demo_set / "inspect.html").read_text(), page.stderr


def test_mistakes_are_one_line(small_source, tmp_path):
    build_shards(open_source(str(small_source)), tmp_path / "set", settings(), 1)
    for arguments, words in (
        ([], "give --source"),
        (["--source", "demo"], "is not what"),
        (["--source", small_source, "--w-ps", "12"], "w_ps 12"),
        (["--source", small_source, "--samples", "0"], "--samples 0"),
        (["--source", small_source, "--seed", "9" * 20], "--seed 999"),
    ):
        done = kamim("shards", "fidelity", tmp_path / "set", *arguments)
        assert done.returncode == 2
        assert lines(done) == 1
        assert words in done.stderr


def test_a_source_that_cannot_be_read_any_more_is_one_line(small_source, tmp_path, monkeypatch):
    source = open_source(str(small_source))
    build_shards(source, tmp_path / "set", settings(), 1)
    for path in small_source.rglob("*.jpg"):
        path.rename(path.with_suffix(".gone"))
    with pytest.raises(UserError, match=r"jpg' is now vanished: it was listed and is gone"):
        measure_fidelity(ShardSet(tmp_path / "set"), source, samples=1, jobs=1)


@pytest.mark.parametrize(
    "name", ["fast", *(pytest.param(name, marks=pytest.mark.slow) for name in ("orb", "sift"))]
)
def test_map_and_bank_of_one_detector_add_at_most_28_percent(name, photos, tmp_path):
    """Headers and padding counted, over a part of the photographs."""
    source = tmp_path / "source"
    for path in photos[::8]:
        (source / path.parent.name).mkdir(parents=True, exist_ok=True)
        (source / path.parent.name / path.name).write_bytes(path.read_bytes())
    chosen = Settings(detectors=(preprocess.detector_settings(name),), shard_size=50, bank=4)
    build_shards(open_source(str(source)), tmp_path / name, chosen, 2)
    found = storage(ShardSet(tmp_path / name))
    assert found["added"] <= 0.28
    index = ShardSet(tmp_path / name).index
    assert found["bytes"] == round(np.mean(index["bytes"].astype(float)))
