"""Renders what mutate.py found into docs/reliability.md: python tests/mutants/table.py."""

import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

from kamim.bench.markdown import renewed_parts

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
HEAD = "| module | mutants | killed | survived | equivalent | share killed |"


def found() -> list[dict[str, Any]]:
    """Each mutant tried, `outcome` being killed, survived or equivalent, then with its `why`.

    A timeout was killed, tests that were slow all together have not noticed it. Raises ValueError
    for an equivalent mutant that was killed or is none of those tried.
    """
    rows = [json.loads(line) for line in (HERE / "results.jsonl").read_text().splitlines()]
    named = tomllib.loads((HERE / "equivalent.toml").read_text())["mutant"]
    why = {(each["module"], each["was"], each["now"]): each["why"] for each in named}
    for row in rows:
        reason = why.pop((row["module"], row["was"], row["now"]), "")
        killed = row["outcome"] in ("killed", "timeout")
        if reason and killed:
            raise ValueError(f"a test tells it apart, it is not equivalent: {row['now']}")
        row["outcome"] = "killed" if killed else "equivalent" if reason else "survived"
        row["why"] = reason
    if why:
        raise ValueError(f"equivalent.toml names mutants that were not tried: {[*why]}")
    return rows


def share(counts: Counter[str]) -> float:
    """Killed of those that a test could tell apart."""
    return counts["killed"] / max(1, counts["killed"] + counts["survived"])


def by_module(rows: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    """How many were killed, survived or are equivalent, in the order of modules' names."""
    counts = {name: Counter[str]() for name in sorted({row["module"] for row in rows})}
    for row in rows:
        counts[row["module"]][row["outcome"]] += 1
    return counts


def render(rows: list[dict[str, Any]]) -> str:
    """The table, the reasons of what is called equivalent, and the circumstances."""
    modules = by_module(rows)
    lines = [HEAD, "|---|---|---|---|---|---|"]
    for name, counts in [*modules.items(), ("**all**", sum(modules.values(), Counter()))]:
        parts = [counts.total(), *(counts[each] for each in ("killed", "survived", "equivalent"))]
        cells = " | ".join(map(str, parts))
        lines.append(f"| {name} | {cells} | {100 * share(counts):.0f} % |")
    lines.append("")
    for row in rows:
        if row["why"]:
            place = f"{row['module']}: `{row['was']}`"
            lines.append(f"- equivalent, {place} as `{row['now']}`: {row['why']}")
    seeds, dates = (sorted({row[key] for row in rows}) for key in ("seed", "date"))
    seconds = sum(row["seconds"] for row in rows) / len(rows)
    lines.append(
        f"- seed {', '.join(map(str, seeds))}, {seconds:.0f} s per mutant on average, "
        f"{' and '.join(dates)}, commits {', '.join(sorted({row['commit'] for row in rows}))}"
    )
    return "\n".join([*lines, ""])


def renewed(text: str) -> str:
    """`text` of the page with the part between its markers rendered anew."""
    return renewed_parts(text, {"mutants": render(found())})


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
