"""What all benchmarks do alike: a set for the time of a measurement, repeats in turn, figures kept.

Works that are compared run in turn, so that whatever else the machine does meets all of them, and
ratios are taken within a repeat.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import shards
from kamim.bench.provenance import append, check_checkout, provenance, spread
from shards import ShardSet
from shards.files import write_atomically

Figure = TypeVar("Figure")


@contextmanager
def temporary_set(where: str, **options: Any) -> Iterator[ShardSet]:
    """Shards of the source `where` while they are measured; options as shards.build."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        shards.build(where, folder, **options)
        yield shards.open(folder)


def in_turn(
    works: Mapping[str, Callable[[], Figure]], repeats: int, warm: int = 0
) -> dict[str, list[Figure]]:
    """What each of `works` returns in each of `repeats` rounds, behind `warm` that do not count."""
    found: dict[str, list[Figure]] = {name: [] for name in works}
    for repeat in range(warm + repeats):
        for name, work in works.items():
            figure = work()
            if repeat >= warm:
                found[name].append(figure)
    return found


def once(path: Path, work: Callable[[], Any]) -> Any:
    """What `work` gives, kept in `path`, or gave before a stop: for measurements that go on."""
    if not path.exists():
        write_atomically(path, json.dumps(work()).encode())
    return json.loads(path.read_text())


def figures(
    rates: Mapping[str, list[float]], ratios: Mapping[str, dict[str, float]]
) -> dict[str, Any]:
    """The spread of each rate, and the ratios, for a row; printed as a table."""
    found = {name: spread(values, 0) for name, values in rates.items()} | dict(ratios)
    for name, figure in found.items():
        print(f"{name:46s} {figure['median']:>9,} ({figure['min']:,} to {figure['max']:,})")
    return found


def keep(
    name: str, measure: Callable[..., list[dict[str, Any]]], needs_folder: bool = False
) -> None:
    """Measure the source that was typed, by default the demo's, and append the rows; `measure` that
    `needs_folder`, to go on in, gets one in that typed behind it.
    """
    check_checkout()
    where = sys.argv[1] if len(sys.argv) > 1 else "demo"
    work = [own_folder(Path(typed), where) for typed in sys.argv[2 : 2 + needs_folder]]
    print(append(name, measure(where, *work)))


def own_folder(work: Path, where: str) -> Path:
    """The folder in `work` of this commit and source: another's sets and figures are not gone on
    with.
    """
    source = hashlib.sha256(where.encode()).hexdigest()[:8]
    return work / f"{provenance()['commit']}-{source}"
