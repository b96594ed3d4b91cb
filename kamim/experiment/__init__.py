"""Experiments that answer a question in the small, from a plan written down before their runs."""
