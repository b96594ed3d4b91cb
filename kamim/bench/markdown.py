"""Tables as Markdown, and pages whose rendered parts stand between markers."""

import statistics
from collections.abc import Iterable, Mapping, Sequence


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    heads = list(heads)
    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def deviation(values: Sequence[float], scale: float = 1) -> str:
    """Mean ± sample deviation of `values` times `scale`, as far as there are any."""
    if not values:
        return ""
    spread = f" ± {scale * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.2f}{spread}"


def renewed_parts(text: str, parts: Mapping[str, str]) -> str:
    """`text` with each of `parts` between its `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + part + end + after
    return text
