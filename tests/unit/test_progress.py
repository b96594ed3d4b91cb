"""Progress: a line in a log however long nothing ends, and none where work is short."""

import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import shards.bar
import train.progress
from shards.index import flaws_of_files
from shards.progress import counted, progress, waiting
from shards.spec import File
from train.progress import Doing, Progress


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


def test_hashing_says_how_far_it_is_within_a_file(monkeypatch, tmp_path):
    """An FFCV set is one file: its bar had stood at nothing until the end."""
    (tmp_path / "a").write_bytes(bytes(3_000_000))
    told = []

    @contextmanager
    def bar(title, total, **named):
        told.extend([total, named["delay"]])
        yield SimpleNamespace(update=told.append)

    monkeypatch.setattr("shards.index.progress", bar)
    files = [File("a", 1, 3_000_000, "0" * 64)]
    assert list(flaws_of_files(tmp_path, files)) == ["a"]
    assert told == [3_000_000, 1, 1 << 20, 1 << 20, 3_000_000 - 2 * (1 << 20)]


def test_what_is_counted_says_the_time_left_and_what_is_not_the_time_spent(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(train.progress.time, "monotonic", lambda: now[0])
    doing = Doing("looking at attention", 400)
    now[0] = 106.0
    assert doing.line() == "looking at attention, 6 s"
    doing.update(100)
    assert doing.line() == "looking at attention, 25%, 18 s left"
    assert Doing("compiling").line() == "compiling, 0 s"


def test_a_log_has_a_line_of_what_is_done_in_place_of_a_step(monkeypatch):
    monkeypatch.setattr(train.progress, "LOG_PACE", 0.0)
    monkeypatch.setattr("sys.stderr", log := Log(2))
    progress = Progress(0, 10, 10, 8, True)
    with progress.running(), progress.busy("looking at attention", 4) as doing:
        doing.update(3)
        assert log.full.wait(30)
    assert log.text.startswith("step 1/10: looking at attention, 75%, 0 s left")


GONE = """
import os, sys, time
reading, writing = os.pipe()
os.dup2(writing, 2)
os.close(reading)
from shards import bar
bar.LOG_SECONDS = 0.01
with bar.Bar(total=5, {more}) as shown:
    for _ in range(5):
        time.sleep(0.02)
        shown.update()
print("done", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("more", ["", "mininterval=0, miniters=1"])
def test_a_reader_of_stderr_that_is_gone_stops_nothing(more):
    """As in `kamim ... 2>&1 | head`: by tqdm's own refresh, close would wait for ever."""
    code = GONE.format(more=more)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "done\n"


def test_one_is_no_plural():
    said = [counted(1, "file"), counted(2000, "file"), counted(1.0, "epoch"), counted(0.5, "epoch")]
    assert said == ["1 file", "2,000 files", "1 epoch", "0.5 epochs"]
    assert counted(2, "process", "es") == "2 processes"
