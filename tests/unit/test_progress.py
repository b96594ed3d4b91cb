"""Progress: a line in a log however long nothing ends, and none where work is short."""

import threading

import pytest

import shards.bar
from shards.progress import progress, waiting


@pytest.fixture
def fast(monkeypatch):
    """Ten seconds of a log in a fiftieth of one."""
    monkeypatch.setattr(shards.bar, "LOG_SECONDS", 0.02)


class Log:
    """A stderr that is no terminal, and says when it has a number of lines."""

    def __init__(self, wanted):
        self.text, self.wanted, self.full = "", wanted, threading.Event()

    def isatty(self):
        return False

    def write(self, text):
        self.text += text
        if self.text.count("\n") >= self.wanted:
            self.full.set()

    def flush(self):
        pass


def test_a_log_gets_lines_while_nothing_ends(fast, monkeypatch):
    monkeypatch.setattr("sys.stderr", log := Log(4))
    with progress("building", 10) as bar:
        assert log.full.wait(300)
        bar.update(10)
    lines = log.text.splitlines()
    assert "\r" not in log.text
    assert all(line.startswith("building:   0%") for line in lines[:4])
    assert "100%" in lines[-1]
    assert "10/10" in lines[-1]


def test_a_log_is_not_flooded_where_much_ends(monkeypatch):
    monkeypatch.setattr("sys.stderr", log := Log(0))
    assert list(progress("converting", 5000, range(5000))) == list(range(5000))
    assert len(log.text.splitlines()) == 2  # the first state and the last, within ten seconds
    assert "5000/5000" in log.text


def test_short_work_says_nothing(monkeypatch):
    monkeypatch.setattr("sys.stderr", log := Log(0))
    with waiting("listing"), progress("hashing", 5, unit="B", delay=1000) as bar:
        bar.update(5)
    with waiting("listing"):
        pass
    assert log.text == ""


def test_long_waiting_says_for_what(fast, monkeypatch):
    monkeypatch.setattr("sys.stderr", log := Log(2))
    with waiting("listing photos"):
        assert log.full.wait(300)
    assert log.text.startswith("listing photos ... 00:01")


def test_a_bar_that_nobody_has_ends(fast, monkeypatch):
    monkeypatch.setattr("sys.stderr", Log(0))
    ticker = progress("left", 10).ticker
    ticker.join(300)
    assert not ticker.is_alive()
