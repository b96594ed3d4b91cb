"""examples/trainer.py, a loop of a user's own, gives the losses of `kamim pretrain`."""

from importlib.util import find_spec

import pytest
from conftest import REPOSITORY
from stores import HttpStore

pytest.importorskip("torch")

from test_golden import build
from typed import kamim

from shards.beton import convert_to_ffcv
from train.metrics import read_metrics

STEPS = 6


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return build(tmp_path_factory.mktemp("example") / "demo")


def losses(where, out):
    """What `kamim pretrain` gives."""
    line = ["pretrain", where, "--recipe", "small", "--batch", 64, "--detector", "fast"]
    done = kamim(*line, "--steps", STEPS, "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    return [row["loss"] for row in read_metrics(out)]


def test_it_is_as_short_as_it_says():
    code = (REPOSITORY / "examples" / "trainer.py").read_text().split('"""')[2]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 25


@pytest.mark.slow
def test_from_tars_and_from_a_url(demo, tmp_path, printed):
    ours = losses(demo, tmp_path / "run")
    assert len(ours) == STEPS
    assert printed("trainer", demo, STEPS) == ours
    store = HttpStore(demo, tmp_path / "log")
    try:
        assert printed("trainer", store.url, STEPS, tmp_path / "cache") == ours
    finally:
        store.kill()


@pytest.mark.slow
def test_from_ffcv(demo, tmp_path, printed):
    if find_spec("ffcv") is None:
        pytest.skip("FFCV is not installed")
    convert_to_ffcv(demo, tmp_path / "raw", "raw")
    ours = losses(tmp_path / "raw", tmp_path / "run")
    assert printed("trainer", tmp_path / "raw", STEPS) == ours
