"""What a pretrained encoder is worth: probes, neighbours and conversions.

In: checkpoints and shards with labels. Out: accuracies with their spread, and encoders for others.
"""
