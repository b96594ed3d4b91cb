"""Sets in real stores: the same batches as from disk, whatever happens to server and cache."""

import contextlib
import fcntl
import os
import pickle
import subprocess
import sys
import threading
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import settings
from stores import HttpStore, S3Store

import shards
from preprocess import build_shards, open_source
from shards import ShardSet
from shards.loader import Loader
from shards.order import Plan, Windows
from shards.spec import to_json

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_images):
    """80 records in 20 shards."""
    root = tmp_path_factory.mktemp("source")
    (root / "class").mkdir()
    for number, image in enumerate(demo_images[:80]):
        cv2.imwrite(str(root / "class" / f"{number:03d}.jpg"), cv2.resize(image, (96, 80)))
    build_shards(open_source(str(root)), root.with_name("set"), settings(frame=120, crop=96), 1)
    return root.with_name("set")


@pytest.fixture
def http(folder, tmp_path):
    store = HttpStore(folder, tmp_path / "http.log")
    yield store
    store.kill()


@pytest.fixture(scope="module")
def s3(folder, tmp_path_factory):
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    store = S3Store(folder, tmp_path_factory.mktemp("s3") / "log")
    yield store
    store.kill()


@pytest.fixture
def s3_client(s3, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield s3
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def plan_of(records, window=4, batch=8, seed=3):
    windows = Windows([shard.count for shard in records.shards], window, seed)
    return Plan(len(records), batch, seed, windows=windows)


def equal(a, b):
    def same(x, y):
        if isinstance(x, dict):
            return x.keys() == y.keys() and all(np.array_equal(x[name], y[name]) for name in x)
        return np.array_equal(x, y)

    return all(map(same, a, b))


def compare(records, local, first=0, last=25, window=4, each=lambda step: None, **options):
    """Whether all batches of two and a half epochs are those of the local set."""
    plan = plan_of(local, window)
    theirs = Loader(local, plan, first, last, **options)
    for step, (a, b) in enumerate(
        zip(theirs, Loader(records, plan, first, last, **options), strict=True), first
    ):
        assert equal(a, b), step
        each(step)


READ = """
import sys
import shards
from shards.loader import Loader
from shards.order import Plan, Windows

records = shards.open(sys.argv[1], cache=sys.argv[2])
plan = Plan(80, 8, windows=Windows([4] * 20, 4, 0))
print(sum(len(b.samples) for b in Loader(records, plan, 0, 20, rank=int(sys.argv[3]), ranks=2)))
"""


def bytes_of(cache):
    total = 0
    for path in cache.glob("kamim-*/*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_processes_read_what_the_loader_holds_of_the_cache(http, folder, tmp_path):
    """Fetched and kept by the loader, opened by its processes, below a limit that evicts."""
    local, cache = ShardSet(folder), tmp_path / "cache"
    largest = max(shard.bytes for shard in local.shards)
    limit = 8 * largest + local.manifest.index.bytes
    records = shards.open(http.url, cache=cache, cache_limit=limit)
    plan = plan_of(local)
    theirs = records.loader(plan, 0, 25, workers=2, processes=True)
    for a, b in zip(local.loader(plan, 0, 25), theirs, strict=True):
        assert equal(a, b)
    assert bytes_of(cache) <= limit


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", [{}, {"workers": 2, "processes": True}])
def test_of_several_sets_those_elsewhere_are_fetched_window_by_window(
    how, http, folder, small_source, tmp_path
):
    """Each set's windows go on at the pace of its share, below a limit that evicts."""
    build_shards(open_source(str(small_source)), tmp_path / "b", settings(frame=120, crop=96), 1)
    local, cache = shards.open([folder, tmp_path / "b"], shares=[3, 1]), tmp_path / "cache"
    remote = local.sets[0]
    limit = 8 * max(shard.bytes for shard in remote.shards) + remote.manifest.index.bytes
    where = [http.url, tmp_path / "b"]
    records = shards.open(where, shares=[3, 1], cache=cache, cache_limit=limit)
    plan = local.plan(8, 3, window=4)
    theirs = records.loader(plan, 3, 47, maps=["fast"], **how)
    for a, b in zip(local.loader(plan, 3, 47, maps=["fast"]), theirs, strict=True):
        assert equal(a, b)
        assert bytes_of(cache) <= limit
    wide = records.plan(8, 3)
    with pytest.raises(ValueError, match="is too small: a window of 20 shards"):
        records.loader(wide)
    with pytest.raises(ValueError, match=r"by a plan of their own: records.plan\(batch, seed\)"):
        records.loader(Plan(120, 8))


@pytest.mark.parametrize(("room", "fetches"), [(8, 84), (13, 50)])
def test_batches_are_those_of_the_local_set_and_the_limit_is_kept(
    room, fetches, http, folder, tmp_path
):
    local, cache = ShardSet(folder), tmp_path / "cache"
    largest = max(shard.bytes for shard in local.shards)
    limit = room * largest + local.manifest.index.bytes
    records = shards.open(http.url, cache=cache, cache_limit=limit)
    assert len(records) == 80
    most, ended = [0], threading.Event()

    def watch():
        while not ended.wait(0.002):
            with (cache / ".lock").open("a") as file:  # a moment in which no file comes or goes
                fcntl.flock(file, fcntl.LOCK_EX)
                most.append(bytes_of(cache))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        compare(records, local, 5, 45, workers=3)
    finally:
        ended.set()
        watcher.join()
    assert max(most) <= limit
    assert max(most) > 6 * largest
    # 84 reads of 20 shards. With room for 13, evicting the least recently used would fetch about
    # 60 (0.65 + 0.35 ln 0.35 of them would be there); evicting those read last, less.
    assert http.asked("shard-") <= fetches


def test_whatever_the_process_and_the_cache_a_shard_comes_once(http, folder, tmp_path):
    local = ShardSet(folder)

    command = [sys.executable, "-c", READ, http.url, str(tmp_path / "cache")]
    processes = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE) for rank in "01"]
    assert [int(process.communicate()[0]) for process in processes] == [80, 80]
    assert http.asked("shard-") == 20
    compare(shards.open(http.url, cache=tmp_path / "cache"), local)  # warm
    assert http.asked("shard-") == 20
    assert http.asked("index.npy") == 1


def test_a_server_that_is_away_for_a_moment_changes_nothing(http, folder, tmp_path, caplog):
    local = ShardSet(folder)
    records = shards.open(http.url, cache=tmp_path / "cache")

    def said(words):
        return any(words in record.getMessage() for record in caplog.records)

    def back():
        while not said("trying again"):
            time.sleep(0.01)
        http.start()

    def outage(step):
        if step == 3:
            http.kill()
            threading.Thread(target=back, daemon=True).start()

    compare(records, local, each=outage)
    assert http.asked("shard-") >= 20
    assert said("answers again")


def test_a_server_that_stays_away_is_one_line_after_a_stated_time(http, folder, tmp_path):
    records = shards.open(http.url, cache=tmp_path / "cache", patience=0.5)
    begin = None
    words = r"could not be reached for 0.5 s .*once the store is back, the same command goes on"
    with pytest.raises(ConnectionError, match=words):  # noqa: PT012
        for _ in Loader(records, plan_of(records), 0, 100):
            if begin is None:
                http.kill()
                begin = time.monotonic()
    assert time.monotonic() - begin < 60  # not the default of 300
    assert threading.active_count() < 20
    assert not list((tmp_path / "cache").glob("kamim-*/*.part"))


def test_what_is_damaged_or_half_there_is_fetched_again(http, folder, tmp_path):
    local, cache = ShardSet(folder), tmp_path / "cache"
    (found,) = {shards.open(http.url, cache=cache).folder}
    compare(shards.open(http.url, cache=cache), local, last=10)
    damaged = bytearray((found / "shard-000003.tar").read_bytes())
    damaged[700] ^= 1
    (found / "shard-000003.tar").write_bytes(damaged)
    (found / "shard-000004.tar").write_bytes(b"short")
    (found / "shard-000005.tar").unlink()
    size = local.shards[5].bytes
    (found / f"shard-000005.tar.{size}.part").write_bytes(b"\0" * size)  # of a killed process
    compare(shards.open(http.url, cache=cache), local)
    for name in ("shard-000003.tar", "shard-000004.tar", "shard-000005.tar"):
        assert http.asked(name) == 2
        assert (found / name).read_bytes() == (folder / name).read_bytes()
    assert not list(found.glob("*.part"))


def test_what_is_held_is_not_evicted_and_other_sets_go_first(http, folder, tmp_path):
    local, cache = ShardSet(folder), tmp_path / "cache"
    compare(shards.open(http.url, cache=cache), local, last=10)
    other = cache / f"kamim-{0:032x}" / "shard-000000.tar"
    other.parent.mkdir()
    other.write_bytes(b"\0" * 100_000)
    os.utime(other, (0, 0))
    (cache / "mine.tar").write_bytes(b"\0" * 100_000)  # a user's own, in the wrong place
    limit = bytes_of(cache) - 100_000
    records = shards.open(http.url, cache=cache, cache_limit=limit)
    held = records.hold(0)
    (records.folder / "shard-000001.tar").unlink()
    records.hold(1)
    assert not other.exists()
    assert sum(path.name.startswith("shard-") for path in records.folder.iterdir()) == 20
    records.copies.limit = 1
    (records.folder / "shard-000001.tar").unlink()
    second = records.hold(1)
    names = {path.name for path in records.folder.iterdir()}
    assert names == {"index.npy", "shard-000000.tar", "shard-000001.tar"}
    assert (cache / "mine.tar").exists()
    assert os.pread(held.descriptor, 512, 0) == (folder / "shard-000000.tar").read_bytes()[:512]
    del second


def test_a_set_elsewhere_is_read_by_number_and_in_order(http, folder, tmp_path):
    local = ShardSet(folder)
    records = shards.open(http.url, cache=tmp_path / "cache", cache_limit=1)
    assert records[17].frame == local[17].frame
    assert sum(path.suffix == ".tar" for path in records.folder.iterdir()) == 1
    plan = Plan(80, 16, in_order=True)
    for a, b in zip(Loader(local, plan, 0, 5), Loader(records, plan, 0, 5), strict=True):
        assert equal(a, b)


def test_a_set_elsewhere_travels_to_a_process_and_holds_files_of_its_own(http, folder, tmp_path):
    records = shards.open(http.url, cache=tmp_path / "cache")
    again = pickle.loads(pickle.dumps(records))
    assert again.held.descriptor != records.held.descriptor
    assert again[17].frame == ShardSet(folder)[17].frame
    del again
    os.fstat(records.held.descriptor)  # raises if it was closed


def signed(folder, target, **changes):
    """A copy of the set's manifest with other facts, signed."""
    target.mkdir()
    manifest = ShardSet(folder).manifest
    (target / "manifest.json").write_bytes(to_json(replace(manifest, **changes)))
    (target / "index.npy").write_bytes((folder / "index.npy").read_bytes())
    return target


def test_a_store_that_has_another_file_than_the_manifest_says(folder, tmp_path):
    files = list(ShardSet(folder).shards)
    bad = signed(folder, tmp_path / "bad", shards=files)
    for shard in files[1:]:
        (bad / shard.name).write_bytes(b"x" + (folder / shard.name).read_bytes()[1:])
    store = HttpStore(bad, tmp_path / "log")
    try:
        records = shards.open(store.url, cache=tmp_path / "cache")
        with pytest.raises(ValueError, match=r"http.*/shard-000000.tar is not there .*restore it"):
            records.hold(0)
        with pytest.raises(ValueError, match=r"http.*/shard-0000.*.tar is damaged: its sha256"):
            list(Loader(records, plan_of(records, window=1), 0, 10))
        assert not list(records.folder.glob("shard-*"))
    finally:
        store.kill()


def test_what_cannot_be_read_is_one_clear_line(http, folder, tmp_path, monkeypatch):
    for url, words in {
        f"{http.url}/nowhere": r"/nowhere/manifest.json is not there .*no finished set",
        "http://user:secret@127.0.0.1/set": r"may hold no password",
        "https://127.0.0.1/set?X-Amz-Signature=secret": r"may hold no password or signature",
        "s3://": r"s3:// names no place",
        "gopher://bucket/set": r"gopher://bucket/set: .*give s3://",
    }.items():
        with pytest.raises(ValueError, match=words) as raised:
            shards.open(url, cache=tmp_path / "cache")
        assert "secret" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ValueError, match=r"gs://bucket/set needs gcsfs; type, .*pip install '.\[remote\]'"
    ):
        shards.open("gs://bucket/set", cache=tmp_path / "cache")
    ffcv = signed(folder, tmp_path / "ffcv", container="ffcv")
    with pytest.raises(
        ValueError,
        match="is no set of WebDataset shards, and is read from local files only; copy it",
    ):
        shards.open(f"file://{ffcv}", cache=tmp_path / "cache")
    records = shards.open(http.url, cache=tmp_path / "cache", cache_limit=200_000)
    with pytest.raises(ValueError, match=r"too small: a window of 8 .*--window [1-7]$"):
        Loader(records, plan_of(records, window=8), 0, 1)


def test_s3_gives_the_same_batches(s3_client, folder, tmp_path):
    compare(shards.open(s3_client.url, cache=tmp_path / "cache"), ShardSet(folder), 0, 12)
    for url, words in {
        "s3://no-such-bucket/set": r"manifest.json is not there .*no finished set",
        "s3://bucket/elsewhere": r"manifest.json is not there",
        "s3://no bucket!/set": r"cannot be used .*Invalid bucket name",
    }.items():
        with pytest.raises(ValueError, match=words):
            shards.open(url, cache=tmp_path / "cache")


def test_s3_without_credentials_is_one_clear_line(s3_client, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(ValueError, match=r"no access to s3://.*credentials.*environment"):
        shards.open(s3_client.url, cache=tmp_path / "cache")


@pytest.mark.slow
def test_an_s3_server_killed_for_five_seconds_in_an_epoch_loses_nothing(
    s3_client, folder, tmp_path
):
    killed = []

    def outage(step):
        if step == 13 and not killed:
            s3_client.kill()
            killed.append(time.monotonic())
            threading.Timer(5, s3_client.start).start()

    limit = 9 * max(shard.bytes for shard in ShardSet(folder).shards)
    records = shards.open(s3_client.url, cache=tmp_path / "cache", cache_limit=limit + 100_000)
    compare(records, ShardSet(folder), last=40, each=outage)
    assert time.monotonic() - killed[0] > 5


@pytest.mark.slow
def test_killed_and_resumed_from_s3_losses_are_those_of_a_calm_local_run(
    s3_client, folder, tmp_path, monkeypatch
):
    pytest.importorskip("torch")
    from train.metrics import read_metrics

    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def losses(out):
        return [row["loss"] for row in read_metrics(out)]

    def command(where, out, *more):
        line = [sys.executable, "-m", "kamim", "pretrain", str(where), "--out", str(out)]
        line += ["--recipe", "small", "--batch", "8", "--epochs", "2", "--device", "cpu"]
        return [*line, "--log-every", "1", "--save-every", "3", "--window", "4", *more]

    subprocess.run(command(folder, tmp_path / "calm"), check=True, capture_output=True)
    size = max(shard.bytes for shard in ShardSet(folder).shards)
    more = ["--cache", str(tmp_path / "cache"), "--cache-limit", str(10 * size)]
    out = tmp_path / "killed"
    for goal in (3, 8):
        line = command(s3_client.url, out, *more, "--resume")
        process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        while len(read_metrics(out)) < goal and process.poll() is None:
            time.sleep(0.005)
        process.kill()
        process.wait()
    other = command(s3_client.url, out, *more, "--resume", "--window", "3")
    refused = subprocess.run(other, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "window was 4, is 3" in refused.stderr
    subprocess.run(command(s3_client.url, out, *more, "--resume"), check=True)
    assert losses(out) == losses(tmp_path / "calm")
    assert len(losses(out)) == 20
    assert bytes_of(tmp_path / "cache") <= 10 * size


def test_pretraining_from_a_url_asks_for_a_cache(folder, tmp_path):
    pytest.importorskip("torch")
    from train.recipes import find_recipe
    from train.request import Run
    from train.setup import open_records

    common = {"out": tmp_path / "out", "recipe": find_recipe("small")}
    with pytest.raises(ValueError, match="s3://b/set needs a cache: a folder"):
        open_records(Run(shards="s3://b/set", **common))
    with pytest.raises(ValueError, match="is read where it is"):
        open_records(Run(shards=folder, cache=tmp_path, **common))


def test_sizes_as_people_write_them():
    from train.cli import parse_bytes

    sizes = {"0": 0, "200GB": 200e9, "1.5 TiB": 1.5 * 2**40, "7kb": 7000, "3M": 3e6, "12": 12}
    for text, size in sizes.items():
        assert parse_bytes(text) == size
    for text in ("", "GB", "1 Gb/s", "-3", "1iB"):
        with pytest.raises(ValueError, match="is no size"):
            parse_bytes(text)
