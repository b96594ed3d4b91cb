"""Streams shards and pretrains with a keypoint-weighted masked L1; no detection in it.

A run folder gets checkpoints, metrics and pictures.
"""
