"""Tables as Markdown, and pages whose rendered parts stand between markers."""

from collections.abc import Iterable, Mapping


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table."""
    heads = list(heads)
    return [line(heads), "|" + "---|" * len(heads), *map(line, rows)]


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def renewed_parts(text: str, parts: Mapping[str, str]) -> str:
    """`text` with each of `parts` between its `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + part + end + after
    return text
