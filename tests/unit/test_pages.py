"""What the pages say of files and tests is there."""

import re

import pytest
from conftest import REPOSITORY

PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in ("*.md", "docs/**/*.md", "shards/*.md")
    for path in REPOSITORY.glob(pattern)
)
TESTS = {
    name
    for path in (REPOSITORY / "tests").rglob("test_*.py")
    for name in re.findall(r"(?m)^def (test_\w+)", path.read_text())
}


@pytest.mark.parametrize("page", PAGES)
def test_tests_and_files_that_a_page_names_exist(page):
    text = (REPOSITORY / page).read_text()
    named = {name for name in re.findall(r"`(test_\w+)`", text) if not name.endswith("_")}
    files = {path.stem for path in (REPOSITORY / "tests").rglob("test_*.py")}
    assert named <= TESTS | files, named - TESTS
    for place in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in place:
            assert ((REPOSITORY / page).parent / place).exists(), place


def test_promises_have_tests():
    rows = (REPOSITORY / "SECURITY.md").read_text().split("## What is promised")[1]
    rows = [row for row in rows.split("##")[0].splitlines() if row.startswith("| ")][1:]
    assert len(rows) > 8
    assert all("`test_" in row for row in rows)
