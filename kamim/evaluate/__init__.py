"""What a pretrained encoder is worth: probes, neighbours, diagnostics, and exports for others."""
