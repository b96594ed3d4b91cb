"""`python -m abuse [SECTION ...] [--scale F] [--seed N]`: runs sections, prints and keeps a table.

In: names of sections (all by default). Out: rows on stdout, a results file with provenance, and at
full scale docs/reliability.md rendered from it. Exit status 1 on any loss. A section that was run
replaces its own rows alone, so that a run that was stopped goes on with the sections it lacks.
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from abuse.cases import PAGE, REPOSITORY, RESULTS, SECTIONS, renewed, save, table
from abuse.forked import spawn
from kamim.bench.provenance import provenance


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser("python -m abuse", description="Faults, damage and hostility.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials; 0.05: quick")
    parser.add_argument("--seed", type=int, default=0, help="decides every random choice")
    parser.add_argument("--results", type=Path, help="where the rows are kept")
    parser.add_argument("--missing", action="store_true", help="skip sections already in results")
    parser.add_argument("--keep", action="store_true", help="leave what was made in its folder")
    asked = parser.parse_args()
    unknown = set(asked.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    path = asked.results or (RESULTS if asked.scale >= 1 else REPOSITORY / "build" / "abuse.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    sections = [s for s in asked.sections or SECTIONS if not (asked.missing and s in known)]
    print("| section | case | tried | survived | lost | |\n|---|---|---|---|---|---|", flush=True)
    lost, origin = 0, provenance()  # as it was before results were written
    for section in sections:
        facts = run_section(section, asked.scale, asked.seed, asked.keep)
        save(path, section, facts | {"provenance": origin})
        lost += sum(row["lost"] for row in facts["rows"])
    if path.resolve() == RESULTS.resolve():
        results = json.loads(RESULTS.read_text())
        PAGE.write_text(renewed(PAGE.read_text(), results))
    print(f"\n{lost} lost; rows with their provenance: {path}")
    return int(lost > 0)


def run_section(section: str, scale: float, seed: int, keep: bool) -> dict[str, Any]:
    """The section's rows, from a process of its own: each begins with nothing imported."""
    arena = Path(tempfile.mkdtemp(prefix=f"abuse-{section}-"))
    began, rows = time.monotonic(), arena / "rows.jsonl"
    rows.touch()
    process = spawn(_cases, section, arena, scale, seed, log=arena / "section.log")
    shown = 0
    while True:
        over = process.poll() is not None
        for line in (lines := rows.read_text().splitlines())[shown:]:
            print(*table(section, [json.loads(line)]), sep="\n", flush=True)
        shown = len(lines)
        if over:
            break
        time.sleep(0.2)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    sys.stderr.write(process.text())
    if process.wait(0) != 0:
        flaw = f"the section itself ended with {process.status}: {process.text()[-400:]}"
        found.append({"case": "the section", "tried": 1, "survived": 0, "lost": 1,
                      "note": "it broke off", "losses": [flaw]})  # fmt: skip
        print(*table(section, found[-1:]), sep="\n", flush=True)
    if not keep and not any(row["lost"] for row in found):
        shutil.rmtree(arena)
    else:
        sys.stderr.write(f"{section}: see {arena}\n")
    return {"rows": found, "scale": scale, "seed": seed, "seconds": time.monotonic() - began}


def _cases(section: str, arena: Path, scale: float, seed: int) -> None:
    run = importlib.import_module(f"abuse.{section}").run
    with (arena / "rows.jsonl").open("a", buffering=1) as file:
        for case in run(arena, scale, seed):
            file.write(json.dumps(case.row()) + "\n")


if __name__ == "__main__":
    sys.exit(main())
