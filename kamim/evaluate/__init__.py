"""Evaluates a pretrained encoder: probes, neighbours, diagnostics; and exports it."""
