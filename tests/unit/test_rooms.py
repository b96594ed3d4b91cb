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
# shards.build is the one door to the room that writes sets; it is opened when it is used.
DOORS = {("shards/__init__.py", "preprocess")}


def imported(path):
    """Top-level packages that the file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield from named(node.args[0])


def called(node):
    """The last name of what a call calls."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def named(argument):
    """The package that an import by a string names; none where a variable holds the name."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.Constant):
        yield argument.value.partition(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    files = list((REPOSITORY / room).rglob("*.py"))
    assert len(files) > 10
    for path in files:
        here = str(path.relative_to(REPOSITORY))
        doors = {name for where, name in DOORS if where == here}
        foreign = set(imported(path)) & (ROOMS - {room}) - MAY_IMPORT[room] - doors
        assert not foreign, f"{path.name} imports {foreign}"


def test_the_rule_can_fail(tmp_path):
    for line in (
        "from train import loop",
        "import train.loop",
        "importlib.import_module('train.loop')",
        "import_module(f'train.{name}')",
        "__import__('train')",
    ):
        (tmp_path / "x.py").write_text(f"def f():\n    {line}\n")
        assert set(imported(tmp_path / "x.py")) == {"train"}
    for where, name in DOORS:
        assert name in imported(REPOSITORY / where)


@pytest.mark.parametrize("package", ["shards", "preprocess", "kamim"])
def test_building_never_imports_torch(package):
    """A torch that raises stands in its place; the second run shows that it would be noticed."""
    blocked = "import sys; sys.modules['torch'] = None; "
    for module, status in ((package, 0), ("torch", 1)):
        done = subprocess.run(
            [sys.executable, "-c", f"{blocked}import {module}"], capture_output=True
        )
        assert done.returncode == status, done.stderr.decode()
