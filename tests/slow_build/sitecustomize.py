"""Loaded by the processes of the kill test: every record takes 20 ms longer, so kills hit work."""

import time

import shards.webdataset

_add = shards.webdataset.ShardWriter.add


def _slow(self, record):
    time.sleep(0.02)
    _add(self, record)


shards.webdataset.ShardWriter.add = _slow
