"""The `kamim` command, evaluation and benchmarks."""
