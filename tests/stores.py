"""Real stores on loopback, each a process of its own that can be killed: HTTP, and moto's S3.

Each serves the files of a folder at `url`. Run as a program, the S3 server. `s3_server` begins
empty: moto's in this process, or, as `make test-stores` has it, SeaweedFS, whose S3 is no mock.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

BUCKET = "bucket"
REAL = os.environ.get("KAMIM_S3") == "seaweedfs"
SECRETS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}


@contextmanager
def s3_server(folder: Path) -> Iterator[None]:
    """An S3 server without a bucket, which a client finds, with its keys, by the environment.
    SeaweedFS keeps its files in `folder`.
    """
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if REAL:
            url = stack.enter_context(_seaweedfs(folder))
        else:
            server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0)
            server.start()
            stack.callback(server.stop)
            host, port = server.get_host_and_port()
            url = f"http://{host}:{port}"
        for name, value in {**SECRETS, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Clients and workers of earlier tests know another server, or none.
        pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
        get_reusable_executor().shutdown()
        yield


@contextmanager
def _seaweedfs(folder: Path) -> Iterator[str]:
    if not shutil.which("weed"):
        pytest.skip("there is no weed, SeaweedFS's program; `make test-stores` installs it")
    key, secret = SECRETS.values()
    user = {"name": "tests", "credentials": [{"accessKey": key, "secretKey": secret}]}
    user["actions"] = ["Admin", "Read", "List", "Tagging", "Write"]
    (folder / "users.json").write_text(json.dumps({"identities": [user]}))
    ports = dict(zip(("master", "volume", "filer", "s3"), free_ports(4), strict=True))
    line = ["weed", "server", "-ip=127.0.0.1", f"-dir={folder}", "-s3", "-volume.max=50"]
    line += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    line += [f"-s3.config={folder / 'users.json'}", "-master.volumeSizeLimitMB=64"]
    line += [f"-{name}.port={port}" for name, port in ports.items()]
    with serving(line, folder / "log", ports["s3"]) as process:
        while b"added volume server" not in (folder / "log").read_bytes():
            assert process.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{ports['s3']}"


@contextmanager
def serving(line: list[str], log: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a server, once it answers on `port`."""
    with log.open("ab") as out:
        process = subprocess.Popen(line, stdout=out, stderr=out)
    try:
        while True:
            assert process.poll() is None, log.read_text()
            with socket.socket() as asked:
                if not asked.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, for servers that cannot choose one themselves; SeaweedFS also
    takes those 10,000 higher.
    """
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            if one.getsockname()[1] < 55_000:
                found.append(one.getsockname()[1])
        return found


class Store:
    """A server of `folder`: `url`, `start`, `kill`, and the files it was asked for."""

    def __init__(self, folder: Path, log: Path) -> None:
        self.folder, self.log, self.port = folder, log, 0
        self.start()

    def start(self) -> None:
        """Begin to serve: at first on a port that is free, which the server says, then on it."""
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log)
        while not (said := re.search(rb"port (\d+) ", self.log.read_bytes()[begin:])):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        self.port = int(said[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def asked(self, name: str) -> int:
        """How often files whose names hold `name` were asked for."""
        return sum(name in line and '"GET ' in line for line in self.log.read_text().splitlines())


class HttpStore(Store):
    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        bind = ["--bind", "127.0.0.1", "--directory", str(self.folder)]
        return [sys.executable, "-u", "-m", "http.server", str(self.port), *bind]


class S3Store(Store):
    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/sets/small"

    @property
    def environment(self) -> dict[str, str]:
        """What a client must have in its environment."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
            **SECRETS,
        }

    def command(self) -> list[str]:
        return [sys.executable, __file__, str(self.folder), str(self.port)]


def serve(folder: Path, port: int) -> None:
    """Serve `folder` as S3; it says its port only once everything is there."""
    import boto3
    from moto.server import ThreadedMotoServer

    private = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    private.start()
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    url = f"http://127.0.0.1:{private.get_host_and_port()[1]}"
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
    client.create_bucket(Bucket=BUCKET)
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), BUCKET, f"sets/small/{path.name}")
    public = ThreadedMotoServer("127.0.0.1", port, verbose=False)  # the same store behind it
    public.start()
    print(f"port {public.get_host_and_port()[1]} ", flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
