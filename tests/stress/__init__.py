"""Faults, damage and hostile input, with figures: `make abuse`. See docs/reliability.md."""
