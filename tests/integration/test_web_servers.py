"""Photographs and sets from web servers that people run: nginx by HTTPS, and a WebDAV server.

Each command is a process of its own: a client reads whom it trusts when it starts.
"""

import os
import shutil
import subprocess
import sys

import archives
import pytest
from archives import tar_bytes
from conftest import contents
from stores import free_ports, serving

pytest.importorskip("aiohttp")

from test_remote import MEMBERS, tars_of

pytestmark = pytest.mark.slow

NGINX = """
daemon off; master_process off; pid {state}/pid; error_log stderr; events {{}}
http {{
  access_log off; client_body_temp_path {state}; proxy_temp_path {state};
  fastcgi_temp_path {state}; uwsgi_temp_path {state}; scgi_temp_path {state};
  server {{
    listen 127.0.0.1:{port} ssl;
    ssl_certificate {state}/own.crt; ssl_certificate_key {state}/own.key;
    root {root}; autoindex on; {more}
  }}
}}
"""
BATCHES = """
import hashlib, sys, shards
found = hashlib.sha256()
records = shards.open(sys.argv[1], cache=sys.argv[2] if sys.argv[2:] else None)
for batch in records.batches(size=96, batch=2, epochs=2, weights="fast"):
    for tensor in (batch.images, batch.weights, batch.labels, batch.samples):
        found.update(tensor.numpy().tobytes())
print(found.hexdigest())
"""


def nginx(root, state, port, more=""):
    """nginx's command to serve `root` by HTTPS, with a certificate of its own."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not program or not shutil.which("openssl"):
        pytest.skip("nginx and openssl are packages of the system; not both are here")
    line = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    line += ["-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.1"]
    line += ["-keyout", f"{state}/own.key", "-out", f"{state}/own.crt"]
    subprocess.run(line, check=True, capture_output=True)
    text = NGINX.format(state=state, port=port, root=root, more=more)
    (state / "nginx.conf").write_text(text)
    return [program, "-c", str(state / "nginx.conf")]


def webdav(root, state, port):
    """WsgiDAV's command to serve `root`, to anybody."""
    if not (program := shutil.which("wsgidav")):
        pytest.skip("there is no wsgidav; `make test-stores` installs it")
    return [program, "--host=127.0.0.1", f"--port={port}", f"--root={root}", "--auth=anonymous"]


def run(*words, check=True):
    line = [sys.executable, *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=check)


def build(source, out, check=True):
    line = ["--frame", "120", "--crop", "96", "--grid", "24", "--jobs", "1"]
    return run("-m", "kamim", "shards", "build", source, out, *line, check=check)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What is served: photographs, a tar of them, and the set that is built of it."""
    root = tmp_path_factory.mktemp("www")
    archives.unpack(MEMBERS, root / "photos")
    (root / "photos.tar").write_bytes(tar_bytes(MEMBERS))
    build(root / "photos.tar", root / "set")
    return root


@pytest.mark.parametrize("server", [nginx, webdav])
def test_what_it_serves_is_what_the_folder_holds(server, root, tmp_path, monkeypatch):
    (port,) = free_ports(1)
    url = f"{'https' if server is nginx else 'http'}://127.0.0.1:{port}"
    with serving(server(root, tmp_path, port), tmp_path / "log", port):
        if server is nginx:
            refused = build(f"{url}/photos.tar", tmp_path / "none", check=False)
            assert refused.returncode == 2
            assert "certificate" in refused.stderr
            assert len(refused.stderr.splitlines()) == 1
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.crt"))
        build(f"{url}/photos.tar", tmp_path / "of-tar")
        assert contents(tmp_path / "of-tar") == contents(root / "set")
        build(f"{url}/photos", tmp_path / "of-folder")
        build(root / "photos", tmp_path / "of-local-folder")
        assert tars_of(tmp_path / "of-folder") == tars_of(tmp_path / "of-local-folder")
        there = run("-c", BATCHES, f"{url}/set", tmp_path / "cache")
        assert there.stdout == run("-c", BATCHES, root / "set").stdout


def test_without_ranges_sets_are_read_all_the_same(root, tmp_path, monkeypatch):
    (port,) = free_ports(1)
    url = f"https://127.0.0.1:{port}"
    with serving(nginx(root, tmp_path, port, "max_ranges 0;"), tmp_path / "log", port):
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.crt"))
        refused = build(f"{url}/photos.tar", tmp_path / "none", check=False)
        assert refused.returncode == 1
        assert "sends the whole file where a part was asked for; copy it here" in refused.stderr
        there = run("-c", BATCHES, f"{url}/set", tmp_path / "cache")
        assert there.stdout == run("-c", BATCHES, root / "set").stdout
