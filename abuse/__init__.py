"""Faults, damage and hostile input, with figures: `python -m abuse`. See docs/reliability.md."""
