"""Pretrains from shards with a keypoint-weighted masked L1. It detects nothing.

A run folder gets checkpoints, metrics and pictures.
"""
