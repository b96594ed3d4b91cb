"""Loaded by processes that tests stop: each record takes longer, so that stops hit work."""

import os
import time

import shards.tar

_add = shards.tar.ShardWriter.add


def _slow(self, record):
    time.sleep(float(os.environ.get("SLOW_SECONDS", "0.02")))
    _add(self, record)


shards.tar.ShardWriter.add = _slow
