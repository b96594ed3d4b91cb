"""How fast batches come from an object store, against the same set on disk; `make bench-remote`.

The loader from moto's S3 on loopback with its cache warm, new to this process, and empty, over the
loader from the folder, in the same order. The server takes its processor time from the same cores.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import shards
from kamim.bench.measuring import figures, in_turn, keep, temporary_set
from kamim.bench.provenance import ratio
from shards import Plan, ShardSet, Windows

REPEATS, BATCH, WINDOW, BUCKET = 7, 100, 16, "bucket"
WARM, HASHED, COLD = "S3, cache warm", "S3, cache warm, first epoch (hashed)", "S3, cache empty"
LOCAL, FIRST = "local folder", "local folder, first epoch"


def rate(records: ShardSet, epochs: int) -> float:
    """Images per second over `epochs`, from asking for the first batch to the last."""
    windows = Windows([shard.count for shard in records.shards], WINDOW, 0)
    plan = Plan(len(records), BATCH, windows=windows)
    begin, steps = time.perf_counter(), plan.steps(epochs)
    for _ in records.loader(plan, 0, steps):
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
        HASHED: lambda: rate(shards.open(url, cache=scratch / "warm"), 1),
        FIRST: lambda: rate(records, 1),
        COLD: cold,
    }
    rates = in_turn(works, REPEATS)
    bases = {WARM: LOCAL, HASHED: FIRST, COLD: FIRST}
    ratios = {f"{name} / local": ratio(rates[name], rates[base]) for name, base in bases.items()}
    return {"bench": "remote", "images": len(records), "n": REPEATS, **figures(rates, ratios)}


def serve_and_measure(where: str) -> list[dict[str, Any]]:
    """The row of the source `where`."""
    with temporary_set(where) as records, served(records.folder) as url:
        return [measure(records, url, records.folder.parent)]


if __name__ == "__main__":
    keep("remote", serve_and_measure)
