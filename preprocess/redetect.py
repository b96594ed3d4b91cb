"""Do it again and compare: a finished set and its source in, records whose maps differ out.

Finds what checksums cannot: another OpenCV that detects otherwise, or sources that changed.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess.decode import Rejected, decode_image
from preprocess.densities import bank_of, maps_of, weights_of
from preprocess.source import Source, read
from shards import Record, ShardSet
from shards.errors import UserError
from shards.record import equal


def redetect_maps(records: ShardSet, source: Source | None, samples: int = 64) -> list[str]:
    """What differs when the maps of `samples` records, spread evenly, are computed again.

    Pixels come from `source`, or from the stored frame where detection ran on frames. The maps
    must be equal to the last bit. Raises UserError if the source is needed and not given.
    """
    settings = records.manifest.settings
    needs_source = settings.detect_on == "source" or settings.bank > 0  # a bank is never of frames
    if source is None and needs_source:
        raise UserError(
            "redetect needs the pixels that detection ran on: give the source of these shards by "
            "--source (sets built with --detect-on frame and without a bank need none)"
        )
    listed = source.entries if source else []
    by_name = {entry.name: entry for entry in listed}
    problems = []
    numbers = np.unique(np.linspace(0, len(records) - 1, samples).astype(int))
    for number in numbers.tolist():
        record = records[number]
        try:
            rgb = None
            if source is not None and needs_source:
                # By its place in the listing first: a tar may hold one name twice.
                index = int(record.key)
                same = index < len(listed) and listed[index].name == record.source
                entry = listed[index] if same else by_name.get(record.source)
                if entry is None:
                    problems.append(f"record {record.key}: the source has no {record.source!r}")
                    continue
                rgb = decode_image(read(source.kind, source.root, entry))
        except Rejected as error:
            problems.append(f"record {record.key}: {record.source!r} is now {error.reason}")
            continue
        size = record.height, record.width
        again = maps_of(rgb, record.frame, int(record.key), settings, size)
        problems += _differences(record, again, records)
        bank = None
        if record.bank:
            assert rgb is not None
            bank = bank_of(rgb, int(record.key), settings)
            if not record.bank.equals(bank):
                problems.append(f"record {record.key} ({record.source!r}): the bank differs")
        if not equal(record.weights, weights_of(again, bank, settings)):
            problems.append(f"record {record.key} ({record.source!r}): the weights differ")
    return problems


def _differences(
    record: Record, again: dict[str, NDArray[np.uint8]], records: ShardSet
) -> list[str]:
    built_with = records.manifest.versions["opencv"]
    note = "" if built_with == cv2.__version__ else f" (OpenCV {built_with}, {cv2.__version__} now)"
    return [
        f"record {record.key} ({record.source!r}): the {name} map differs in "
        f"{np.count_nonzero(stored != new)} of {stored.size} cells{note}"
        for name, stored in record.maps.items()
        if not np.array_equal(stored, new := again[name])
    ]
