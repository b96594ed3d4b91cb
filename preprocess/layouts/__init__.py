"""The layouts that datasets are published in, one file each.

In: a path or URL and a split. Out: a Source, or None where another layout lies there.
"""
