"""How soon a command answers: what it imports before help, and before an error about words."""

import re
import subprocess
import sys

import pytest

TRAINING = {"matplotlib", "pandas", "sklearn", "timm", "torch", "torchvision"}
HEAVY = TRAINING | {"cv2", "joblib", "numpy", "PIL", "scipy", "simplejpeg"}
IMPORTED = re.compile(r"^import time: +\d+ \| +\d+ \| +(\w+)", re.M)


def start(*words):
    """What a command returned and said, and the top-level packages that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kamim", *words], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    return done.returncode, said, set(IMPORTED.findall(done.stderr))


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "shards --help",
        "shards build --help",
        "shards verify --help",
        "pretrain --help",
        "probe --help",
        "analyse --help",
        "compare --help",
        "export-hf --help",
        "bench --help",
        "recipes",
    ],
)
def test_help_imports_nothing_heavy(words):
    status, said, packages = start(*words.split())
    assert (status, said) == (0, [])
    assert "typer" in packages  # or imports were not seen at all
    assert not packages & HEAVY


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("pretrain nowhere --recipe smal", "smal.*small"),
        ("pretrain nowhere --recipe small", "nowhere"),
        ("pretrain nowhere --recipe small --device gpu", "gpu.*cpu"),
        ("shards build demo out --detector fasst", "fasst.*fast"),
        ("shards build demo out --crop 190", "--crop 190.*192"),
        ("bench --only loader", "loader.*loaders"),
        ("shards biuld", "biuld"),
        ("trian", "trian"),
    ],
)
def test_a_wrong_word_is_told_before_anything_heavy_is_imported(words, says):
    status, said, packages = start(*words.split())
    assert (status in {1, 2}, len(said)) == (True, 1), said
    assert said[0].startswith("kamim: ")
    assert re.search(says, said[0])
    assert not packages & HEAVY


@pytest.mark.parametrize(
    "words", ["shards build nowhere out", "shards verify nowhere", "probe random:small nowhere x"]
)
def test_a_missing_folder_is_told_before_torch_is_imported(words):
    status, said, packages = start(*words.split())
    assert (status in {1, 2}, len(said)) == (True, 1), said
    assert "nowhere" in said[0]
    assert not packages & TRAINING


def test_a_heavy_import_would_be_seen():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import numpy"], capture_output=True, text=True
    )
    assert "numpy" in IMPORTED.findall(done.stderr)


@pytest.mark.parametrize("words", [[], ["shards"]])
def test_kamim_alone_is_its_help_and_no_error_line(words):
    status, said, _ = start(*words)
    assert status == 2
    assert said[0] == " ".join(["Usage: kamim", *words, "[OPTIONS] COMMAND [ARGS]..."])
    assert "see --help" not in said[-1]
