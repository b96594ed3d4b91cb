"""The rooms' rule: who may import whom, read from the imports themselves; and no torch."""

import ast
import subprocess
import sys

import pytest
from conftest import REPOSITORY

MAY_IMPORT = {
    "shards": set(),
    "preprocess": {"shards"},
    "train": {"shards"},
}
ROOMS = {*MAY_IMPORT, "kamim"}


def imported(path):
    """Top-level packages that the file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    files = list((REPOSITORY / room).rglob("*.py"))
    assert len(files) > 10
    for path in files:
        foreign = set(imported(path)) & (ROOMS - {room}) - MAY_IMPORT[room]
        assert not foreign, f"{path.name} imports {foreign}"


def test_the_rule_can_fail(tmp_path):
    (tmp_path / "x.py").write_text("def f():\n    from train import loop\n")
    assert set(imported(tmp_path / "x.py")) == {"train"}


@pytest.mark.parametrize("package", ["shards", "preprocess", "kamim"])
def test_building_never_imports_torch(package):
    """A torch that raises stands in its place; the second run shows that it would be noticed."""
    blocked = "import sys; sys.modules['torch'] = None; "
    for module, status in ((package, 0), ("torch", 1)):
        done = subprocess.run(
            [sys.executable, "-c", f"{blocked}import {module}"], capture_output=True
        )
        assert done.returncode == status, done.stderr.decode()
