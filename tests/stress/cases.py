"""What a section reports: cases with what was tried and what was lost, and their table.

The rows go into the results file and docs/reliability.md.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kamim.bench.markdown import renewed_parts

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results.json"
PAGE = REPOSITORY / "docs" / "reliability.md"
SECTIONS = (
    "kills",
    "inputs",
    "strangers",
    "fuzz",
    "damage",
    "faults",
    "plugins",
    "stores",
    "power",
    "network",
    "archives",
    "soak",
)
KEPT = 5  # descriptions of losses that a row keeps


@dataclass(slots=True)
class Case:
    """One row. What was tried either ended as it must (survived) or is lost, with a reason."""

    section: str
    name: str
    tried: int = 0
    survived: int = 0
    losses: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def lost(self) -> int:
        """Trials that ended otherwise than they must."""
        return self.tried - self.survived

    def trial(self, flaw: str) -> bool:
        """Count a trial; `flaw` says what was wrong, and is empty if nothing was."""
        self.tried += 1
        self.survived += not flaw
        if flaw:
            sys.stderr.write(f"LOST {self.section}, {self.name}: {flaw}\n")
            self.losses = [*self.losses, flaw[:500]][:KEPT]
        return not flaw

    def row(self) -> dict[str, Any]:
        """The case as it stands in the results file."""
        return {
            "case": self.name,
            "tried": self.tried,
            "survived": self.survived,
            "lost": self.lost,
            "note": self.note,
            "losses": self.losses,
        }


def table(section: str, rows: list[dict[str, Any]]) -> list[str]:
    """Markdown rows of a section."""
    return [
        f"| {section} | {r['case']} | {r['tried']:,} | {r['survived']:,} | {r['lost']:,} | "
        f"{r['note'].replace('|', '/')} |"
        for r in rows
    ]


def save(path: Path, section: str, facts: dict[str, Any]) -> None:
    """Put the newest run of `section` in place of the one in `path`."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[section] = facts
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    temporary.replace(path)


def render(results: dict[str, Any]) -> str:
    """The table of docs/reliability.md, and the circumstances of its figures."""
    lines = ["| section | case | tried | survived | lost | |", "|---|---|---|---|---|---|"]
    for section, facts in results.items():
        lines += table(section, facts["rows"])
    rows = [row for facts in results.values() for row in facts["rows"]]
    total = {key: sum(row[key] for row in rows) for key in ("tried", "survived", "lost")}
    lines.append("| **all** | | " + " | ".join(f"**{n:,}**" for n in total.values()) + " | |")
    lines.append("")
    lines += [
        f"- {section}: not run at this scale yet" for section in SECTIONS if section not in results
    ]
    for section, facts in results.items():
        origin = facts["provenance"]
        lines.append(
            f"- {section}: scale {facts['scale']:g}, seed {facts['seed']}, "
            f"{facts['seconds']:,.0f} s on {origin['cores']} cores of an {origin['cpu']}, Python "
            f"{origin['python']}, {origin['date']}, commit {origin['commit']}"
            f"{' with changes' if origin['dirty'] else ''}"
        )
    return "\n".join([*lines, ""])


def renewed(text: str, results: dict[str, Any]) -> str:
    """`text` of the page with the part between its markers rendered anew, sections in order."""
    results = {section: results[section] for section in SECTIONS if section in results}
    return renewed_parts(text, {"abuse": render(results)})
