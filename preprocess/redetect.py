"""Detect again and compare: which records of a finished set would get another map or bank today.

This finds what checksums cannot: an OpenCV that detects otherwise, or sources that changed.
"""

from itertools import chain

import cv2
import numpy as np

from preprocess.decode import Rejected, decode_image
from preprocess.densities import bank_of, maps_of, weights_of
from preprocess.source import Source
from shards import Record, ShardSet
from shards.errors import UserError
from shards.record import equal
from shards.report import spread


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
    used = source if needs_source else None
    found = (_differences(records, records[n], used) for n in spread(len(records), samples))
    return [line for lines in found for line in lines]


def _differences(records: ShardSet, record: Record, source: Source | None) -> list[str]:
    settings, number, rgb = records.manifest.settings, int(record.key), None
    if source is not None:
        # By its place in the listing first: a tar may hold one name twice.
        entries = chain(source.entries[number : number + 1], source.entries)
        entry = next((entry for entry in entries if entry.name == record.source), None)
        if entry is None:
            return [f"record {record.key}: the source has no {record.source!r}"]
        try:
            rgb = decode_image(source.read(entry))
        except Rejected as error:
            return [f"record {record.key}: {record.source!r} is now {error.reason}"]
    named = f"record {record.key} ({record.source!r})"
    try:
        again = maps_of(rgb, record.frame, number, settings, (record.height, record.width))
        bank = bank_of(rgb, number, settings) if rgb is not None and settings.bank else None
    except Rejected as error:
        return [f"{named}: {error.reason} now, {error.detail}"]
    built_with = records.manifest.versions["opencv"]
    note = "" if built_with == cv2.__version__ else f" (OpenCV {built_with}, {cv2.__version__} now)"
    problems = [
        f"{named}: the {name} map differs in {np.count_nonzero(stored != new)} of {stored.size} "
        f"cells{note}"
        for name, stored in record.maps.items()
        if not np.array_equal(stored, new := again[name])
    ]
    if record.bank is not None and not (bank and record.bank.equals(bank)):
        problems.append(f"{named}: the bank differs")
    if not equal(record.weights, weights_of(again, bank, settings)):
        problems.append(f"{named}: the weights differ")
    return problems
