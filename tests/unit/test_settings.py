"""What a set may be made with: every bound, each side of it."""

import dataclasses

import pytest

from preprocess import detector_settings
from preprocess.shard import library_versions
from shards import Detector, File, Ledger, Settings, UserError
from shards.spec import Edge, Plugin

FAST, FREQUENCY = detector_settings("fast"), detector_settings("frequency")
RAW = {"frame": 0, "quality": 0}  # densities alone
# Of each field: values that are taken, and values that are not.
BOUNDS = [
    ("frame", (16, 256, 8192), (15, -1, 1)),
    ("quality", (0, 1, 100), (-1, 101)),
    ("crop", (32, 192, 1024), (0, 24, 31, 1032, 36, 33)),
    ("area", ((0.01, 0.01), (0.5, 1.0), (1, 1)), ((0.009, 1), (0.5, 0.4), (0.5, 1.01), (0, 0))),
    ("map_crops", (0, 64), (-1, 65)),
    ("bank", (0, 255), (-1, 256)),
    ("grid", (2, 254), (0, 1, 255)),
    ("mark", ("ring", "disc", "point"), ("", "square")),
    ("detect_on", ("source", "frame"), ("", "crop")),
    ("shard_size", (0, 1, 1 << 40), (-1, (1 << 40) + 1)),
    ("levels", (16, 256), (0, 15, 255)),
    ("weights", (None, (0.25, 8), (0.19, 192), (5, 1)), ((0.18, 8), (0.25, 0), (0.25, 7))),
    ("weights", (), ((float("inf"), 8), (float("nan"), 8), (-1, 8), (0, 8))),
    ("detectors", ((FAST,), (FAST, FREQUENCY)), ((Detector("Fast", {}),), (Detector("", {}),))),
]


def test_the_defaults_are_those_that_were_measured():
    """docs/decisions.md has the measurements."""
    chosen = Settings()
    assert (chosen.frame, chosen.quality, chosen.crop, chosen.area) == (256, 90, 192, (0.67, 1))
    assert (chosen.map_crops, chosen.bank, chosen.grid, chosen.mark) == (3, 0, 54, "ring")
    assert (chosen.detect_on, chosen.weights, chosen.levels) == ("source", None, 256)


@pytest.mark.parametrize(("field", "taken", "refused"), BOUNDS)
def test_each_setting_has_its_bounds(field, taken, refused):
    for value in taken:
        assert getattr(Settings(**{field: value}), field) == value
    for value in refused:
        with pytest.raises(UserError):
            Settings(**{field: value})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"frame": 15}, "frame 15 is out of range; give 16 to 8192"),
        ({"bank": 256}, "bank 256 is out of range; give 0 to 255"),
        ({"area": (0.005, 1)}, "area 0.005 is out of range; give 0.01 to 1"),
        ({"area": (0.5, 1.5)}, r"area \(0.5, 1.5\) is out of range; give 0.01 to 1"),
        ({"quality": 90.0}, "quality is 90.0; give a whole number"),
        ({"bank": True}, "bank is True; give a whole number"),
        ({"levels": 256.0}, "levels is 256.0; give a whole number"),
        ({"weights": (0.25, 8.0)}, "w_ps 8.0 of the weights: give a divisor"),
        ({"detectors": (FAST, FAST)}, "detectors fast, fast: name each once"),
        ({"crop": 61}, "crop 61 is no multiple of 8; give 64"),
        ({"levels": 15}, "levels 15 is unknown; there are 256, and 16 of version 2"),
        ({"mark": "square"}, "mark is 'square'; there are ring, disc, point"),
        ({"detectors": (Detector("Fast", {}),)}, "has a-z, 0-9, _ and -, not 'Fast'"),
        ({"weights": (0.18, 8)}, "temperature 0.18 reach beyond 255, .*; give 0.181 or more"),
        ({"weights": (0.25, 7)}, "w_ps 7 of the weights: give a divisor of the crop of 192 px"),
        (RAW | {"bank": 2}, "bank is 2: build them by `kamim maps build`"),
    ],
)
def test_a_refusal_says_the_value_and_what_may_be_given(changes, line):
    with pytest.raises(UserError, match=line):
        Settings(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (RAW | {"quality": 90}, "quality"),
        (RAW | {"bank": 1}, "bank"),
        (RAW | {"weights": (0.25, 8)}, "weights"),
        (RAW | {"detect_on": "frame"}, "detect_on"),
        ({"bank": 1, "detectors": (FREQUENCY,)}, "frequency"),
        ({"bank": 1, "detectors": (FAST, FREQUENCY)}, "frequency"),
        ({"bank": 2, "weights": (0.25, 12)}, "multiple of 8"),
        ({"crop": 96, "weights": (0.25, 64)}, "divisor"),
        (
            {"mark": "disc", "detectors": (Detector("mine", {}, edge=Edge([0], [1], "ring", 9)),)},
            "mine",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        Settings(**changes)


def test_a_whole_temperature_is_written_as_it_is_read():
    assert [*map(type, Settings(weights=(1, 8)).weights)] == [float, int]


def test_settings_that_go_together():
    assert Settings(**RAW).frame == 0
    assert Settings(bank=1, detectors=(FAST,)).cells == 24
    assert Settings(bank=1, weights=(0.25, 16)).weights == (0.25, 16)
    assert Settings(weights=(0.25, 12)).weights == (0.25, 12)
    edge = Edge([0], [1], "disc", 9)
    assert Settings(mark="disc", detectors=(Detector("mine", {}, edge=edge),)).mark == "disc"


@pytest.mark.parametrize(
    "fact",
    [
        Settings(),
        File("a", 1, 2, ""),
        Ledger(1, 1, {}),
        FAST,
        Edge([0], [1], "ring", 1),
        Plugin("a", "", ""),
    ],
)
def test_facts_of_a_set_do_not_change(fact):
    name = dataclasses.fields(fact)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(fact, name, getattr(fact, name))


def test_a_ledger_adds_up():
    assert Ledger(5, 3, {"a": 1, "b": 1}).balanced
    assert not Ledger(5, 3, {"a": 1}).balanced
    assert Ledger(5, 3, {"a": 1, "b": 1}).rejected_share == 0.4
    assert Ledger(0, 0, {}).rejected_share == 0
    assert Ledger(0, 0, {}).balanced


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, set()),
        ({"detectors": (FAST,)}, set()),
        ({"detectors": (FAST,), "weights": (0.25, 8)}, {"numpy"}),
        ({"detectors": (FAST, FREQUENCY)}, {"numpy"}),
        ({"detectors": (FAST, Detector("mine", {}, Plugin("a:b", "", "")))}, {"numpy"}),
    ],
)
def test_a_set_names_the_versions_that_decide_its_bytes(changes, more):
    """Those that do not are not named, or another version of them would stop a build."""
    named = library_versions(Settings(**changes))
    assert set(named) == {"opencv", "pillow", "simplejpeg"} | more


def test_frequency_alone_has_no_keypoints():
    assert FAST.has_keypoints
    assert not FREQUENCY.has_keypoints
