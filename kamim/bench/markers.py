"""Rendered parts of a page: what stands between its markers gives way to new text.

In: a page, the new text of each part by name. Out: the page with those parts and no other changed.
"""

from collections.abc import Mapping


def renewed_parts(text: str, parts: Mapping[str, str]) -> str:
    """`text` with each of `parts` between its `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = before + begin + part + end + after
    return text
