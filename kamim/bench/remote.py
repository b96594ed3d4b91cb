"""How fast batches come from an object store, against the same set on disk; `make bench-remote`.

In: a source (DATA, or the demo). Out: a table and results/remote.jsonl: the loader from moto's S3
on loopback with its cache warm, new to this process, and empty, over the loader from the folder,
in the same order; interleaved, medians. The server takes its processor time from the same cores.
"""

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import shards
from kamim.bench.provenance import append
from preprocess import build_shards, detector_settings, open_source
from preprocess.building import shard_size_for
from shards import Settings, ShardSet
from shards.loader import Loader
from shards.order import Plan, Windows

REPEATS, BATCH, WINDOW = 7, 100, 16
WARM, LOCAL, BUCKET = "S3, cache warm", "local folder", "bucket"


def rate(records: ShardSet, epochs: int) -> float:
    """Images a second over `epochs`, from asking for the first batch to the last."""
    windows = Windows([shard.count for shard in records.shards], WINDOW, 0)
    plan = Plan(len(records), BATCH, windows=windows)
    begin, steps = time.perf_counter(), plan.steps(epochs)
    for _ in Loader(records, plan, 0, steps):
        pass
    return steps * BATCH / (time.perf_counter() - begin)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The URL of `folder` in an S3 server on loopback, a process of its own."""
    import boto3

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    os.environ |= dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
    os.environ |= {"AWS_DEFAULT_REGION": "us-east-1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    line = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(line, **quiet) as server:  # type: ignore[call-overload]
        try:
            while server.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            client = boto3.client("s3")
            client.create_bucket(Bucket=BUCKET)
            for path in sorted(folder.iterdir()):
                client.upload_file(str(path), BUCKET, f"set/{path.name}")
            yield f"s3://{BUCKET}/set"
        finally:
            server.kill()


def measure(records: ShardSet, url: str, scratch: Path) -> dict[str, Any]:
    """One row of results, printed as a table."""
    epochs = max(2, 6400 // len(records))
    warm = shards.open(url, cache=scratch / "warm")
    rate(warm, 1)

    def cold() -> float:
        shutil.rmtree(scratch / "cold", ignore_errors=True)
        return rate(shards.open(url, cache=scratch / "cold"), 1)

    works: dict[str, Callable[[], float]] = {
        LOCAL: lambda: rate(records, epochs),
        WARM: lambda: rate(warm, epochs),
        "S3, cache warm, first epoch (hashed)": lambda: rate(
            shards.open(url, cache=scratch / "warm"), 1
        ),
        "local folder, first epoch": lambda: rate(records, 1),
        "S3, cache empty": cold,
    }
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            rates[name].append(work())
    row: dict[str, Any] = {"bench": "remote", "images": len(records), "n": REPEATS}
    for name, base in {
        WARM: LOCAL,
        "S3, cache warm, first epoch (hashed)": "local folder, first epoch",
        "S3, cache empty": "local folder, first epoch",
    }.items():
        ratios = [a / b for a, b in zip(rates[name], rates[base], strict=True)]
        spread = [round(f(ratios), 3) for f in (statistics.median, min, max)]
        row[f"{name} / local"] = dict(zip(("median", "min", "max"), spread, strict=True))
        print(f"{name + ' / local':46s} {spread[0]:.2f} ({spread[1]:.2f} to {spread[2]:.2f})")
    for name, values in rates.items():
        row[name] = round(statistics.median(values))
        print(f"{name:46s} {row[name]:,} images/s")
    return row


def main(where: str) -> None:
    """Build, serve, measure, print and append."""
    with tempfile.TemporaryDirectory() as scratch:
        source, folder = open_source(where), Path(scratch) / "shards"
        size = shard_size_for(len(source.entries))
        build_shards(
            source, folder, Settings(detectors=(detector_settings("fast"),), shard_size=size)
        )
        with served(folder) as url:
            row = measure(ShardSet(folder), url, Path(scratch))
    print(append("remote", [row]))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
