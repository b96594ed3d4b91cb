"""Real stores on loopback, each a process of its own that can be killed: HTTP, and moto's S3.

Each serves the files of a folder at `url`. Run as a program, the S3 server.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

BUCKET = "bucket"


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
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
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
