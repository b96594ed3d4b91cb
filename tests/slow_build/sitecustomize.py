"""Loaded by processes that tests stop: each record takes longer, so that stops hit work."""

import os
import time

import shards.maps
import shards.tar


def _slowed(add):
    def slow(self, record):
        time.sleep(float(os.environ.get("SLOW_SECONDS", "0.02")))
        add(self, record)

    return slow


for writer in (shards.tar.ShardWriter, shards.maps.MapsWriter):
    writer.add = _slowed(writer.add)
