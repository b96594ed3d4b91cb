"""Sources and finished sets in stores: a real S3 server and a real web server on loopback."""

import errno
import http.server
import io
import os
import re
import shutil
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import archives
import fsspec
import numpy as np
import pytest
from archives import picture, tar_bytes
from conftest import contents, settings
from stores import s3_server
from test_many_parts import write_parquet

from preprocess import Rejected, build_shards, open_source
from shards import spec
from shards.remote import retry
from shards.remote.copy import copy_set
from shards.verification import verify_shards

MEMBERS = [(f"{c}/{n}.jpg", picture(n)) for n, c in enumerate("aabbbcc")]


@pytest.fixture(autouse=True)
def soon_again(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The client of an S3 server with an empty bucket."""
    with s3_server(tmp_path_factory.mktemp("s3")):
        client = fsspec.filesystem("s3", skip_instance_cache=True)
        client.mkdir("bucket")
        yield client


class Ranged(http.server.SimpleHTTPRequestHandler):
    """Python's file server with ranges, which it lacks; every `fails`-th request gets a 503."""

    fails, seen, ranges = 0, 0, True
    resets: tuple[str, ...] = ()  # paths; for each its next request is cut off

    def send_head(self):
        type(self).seen += 1
        if self.fails and self.seen % self.fails == 0:
            return self.send_error(503)
        if self.path in self.resets:
            left = list(self.resets)
            left.remove(self.path)
            type(self).resets, self.close_connection = tuple(left), True
            hard = struct.pack("ii", 1, 0)  # a reset, no orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, hard)
            for one in (self.wfile, self.rfile, self.connection):
                one.close()
            self.wfile = io.BytesIO()
            return None
        match = re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if not match or not self.ranges or not os.path.isfile(path):
            return super().send_head()
        size = os.path.getsize(path)
        start, end = int(match[1]), min(int(match[2] or size), size - 1)
        if start >= size:
            return self.send_error(416)
        file = open(path, "rb")  # noqa: SIM115
        file.seek(start)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        self.left = end - start + 1
        return file

    def copyfile(self, source, outputfile):
        left, self.left = getattr(self, "left", None), None
        outputfile.write(source.read() if left is None else source.read(left))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tmp_path):
    """(its URL, its folder, its handler) of a web server of files."""
    root = tmp_path / "www"
    root.mkdir()
    handler = type("Handler", (Ranged,), {})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *a: handler(*a, directory=str(root))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root, handler
    server.shutdown()
    server.server_close()


def tars_of(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".tar")}


@pytest.fixture
def local(tmp_path):
    """The images as a folder and as a tar, and the shards built from them here."""
    archives.unpack(MEMBERS, tmp_path / "photos")
    (tmp_path / "photos.tar").write_bytes(tar_bytes(MEMBERS))
    for name in ("photos", "photos.tar"):
        build_shards(open_source(str(tmp_path / name)), tmp_path / f"of-{name}", settings(), 1)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "jobs"),
    [("photos", 1), ("photos.tar", 1), pytest.param("photos", 2, marks=pytest.mark.slow)],
)
def test_shards_from_s3_are_those_from_the_local_path(name, jobs, s3, local):
    there = f"bucket/in{jobs}/{name}"
    s3.put(str(local / name), there, recursive=True)
    source = open_source(f"s3://{there}")
    assert len(source.entries) == 7
    build_shards(source, local / "remote", settings(), jobs)
    assert tars_of(local / "remote") == tars_of(local / f"of-{name}")
    if name == "photos.tar":  # nothing of the place is in the description
        assert contents(local / "remote") == contents(local / "of-photos.tar")
    before = source.description()
    assert open_source(f"s3://{there}").description() == before
    s3.rm(there, recursive=name == "photos")
    with pytest.raises(Rejected, match="vanished"):
        source.read(source.entries[0])
    # SeaweedFS keeps a folder that has become empty.
    with pytest.raises(ValueError, match=rf"no (source at|images under) s3://{there}"):
        open_source(f"s3://{there}")


@pytest.mark.parametrize("name", ["photos", "photos.tar"])
def test_shards_from_a_web_server_that_fails_now_and_then(name, web, local):
    url, root, handler = web
    (local / name).rename(root / name)
    source = open_source(f"{url}/{name}")
    handler.fails = 3
    build_shards(source, local / "remote", settings(), 1)
    assert tars_of(local / "remote") == tars_of(local / f"of-{name}")


def test_a_listing_cut_short_is_asked_for_again_and_leaves_nothing_out(web, local):
    url, root, handler = web
    (local / "photos").rename(root / "photos")
    whole = open_source(f"{url}/photos")
    handler.resets = ("/photos/b/", "/photos/c/5.jpg") * 4  # aiohttp asks twice itself
    again = open_source(f"{url}/photos")
    assert not handler.resets
    assert again.entries == whole.entries


@pytest.mark.parametrize("status", [403, 500])
def test_a_web_server_that_answers_with_an_error_is_not_taken_for_an_empty_one(
    status, web, local, monkeypatch
):
    monkeypatch.setattr(retry, "PATIENCE", 1)
    url, _, handler = web
    handler.send_head = lambda self: self.send_error(status)
    with pytest.raises((ValueError, OSError), match=r"no access to|could not be reached for 1 s"):
        open_source(f"{url}/photos")


def test_layouts_are_found_in_stores_too(s3, web, tmp_path):
    images = archives.imagenet_images()
    tar = archives.imagenet_tar(tmp_path / "ILSVRC2012_img_train.tar", images)
    s3.put(str(tar), "bucket/imagenet/ILSVRC2012_img_train.tar")
    here, there = (
        open_source(f"imagenet:{place}", partial=True) for place in (tar, "s3://bucket/imagenet")
    )
    assert there.description() == here.description()
    last = there.entries[-1]
    assert there.read(last) == here.read(last)
    url, root, _ = web
    archives.inaturalist(root / "inat")
    archives.packed(archives.cifar10_python(), root / "cifar-10-python.tar.gz")
    write_parquet(root / "data" / "train-0.parquet", [({"bytes": picture(0), "path": "p"}, 0)])
    (root / "wds").mkdir()
    (root / "wds" / "0.tar").write_bytes(tar_bytes([("a.jpg", picture(5)), ("a.cls", b"1")]))
    for name, count in {
        "inaturalist:{}/inat": 5,
        "cifar10:{}/cifar-10-python.tar.gz": 20,
        "parquet:{}/data/": 1,
        "webdataset:{}/wds": 1,
    }.items():
        source = open_source(name.format(url), partial=True)
        assert len(source.entries) == count
        assert source.read(source.entries[0])


def test_finished_sets_in_a_store_are_left_out(web, local):
    url, root, _ = web
    (local / "photos").rename(root / "photos")
    before = open_source(f"{url}/photos")
    (local / "of-photos" / "fidelity.png").write_bytes(picture(0))
    shutil.copytree(local / "of-photos", root / "photos" / "deep" / "demo-fast")
    (root / "photos" / "app").mkdir()
    (root / "photos" / "app" / "manifest.json").write_text("{}")
    after = open_source(f"{url}/photos")
    assert after.sets == ("deep/demo-fast",)
    assert {entry.name for entry in after.entries} == {entry.name for entry in before.entries}
    assert after.ignored == before.ignored + 1
    with pytest.raises(ValueError, match="is a finished set of shards"):
        open_source(f"{url}/photos/deep/demo-fast")


def test_a_store_that_is_gone_stops_the_build_in_one_line(web, local, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "PATIENCE", 1)
    url, root, handler = web
    (local / "photos").rename(root / "photos")
    source = open_source(f"{url}/photos")
    handler.fails = 1  # every request
    with pytest.raises(OSError, match="could not be reached for 1 s") as caught:
        build_shards(source, tmp_path / "out", settings(), 1, max_rejected=1)
    assert "\n" not in str(caught.value)
    handler.fails = 0
    build_shards(source, tmp_path / "out", settings(), 1)
    assert tars_of(tmp_path / "out") == tars_of(local / "of-photos")
    with socket.socket() as deaf:  # bound, so nobody else gets the port
        deaf.bind(("127.0.0.1", 0))
        with pytest.raises((ValueError, OSError), match=r"no source at|could not be reached"):
            open_source(f"http://127.0.0.1:{deaf.getsockname()[1]}/x")


def test_a_server_without_ranges_is_refused_for_tars(web, local):
    url, root, handler = web
    (local / "photos.tar").rename(root / "photos.tar")
    source = open_source(f"{url}/photos.tar")
    handler.ranges = False
    with pytest.raises(OSError, match="sends the whole file where a part was asked for"):
        source.read(source.entries[0])


def test_protocols_and_missing_clients_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"nonsense://x: .*give s3://"):
        open_source("nonsense://x")
    monkeypatch.setitem(__import__("sys").modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"pip install '.\[remote\]'"):
        open_source("s3://bucket/x")


def test_pauses_grow_until_patience_ends_and_refusals_are_not_repeated(monkeypatch, caplog):
    now, calls = [1000.0], []
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retry.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def failing(error):
        calls.append(now[0])
        raise error

    with pytest.raises(ConnectionError, match=r"u could not be reached for 20 s .*: reset"):
        retry.retried("u", lambda: failing(ConnectionError("reset")), patience=20)
    pauses = np.diff(calls)
    assert pauses == pytest.approx([0.01 * 2**n for n in range(10)], abs=0.15)
    assert [record.getMessage() for record in caplog.records] == [
        "u: ConnectionError: reset; trying again"
    ]
    calls.clear()
    for error, kind in {
        PermissionError("denied"): ValueError,
        FileNotFoundError("gone"): FileNotFoundError,
        IsADirectoryError("a folder"): ValueError,
        OSError(errno.ENOSPC, "full"): OSError,
    }.items():
        with pytest.raises(kind, match=error.strerror or str(error)):
            retry.retried("u", lambda error=error: failing(error))
    assert len(calls) == 4


def test_an_outage_is_told_once_by_all_who_meet_it(monkeypatch, caplog):
    urls = [f"s3://bucket/{number}" for number in range(8)]
    tried = dict.fromkeys(urls, 0)

    def call(url):
        tried[url] += 1
        if min(tried.values()) < 2:  # until each has failed, and said so if it was the first
            raise ConnectionError("away")
        return url

    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda url: retry.retried(url, lambda: call(url)), urls)
        assert list(found) == urls
    first, last = (record.getMessage() for record in caplog.records)
    assert first.endswith("ConnectionError: away; trying again")
    assert last == "s3://bucket answers again"


def test_nobody_waiting_has_all_the_patience(monkeypatch):
    now, tries = [1000.0], []
    monkeypatch.setattr(retry.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retry.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))

    def away():
        tries.append(now[0])
        if now[0] < 1500:
            raise ConnectionError("away")
        return "there"

    assert retry.retried("u", away, patience=40, needed=lambda: now[0] > 1490) == "there"
    now[0] = 1000.0
    with pytest.raises(ConnectionError, match="for 20 s"):
        retry.retried("u", away, patience=20, needed=lambda: now[0] > 1100)
    assert 1110 < now[0] < 1140


def test_a_copy_goes_there_and_back_and_is_the_same(s3, web, local, tmp_path):
    url, root, _ = web
    built, there = local / "of-photos", "s3://bucket/copy/set"
    assert copy_set(str(built), there)[1] == 4
    assert copy_set(there, str(tmp_path / "back"))[1] == 4
    assert contents(tmp_path / "back") == contents(built)
    assert verify_shards(tmp_path / "back", "decode") == []
    assert copy_set(there, str(tmp_path / "back"))[1] == 0
    assert copy_set(str(built), there)[1] == 0
    assert copy_set(there, "s3://bucket/copy/twin")[1] == 4
    assert sorted(s3.ls("bucket/copy/twin")) == sorted(
        name.replace("/set/", "/twin/") for name in s3.ls("bucket/copy/set")
    )
    built.rename(root / "set")
    assert copy_set(f"{url}/set", str(tmp_path / "web"))[1] == 4
    assert contents(tmp_path / "web") == contents(root / "set")


def test_an_interrupted_copy_goes_on_and_others_are_refused(s3, local, tmp_path, monkeypatch):
    built, there = local / "of-photos", "s3://bucket/broken/set"
    real, done = retry.retried, []

    def stopping(url, call):
        url = str(url)
        if url.endswith("shard-000001.tar"):
            raise KeyboardInterrupt
        done.append(url)
        return real(url, call)

    for target in (there, str(tmp_path / "here")):
        monkeypatch.setattr("shards.remote.place.retried", stopping)
        monkeypatch.setattr(
            "shards.remote.copy._fetch",
            lambda place, name, path: stopping(
                name, lambda: path.write_bytes((built / name).read_bytes())
            ),
        )
        with pytest.raises(KeyboardInterrupt):
            copy_set(str(built), target, jobs=1)
        monkeypatch.undo()
        with pytest.raises(ValueError, match="holds another set of shards, or part of one"):
            copy_set(str(local / "of-photos.tar"), target)
        if "://" not in target:
            (tmp_path / "here" / "shard-000001.tar.0123456789ab.tmp").write_bytes(b"left by a kill")
        _, copied = copy_set(str(built), target)
        assert 0 < copied < 4
        with pytest.raises(ValueError, match="holds another set of shards"):
            copy_set(str(local / "of-photos.tar"), target)
    assert contents(tmp_path / "here") == contents(built)
    s3.pipe_file("bucket/other/x", b"x")
    (local / "photos" / "draft.tmp").write_text("theirs")
    for target, words in {
        "s3://bucket/other": "holds something else (x)",
        str(local / "photos"): "holds something else (a)",
        "https://x/y": "a web server takes no files",
    }.items():
        with pytest.raises(ValueError, match=re.escape(words)):
            copy_set(str(built), target)
    assert {p.name for p in (local / "photos").iterdir()} == {"a", "b", "c", "draft.tmp"}


def test_a_copy_stays_one_after_fidelity_and_its_damage_is_mended(s3, local, tmp_path):
    built, there, url = local / "of-photos", tmp_path / "copy", "s3://bucket/measured"
    for target in (str(there), url):
        assert copy_set(str(built), target)[1] == 4
    manifest = spec.load(built)
    measured = {"temperature": 0.25, "w_ps": 8, "detectors": {}}
    spec.write(built, replace(manifest, fidelity=measured))
    for target in (str(there), url):
        assert copy_set(str(built), target)[1] == 0
    shard = there / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    assert copy_set(str(built), str(there))[1] == 1
    assert shard.read_bytes() == whole
    assert spec.load(there).fidelity == {}  # what is measured of a copy stays its own
    assert not (there / "copying.json").exists()


def test_a_damaged_set_is_not_copied_as_finished(s3, local):
    built = local / "of-photos"
    data = bytearray((built / "shard-000001.tar").read_bytes())
    data[700] ^= 1
    (built / "shard-000001.tar").write_bytes(data)
    for target in ("s3://bucket/damaged", str(local / "damaged")):
        with pytest.raises(ValueError, match=r"of-photos/shard-000001.tar is damaged: its sha256"):
            copy_set(str(built), target)
    assert not s3.exists("bucket/damaged/manifest.json")
    assert not (local / "damaged" / "manifest.json").exists()
    (built / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"shard-000001.tar is missing, the manifest lists it"):
        copy_set(str(built), str(local / "damaged"))
