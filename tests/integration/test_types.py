"""mypy, strictly, with all that is imported at hand; `make check` has no torch."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY

pytest.importorskip("torch")


@pytest.mark.slow
def test_types():
    line = [sys.executable, "-m", "mypy", "shards", "preprocess", "train", "kamim"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
