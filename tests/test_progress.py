"""What is said while something takes long: lines in a log, one that goes again on a terminal."""

import io
import time

import pytest

from shards import writing


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_work_without_steps_says_that_it_goes_on(stream, monkeypatch):
    monkeypatch.setattr(writing.sys, "stderr", stream)

    def fail():
        with writing.busy("adding up", pace=0.001):
            while stream.getvalue().count("adding up") < 2:
                time.sleep(0.001)
            raise ValueError("as it came")

    with pytest.raises(ValueError, match="as it came"):
        fail()
    line = "\radding up: 0 s" if stream.isatty() else "adding up: 0 s\n"
    assert stream.getvalue().startswith(line * 2)
    assert stream.getvalue().endswith("\r\033[K" if stream.isatty() else line)
