"""Kills, damage, faults and hostile input, with figures: one test per section.

`make abuse` runs all at full scale, keeps the rows in results.json and renders docs/reliability.md;
FLAGS="-k kills --scale 0.05" runs one, quickly, and keeps nothing.
"""

import importlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from kamim.bench.provenance import provenance
from stress.cases import PAGE, RESULTS, SECTIONS, renewed, save, table
from stress.forked import spawn

pytestmark = [pytest.mark.stress, pytest.mark.timeout(0)]


@pytest.mark.parametrize("section", SECTIONS)
def test_nothing_is_lost(section: str, request: pytest.FixtureRequest) -> None:
    if section == "fuzz":
        pytest.importorskip("atheris")
    asked = request.config.getoption
    scale, path = asked("--scale"), asked("--results")
    origin = provenance()  # as it was before results were written
    facts = run_section(section, scale, asked("--seed"))
    for line in table(section, facts["rows"]):
        print(line)
    if path or scale >= 1:
        save(Path(path or RESULTS), section, facts | {"provenance": origin})
    if not path and scale >= 1:
        PAGE.write_text(renewed(PAGE.read_text(), json.loads(RESULTS.read_text())))
    assert not [row for row in facts["rows"] if row["lost"]]


def run_section(section: str, scale: float, seed: int) -> dict[str, Any]:
    """The section's rows, from a process of its own: each begins with nothing imported."""
    arena = Path(tempfile.mkdtemp(prefix=f"stress-{section}-"))
    began, rows = time.monotonic(), arena / "rows.jsonl"
    rows.touch()
    process = spawn(_cases, section, arena, scale, seed, log=arena / "section.log")
    while process.poll() is None:
        time.sleep(0.2)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    sys.stderr.write(process.text())
    if process.wait(0) != 0:
        flaw = f"the section itself ended with {process.status}: {process.text()[-400:]}"
        counts = {"case": "the section", "tried": 1, "survived": 0, "lost": 1}
        found.append({**counts, "note": "it broke off", "losses": [flaw]})
    if any(row["lost"] for row in found):
        sys.stderr.write(f"{section}: see {arena}\n")
    else:
        shutil.rmtree(arena)
    return {"rows": found, "scale": scale, "seed": seed, "seconds": time.monotonic() - began}


def _cases(section: str, arena: Path, scale: float, seed: int) -> None:
    run = importlib.import_module(f"stress.{section}").run
    with (arena / "rows.jsonl").open("a", buffering=1) as file:
        for case in run(arena, scale, seed):
            file.write(json.dumps(case.row()) + "\n")
