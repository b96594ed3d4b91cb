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
STAMPS = ("core", "test")
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


def test_the_python_block_runs_as_printed(clone):
    run("make shards DATASET=demo DETECTOR=fast", clone)
    for code in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "(256, 256, 3)" in done.stdout


def test_ci_runs_what_the_readme_says_and_nothing_else():
    assert [command for command, _ in commands(BLOCKS[-1])] == DEVELOP
    script = (REPOSITORY / ".ci" / "run").read_text().splitlines()
    assert [line for line in script if line.startswith("make")] == DEVELOP
    others = [line for line in script if line and not line.startswith(("#", "make", "set", "cd"))]
    assert others == []


def test_the_first_command_comes_by_line_25():
    assert README.splitlines().index("$ make shards DATASET=demo DETECTOR=fast") < 25


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (REPOSITORY / target).exists(), target


def test_options_of_the_table_are_real_with_their_defaults():
    help_text = subprocess.run(
        [sys.executable, "-m", "kamim", "shards", "build", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"},
    ).stdout  # fmt: skip
    for option, default in re.findall(r"^\| `(--[a-z-]+)` \| (\S+) \|", README, re.M):
        assert option in help_text
        assert default == "OpenCV's" or f"[default: {default}]" in help_text, option


def test_make_says_what_is_missing(clone):
    for command, words in {
        "make shards DATASET=imagenet": "DATASET=imagenet needs DATA=path",
        "make shards FORMAT=zip": "FORMAT=zip is unknown",
    }.items():
        done = run(command, clone)
        assert done.returncode == 2
        assert words in done.stderr
    listing = run("make help", clone).stdout
    for target in ("setup", "shards", "test", "check", "bench-build"):
        assert re.search(rf"^{target} ", listing, re.M)


def test_no_file_is_too_long():
    for room in ("shards", "preprocess", "bench"):
        for path in (REPOSITORY / room).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 250, path
