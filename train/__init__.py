"""Streams shards and pretrains with a keypoint-weighted masked L1; no detection in it.

In: a finished set of shards and a recipe. Out: a run folder of checkpoints, metrics and pictures.
"""
