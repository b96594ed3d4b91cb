"""Sets as FORMAT.md says, by NumPy and tarfile alone: a second reader, written from that page."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np


def records(folder):
    """(suffixes in order, record) of a WebDataset set: frame bytes, json, label, arrays by name."""
    manifest = json.loads((Path(folder) / "manifest.json").read_bytes())
    index, number = np.load(Path(folder) / "index.npy"), 0
    for shard in manifest["shards"]:
        data = (Path(folder) / shard["name"]).read_bytes()
        for row in index[number : number + shard["count"]]:
            start, end = int(row["start"]), int(row["start"]) + int(row["bytes"])
            with tarfile.open(fileobj=io.BytesIO(data[start:end] + bytes(1024))) as archive:
                parts = {m.name: archive.extractfile(m).read() for m in archive}
            assert all(name.startswith(f"{row['key']:09d}.") for name in parts)
            parts = {name.partition(".")[2]: part for name, part in parts.items()}
            arrays = {n[:-4]: np.load(io.BytesIO(p)) for n, p in parts.items() if n[-4:] == ".npy"}
            frame = data[row["frame"] :][: row["frame_bytes"]]
            facts = {**json.loads(parts["json"]), "label": int(parts["cls"]), "frame": frame}
            yield list(parts), arrays | facts
        number += shard["count"]
