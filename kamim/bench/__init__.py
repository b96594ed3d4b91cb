"""Measurements that anyone can run again: each prints a table and writes JSON with provenance."""
