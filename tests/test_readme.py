"""The README is run: every console block in order, its Python as it stands, its tables checked."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```console\n(.*?)^```", README, re.M | re.S)
STAMPS = ("core", "train", "ffcv", "test", "remote", "parquet")
DEVELOP = ["make check", "make test"]


def commands(block):
    """(command, expected stdout lines) of a console block."""
    for part in block.removeprefix("$ ").split("\n$ "):
        command, *expected = part.strip().splitlines()
        yield command, expected


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked and new files in a folder of their own, with this run's environment as .venv."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.decode().split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name not in STAMPS:
            (folder / ".venv" / path.name).symlink_to(path)
    for stamp in STAMPS:  # newer than pyproject.toml: make installs nothing from here
        (folder / ".venv" / stamp).touch()
    return folder


def run(command, folder):
    quiet = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        command, shell=True, cwd=folder, env=quiet, capture_output=True, text=True
    )


@pytest.mark.timeout(600)  # it trains for a minute, longer beside other tests
def test_every_console_block_runs_as_printed(clone):
    seen = 0
    for block in BLOCKS:
        for command, expected in commands(block):
            if command in DEVELOP:
                continue  # this very run; the next test holds it to .ci/run
            done = run(command, clone)
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            lines = done.stdout.strip().splitlines()
            patterns = [line.replace("[", "[[]").replace("...", "*") for line in expected]
            assert len(lines) == len(patterns), done.stdout
            assert all(map(fnmatch.fnmatchcase, lines, patterns)), done.stdout
            seen += 1
    assert seen >= 3


def test_python_blocks_run_as_printed_from_a_train_py_of_the_users_own(clone, tmp_path):
    """In a folder of theirs, whose train.py must not get into the way of our room of that name."""
    assert run("make shards DATASET=demo DETECTOR=fast", clone).returncode == 0
    (tmp_path / "data").symlink_to(clone / "data")
    codes = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    assert len(codes) == 2
    for code, words in zip(codes, ("torch.Size([64, 3, 192, 192])", "(256, 256, 3)"), strict=True):
        (tmp_path / "train.py").write_text(code)
        done = subprocess.run(
            [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert words in done.stdout


def test_ci_runs_what_the_readme_says_and_nothing_else():
    assert [command for command, _ in commands(BLOCKS[-1])] == DEVELOP
    script = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert [line for line in script if line.startswith("make")] == DEVELOP
    others = [line for line in script if line and not line.startswith(("#", "make", "set", "cd"))]
    assert others == []


def test_the_first_command_comes_by_line_25():
    assert README.splitlines().index("$ make shards DATASET=demo DETECTOR=fast") < 25


def test_the_measured_numbers_are_those_of_the_results():
    from bench.readme import renewed

    assert renewed(README) == README


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_options_of_the_tables_are_real_with_their_defaults():
    found = 0
    for words in (["shards", "build"], ["pretrain"]):
        section = README.split(f"kamim {' '.join(words)} --help`")[1].split("\n## ")[0]
        text = subprocess.run(
            [sys.executable, "-m", "kamim", *words, "--help"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        text = " ".join(text.split())
        for option, default in re.findall(r"^\| `(--[a-z-]+)` \| ([^|]+) \|", section, re.M):
            found += 1
            assert option in text
            assert default[0].isupper() or f"[default: {default}" in text or not default.strip()
    assert found >= 12


def test_make_says_what_is_missing(clone):
    for command, words in {
        "make shards DATASET=imagenet DATA=/nowhere": "there is no /nowhere to read imagenet from",
        "make shards DATASET=pets DATA=/nowhere": "no source at pets:/nowhere",
        "make shards FORMAT=zip": "FORMAT=zip is unknown",
        "make pretrain": "pretrain needs SHARDS=folder",
    }.items():
        done = run(command, clone)
        assert done.returncode == 2
        assert words in done.stderr
    done = run("make shards DETECTOR=fast FORMAT=ffcv FRAMES=raw", clone)
    assert "data/demo-fast-ffcv-raw: 312 records" in done.stdout, done.stderr
    listing = run("make help", clone).stdout
    for target in ("setup", "shards", "pretrain", "test", "check", "bench-build"):
        assert re.search(rf"^{target} ", listing, re.M)


def test_no_file_is_too_long():
    for room in ("shards", "preprocess", "train", "evaluate", "bench", "abuse"):
        for path in (REPOSITORY / room).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 250, path
