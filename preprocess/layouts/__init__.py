"""The layouts that datasets are published in, one file each: a path or URL and a split become a
Source, or None where another layout lies there.
"""
