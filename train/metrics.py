"""The rows of a run, as they are read again; without torch."""

import json
from pathlib import Path
from typing import Any

from shards.errors import UserError
from shards.files import write_atomically

COLLAPSED = 0.01  # normalised mutual information below which attention ignores what it sees
METRICS, FACTS = "metrics.jsonl", "run.json"
DECILES = [f"error_decile_{number}" for number in range(1, 11)]  # from the least density on


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, one a step, in order; a line that a kill cut short is left out."""
    path = run / METRICS
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def read_facts(run: Path) -> dict[str, Any]:
    """run.json of a run; {} if there is none. UserError if it is damaged."""
    path = run / FACTS
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (AttributeError, ValueError):
        raise UserError(f"{path} is damaged; the run writes it again when it is resumed") from None


def trim(run: Path, step: int) -> None:
    """Drop the rows from `step` on, which a killed run wrote after its last checkpoint."""
    kept = [row for row in read_metrics(run) if row["step"] < step]
    lines = "".join(json.dumps(row) + "\n" for row in kept)
    write_atomically(run / METRICS, lines.encode("ascii"))


def duration(seconds: float) -> str:
    """`seconds` as a person says it."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
