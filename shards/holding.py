"""Whether a manifest holds the right types: anybody may have written it."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.spec import Edge, Manifest


def holds_its_types(manifest: Manifest) -> bool:
    """Whether names are text and counts are whole numbers from 0. In a hostile file they may not
    be.
    """
    settings, ledger = manifest.settings, manifest.ledger
    files = manifest.files
    counts = [n for file in files for n in (file.count, file.bytes)]
    counts += [ledger.inputs, ledger.written, *ledger.rejected.values()]
    sides = [getattr(settings, each.name) for each in fields(settings) if each.type is int]
    sides.remove(settings.shard_size)
    texts = [text for file in files for text in (file.name, file.sha256)]
    texts += [manifest.container, manifest.fingerprint, settings.mark, settings.detect_on]
    texts += [*manifest.classes, *manifest.detectors]
    plugins = [detector.plugin for detector in settings.detectors if detector.plugin]
    texts += [text for each in plugins for text in (each.function, each.version, each.sha256)]
    known, source = manifest.versions, manifest.source
    options = [value for each in settings.detectors for value in each.options.values()]
    parts: list[object] = [manifest.source, manifest.versions, manifest.fidelity, ledger.rejected]
    parts += [detector.options for detector in settings.detectors]
    counts += [*sides, settings.shard_size]
    return (
        all(type(count) is int and 0 <= count < 1 << 63 for count in counts)
        and max(sides) <= 1 << 16  # so that no product of them overflows
        and all(isinstance(text, str) for text in texts)
        and all(isinstance(part, dict) for part in parts)
        and manifest.count > 0
        and not any("\0" in file.name for file in files)
        and all(isinstance(source.get(name), str) for name in ("kind", "sha256"))
        and "opencv" in known
        and all(isinstance(version, str) for version in known.values())
        and all(type(option) in (bool, int, float) for option in options)
        and _plain_fidelity(manifest.fidelity)
        and all(_plain_edge(detector.edge) for detector in settings.detectors if detector.edge)
        and isinstance(manifest.classes, list)
        and [type(share) in (int, float) for share in settings.area] == [True, True]
        and (settings.weights is None or [*map(type, settings.weights)] == [float, int])
    )


def _plain_fidelity(found: dict[str, Any]) -> bool:
    """Whether it is empty, or has what a page shows. Raises KeyError, TypeError or AttributeError
    if it has not.
    """
    if not found:
        return True
    numbers = [found["temperature"], found["w_ps"]]
    for of_detector in found["detectors"].values():
        numbers += [
            each[name] for each in of_detector.values() for name in ("correlation", "wrong")
        ]
    return all(type(number) in (int, float) for number in numbers)


def _plain_edge(edge: Edge) -> bool:
    """Whether an edge rule is shares of 0 to 1 at growing distances."""
    numbers = [*edge.at, *edge.share]
    return (
        all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
        and len(edge.at) == len(edge.share) > 0
        and sorted(set(edge.at)) == edge.at
        and all(0 <= share <= 1 for share in edge.share)
        and type(edge.photos) is int
    )
