"""The tests leave the checkout alone, and do not care what its user has left there."""

import subprocess
import sys

import pytest
from conftest import copy_repository, left_in, source_files

WRITES = """\
from conftest import REPOSITORY


def test_that_writes():
    (REPOSITORY / "encoder.safetensors").touch()


def test_whose_command_writes_where_it_runs():
    open("encoder.safetensors", "w").close()
"""


def git(folder, *words):
    subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True)


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


@pytest.fixture
def used(tmp_path):
    """A checkout after the README was followed, with a change and a new file of a developer's."""
    root = tmp_path / "checkout"
    write(root, "README.md", "train/loop.py", "train/old.py", ".gitignore")
    (root / ".gitignore").write_text("/data/\n__pycache__/\n")
    git(root.parent, "init", "-q", root)
    git(root, "add", ".")
    (root / "train" / "old.py").unlink()
    write(root, "train/new.py", "train/__pycache__/new.pyc")
    write(root, "encoder.safetensors", "data/demo-fast/manifest.json", "runs/small/loss.png")
    write(root, "analysis/analysis.html", "probes/x/probe.json", "photos/a/1.jpg", "train.py")
    return root


def test_a_copy_takes_the_projects_files_and_none_of_the_users(used):
    """It had taken the user's encoder.safetensors too, and the README's export then failed."""
    mine = [".gitignore", "README.md", "train/loop.py", "train/new.py"]
    assert sorted(source_files(used)) == mine


def test_what_tests_leave_is_seen_and_caches_are_not(used):
    before = left_in(used)
    write(used, ".pytest_cache/x", "train/__pycache__/loop.pyc")
    assert left_in(used) == before
    write(used, "runs2/small/loss.png", "train/encoder.safetensors")
    (used / "README.md").unlink()
    assert left_in(used) - before == {"runs2/", "train/encoder.safetensors", "README.md"}


@pytest.mark.parametrize(("test", "status"), [("that_writes", 1), ("whose_command_writes", 0)])
def test_a_test_that_writes_into_the_checkout_fails_the_run(test, status, tmp_path):
    """A command without a folder runs in an empty one; what is written on purpose is seen."""
    copy = copy_repository(tmp_path)
    (copy / "tests" / "test_bad.py").write_text(WRITES)
    git(copy, "init", "-q")
    line = [sys.executable, "-m", "pytest", "-q", "tests/test_bad.py", "-k", test]
    done = subprocess.run(line, cwd=copy, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("from it: ['encoder.safetensors']" in done.stdout) == bool(status)
