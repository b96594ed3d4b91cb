"""Densities without frames: the same bytes whatever happens, found by the sources' own names."""

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from conftest import REPOSITORY, contents, settings
from typed import kamim

import preprocess
import shards
from preprocess import build_shards, open_source
from preprocess.repair import repair_shards
from shards import ShardSet
from shards.beton import convert_to_ffcv
from shards.names import Names, lists_of, webdataset_key
from shards.record import npy_bytes
from shards.verification import verify_shards

TWO = tuple(preprocess.detector_settings(name) for name in ("fast", "orb"))


def bare(**changes):
    return settings(frame=0, quality=0, detectors=TWO, **changes)


@pytest.fixture
def made(small_source, tmp_path):
    """A maps set of a folder, with one input that was rejected."""
    (small_source / "class1" / "000.jpg").write_bytes(b"no picture")
    build_shards(open_source(str(small_source)), tmp_path / "maps", bare(), 1, max_rejected=1)
    return tmp_path / "maps"


@pytest.fixture
def framed(made, small_source, tmp_path):
    """The records of shards with frames, of the same source and settings."""
    chosen = settings(detectors=TWO)
    build_shards(open_source(str(small_source)), tmp_path / "framed", chosen, 1, max_rejected=1)
    records = ShardSet(tmp_path / "framed")
    return [records[n] for n in range(len(records))]


def test_each_density_is_that_of_shards_with_frames(made, framed):
    records = shards.open(made)
    assert len(records) == len(framed) == 40
    for number, record in enumerate(framed):
        for name, density in record.maps.items():
            for key in (record.source, int(record.key)):
                np.testing.assert_array_equal(records.density(key, name), density)
        mine = records[number]
        assert (mine.frame, mine.source, mine.label) == (b"", record.source, record.label)
        assert (mine.height, mine.width, mine.key) == (record.height, record.width, record.key)
    names = [record.source for record in framed[::-3]]
    together = records.densities(names, "orb")
    np.testing.assert_array_equal(together, [r.maps["orb"] for r in framed[::-3]])
    assert together.flags.writeable
    assert any(record.maps["orb"].any() for record in framed)


def test_numpy_alone_reads_them(made):
    manifest = json.loads((made / "manifest.json").read_text())
    names = [json.loads(line) for line in (made / "names.jsonl").open()]
    blocks = np.concatenate([np.load(made / shard["name"]) for shard in manifest["shards"]])
    assert blocks.shape == (40, 2, 16, 16)
    for name, (_, orb) in zip(names, blocks, strict=True):
        np.testing.assert_array_equal(shards.open(made).density(name, "orb"), orb)


def test_what_there_is_not_is_told_in_a_line(made, small_source):
    records = shards.open(made)
    rejected = [line["source"] for line in map(json.loads, (made / "rejected.jsonl").open())]
    (gone,) = rejected
    number = [e.name for e in open_source(str(small_source)).entries].index(gone)
    for name, words in (
        (gone, rf"no density of '{gone}': it was rejected .* or names are others, as 'class0/"),
        ("class0/none.jpg", "no density of 'class0/none.jpg'"),
        (number, f"no density of input {number}"),
        (41, "no density of input 41"),
        (-1, "no density of input -1"),
    ):
        with pytest.raises(shards.UserError, match=words):
            records.density(name, "fast")
    with pytest.raises(shards.UserError, match="no maps of 'sift', only of fast, orb"):
        records.density(0, "sift")


def test_densities_are_of_names_or_whole_numbers(made):
    records = shards.open(made)
    with pytest.raises(shards.UserError, match="densities is for several names, not 'class0"):
        records.densities("class0/000.jpg", "fast")
    with pytest.raises(TypeError):
        records.density(1.5, "fast")


def test_frames_are_refused_in_a_line(made, tmp_path):
    records = shards.open(made)
    for use in (
        lambda: next(records.batches(weights="fast", batch=4, size=64, device="cpu")),
        lambda: records.loader(shards.Plan(len(records), 4)),
        lambda: convert_to_ffcv(made, tmp_path / "ffcv"),
        lambda: open_source(f"shards:{made}"),
    ):
        with pytest.raises(shards.UserError, match=r"without frames|holds no frames"):
            use()
    done = kamim("pretrain", made)
    assert done.returncode == 2
    assert "holds densities without frames" in done.stderr


def test_sets_with_frames_have_no_names(small_source, tmp_path):
    build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 1)
    with pytest.raises(shards.UserError, match=r"has no list of names.*kamim maps build"):
        shards.open(tmp_path / "out").density("class0/000.jpg", "fast")
    assert "names" not in json.loads((tmp_path / "out" / "manifest.json").read_text())


def _sum_in_a_process(records, names):
    return int(records.densities(names, "fast").sum(dtype=int))


def test_from_any_process_or_thread(made, framed):
    records, names = shards.open(made), [record.source for record in framed]
    wanted = sum(int(record.maps["fast"].sum(dtype=int)) for record in framed)
    records.density(names[0], "fast")  # its files are open when the processes begin
    assert len(pickle.dumps(records)) < 1000
    for pool in (ThreadPoolExecutor(4), ProcessPoolExecutor(2)):
        with pool:
            tasks = [pool.submit(_sum_in_a_process, records, names) for _ in range(4)]
            assert {task.result() for task in tasks} == {wanted}


def test_the_same_bytes_for_any_number_of_jobs(small_source, tmp_path):
    source = open_source(str(small_source))
    for jobs in (1, 2, 3):
        build_shards(source, tmp_path / str(jobs), bare(), jobs)
    one = contents(tmp_path / "1")
    assert len(one) == 10 + 6
    assert one == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_the_same_bytes_on_dask(small_source, tmp_path):
    pytest.importorskip("distributed")
    source = open_source(str(small_source))
    build_shards(source, tmp_path / "loky", bare(), 1)
    build_shards(source, tmp_path / "dask", bare(), 2, backend="dask")
    assert contents(tmp_path / "dask") == contents(tmp_path / "loky")


def test_the_same_bytes_on_ray(small_source, tmp_path):
    pytest.importorskip("ray")
    source = open_source(str(small_source))
    build_shards(source, tmp_path / "loky", bare(), 1)
    build_shards(source, tmp_path / "ray", bare(), 2, backend="ray")
    assert contents(tmp_path / "ray") == contents(tmp_path / "loky")


@pytest.mark.parametrize("count", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_the_same_bytes_after_kills(count, small_source, tmp_path):
    """SIGKILL to the whole build some shards into its work, the same command again after each."""
    out = tmp_path / "out"
    build_shards(open_source(str(small_source)), tmp_path / "calm", bare(shard_size=2), 1)
    command = [sys.executable, "-m", "kamim", "maps", "build", str(small_source), str(out)]
    command += ["--detector", "fast,orb", "--crop", "64", "--map-crops", "1", "--grid", "16"]
    command += ["--shard-size", "2", "--jobs", "2"]
    slow = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/tests/slow_build:{REPOSITORY}"}
    rng, midway = random.Random(0), 0

    def rows():
        return len(list(out.glob(".build/*[0-9].json")))

    for _ in range(count):
        process = subprocess.Popen(
            command, start_new_session=True, stderr=subprocess.DEVNULL, env=slow
        )
        goal = rows() + rng.randint(1, 4)
        while rows() < goal and process.poll() is None:
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        midway += 0 < rows() < 20
    assert midway >= count // 2
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "40 inputs = 40 written + 0 rejected; 20 shards" in done.stdout
    assert contents(out) == contents(tmp_path / "calm")
    assert verify_shards(out, "decode") == []


def test_other_settings_are_refused_and_a_finished_set_is_left(made, small_source):
    source, before = open_source(str(small_source)), contents(made)
    assert build_shards(source, made, bare(), 1, max_rejected=1).count == 40
    with pytest.raises(shards.UserError, match=r"settings.grid is 16 there, 20 here"):
        build_shards(source, made, bare(grid=20), 1)
    with pytest.raises(shards.UserError, match=r"settings.frame is 0 there, 64 here"):
        build_shards(source, made, settings(detectors=TWO), 1)
    assert contents(made) == before


@pytest.mark.parametrize("grown", [False, True])
def test_maps_of_a_finished_set_are_reused(grown, small_source, tmp_path, monkeypatch):
    """Of shards with frames, or of other maps: nothing that is known is detected again."""
    source = open_source(str(small_source))
    build_shards(source, tmp_path / "fresh", bare(), 1)
    old = settings(frame=0, quality=0) if grown else settings(detectors=TWO)
    build_shards(source, tmp_path / "old", old, 1)
    if not grown:
        monkeypatch.setattr("preprocess.shard.maps_of", None)
    build_shards(source, tmp_path / "new", bare(), 1, reuse=tmp_path / "old")
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")


FILES = ["shard-000003.npy", "index.npy", "rejected.jsonl", "names.jsonl", "keys.npy"]


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_repaired_to_the_same_bytes(name, made, small_source):
    source, whole = open_source(str(small_source)), contents(made)
    for content in (None, whole[name][:-1], whole[name][:-1] + b"\xfe"):
        (made / name).unlink()
        if content is not None:
            (made / name).write_bytes(content)
        assert any(name in line for line in verify_shards(made))
        assert name in repair_shards(source, made, bare(), 1)
        assert contents(made) == whole
    assert verify_shards(made, "decode") == []


def test_a_block_that_is_none_is_found_by_structure(made):
    path = made / "shard-000002.npy"
    np.save(path, np.load(path).reshape(-1))
    assert any(
        "shard-000002.npy is no .npy file" in line for line in verify_shards(made, "structure")
    )
    np.save(made / "shard-000099.npy", np.zeros(3))
    assert any("shard-000099" in line for line in verify_shards(made, "structure"))


def test_the_commands_serve_it(made, small_source, tmp_path):
    done = kamim("shards", "verify", made, "--level", "redetect", "--source", small_source)
    assert done.stdout == f"{made}: 40 records are sound at level redetect\n", done.stderr
    assert kamim("shards", "inspect", made).returncode == 0
    page = (made / "inspect.html").read_text()
    assert "<th>frame<td>none" in page
    assert "Keypoint densities without frames" in (made / "README.md").read_text()
    assert kamim("shards", "copy", made, tmp_path / "copy").returncode == 0
    assert verify_shards(tmp_path / "copy", "decode") == []
    done = kamim("shards", "fidelity", made, "--source", small_source, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    assert shards.open(made).manifest.fidelity


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"quality": 90}, "quality is 90"),
        ({"bank": 2}, "bank is 2"),
        ({"weights": (0.25, 8)}, "weights is"),
        ({"detect_on": "frame"}, "detect_on is 'frame'"),
    ],
)
def test_what_needs_frames_is_refused(wrong, words):
    with pytest.raises(shards.UserError, match=f"frame 0 stores densities alone, and {words}"):
        settings(**{"frame": 0, "quality": 0, **wrong})


def test_what_it_says_to_type_can_be_typed(small_source, tmp_path):
    out, small = tmp_path / "out", ["--crop", 64, "--map-crops", 1, "--grid", 16]
    assert kamim("maps", "build", small_source, out, *small).returncode == 0
    whole = contents(out)
    (out / "names.jsonl").write_bytes(b"")
    done = kamim("maps", "build", small_source, out, *small)
    words = done.stderr.strip().rpartition("type: ")[2].split()
    assert words[:3] == ["kamim", "maps", "build"]
    assert kamim(*words[1:]).returncode == 0
    assert contents(out) == whole
    done = kamim("maps", "build", small_source, out, *small, "--detector", "fast,orb")
    words = done.stderr.strip().rpartition("new folder: ")[2].split()
    assert words[:3] == ["kamim", "maps", "build"]
    assert kamim(*words[1:]).returncode == 0
    assert shards.open(f"{out}-orb").manifest.detectors == ["fast", "orb"]


def test_from_python(small_source, tmp_path):
    chosen = {"crop": 64, "map_crops": 1, "grid": 16}
    shards.build(str(small_source), tmp_path / "out", ("fast", "orb"), frame=0, **chosen)
    done = kamim(
        *["maps", "build", small_source, tmp_path / "typed", "--detector", "fast,orb"],
        *["--crop", 64, "--map-crops", 1, "--grid", 16],
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "typed")


def packed(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, file in files:
            tar.add(file, name)


def test_keys_of_every_layout(small_source, tmp_path):
    """A folder's path, a tar's member, a WebDataset key, a Parquet row, the number of a sample."""
    import pyarrow
    import pyarrow.parquet

    source = open_source(str(small_source))
    files = [(entry.name, small_source / entry.name) for entry in source.entries]
    packed(tmp_path / "one.tar", files)
    keyed = [(f"{n:04d}.jpg", file) for n, (_, file) in enumerate(files)]
    packed(tmp_path / "many" / "000.tar", keyed[:25])
    packed(tmp_path / "many" / "001.tar", keyed[25:])
    rows = [{"bytes": file.read_bytes(), "path": None} for _, file in files]
    (tmp_path / "parquet").mkdir()
    table = pyarrow.table({"image": rows, "label": [0] * len(rows)})
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "train.parquet")
    build_shards(source, tmp_path / "framed", settings(), 1)
    asked = {
        str(small_source): lambda n: (source.entries[n].name, n),
        str(tmp_path / "one.tar"): lambda n: (source.entries[n].name, n),
        f"webdataset:{tmp_path / 'many'}": lambda n: (
            *(f"{n:04d}", f"00{n // 25}.tar/{n:04d}.jpg", n),
        ),
        f"parquet:{tmp_path / 'parquet'}": lambda n: (f"train.parquet/{n}", n),
        f"shards:{tmp_path / 'framed'}": lambda n: (source.entries[n].name, n),
    }
    for place, (where, keys) in enumerate(asked.items()):
        out = tmp_path / f"maps{place}"
        build_shards(open_source(where), out, bare(), 1)
        records = shards.open(out)
        for number in (0, 24, 25, 39):
            for key in keys(number):
                np.testing.assert_array_equal(
                    records.density(key, "fast"), records[number].maps["fast"]
                )
        assert verify_shards(out, "decode") == []


def test_a_name_that_two_have_is_told(small_source, tmp_path):
    """WebDataset keys that repeat from tar to tar, and a tar that holds one name twice."""
    files = sorted(small_source.glob("*/*.jpg"))
    packed(tmp_path / "many" / "000.tar", [("a.jpg", files[0]), ("b.jpg", files[1])])
    packed(tmp_path / "many" / "001.tar", [("a.jpg", files[2]), ("c.jpg", files[3])])
    build_shards(open_source(f"webdataset:{tmp_path / 'many'}"), tmp_path / "out", bare(), 1)
    records = shards.open(tmp_path / "out")
    with pytest.raises(
        shards.UserError, match=r"2 images of .* are called 'a': give the whole name"
    ):
        records.density("a", "fast")
    for key, number in (("b", 1), ("000.tar/a.jpg", 0), ("001.tar/a.jpg", 2), ("c", 3), (2, 2)):
        np.testing.assert_array_equal(records.density(key, "fast"), records[number].maps["fast"])
    packed(tmp_path / "twice.tar", [("x/a.jpg", files[0]), ("x/a.jpg", files[1])])
    build_shards(open_source(str(tmp_path / "twice.tar")), tmp_path / "twice", bare(), 1)
    with pytest.raises(shards.UserError, match="2 images"):
        shards.open(tmp_path / "twice").density("x/a.jpg", "fast")


def test_colliding_hashes_give_each_its_own(made, monkeypatch):
    """Names are compared: whatever hashes they have, none gets another's density."""
    monkeypatch.setattr("shards.names._hash", lambda line: 7 + len(line) % 2)
    names, manifest = Names(made, shards.load(made)), shards.load(made)
    every = [names[n] for n in range(len(names))]
    text, keys = lists_of(every, "folder")
    (made / "names.jsonl").write_bytes(text)
    (made / "keys.npy").write_bytes(keys)
    monkeypatch.setattr("shards.names.check_sha256", lambda path, expected: None)
    found = Names(made, manifest)
    assert len(set(np.load(made / "keys.npy")[0])) <= 2
    assert [found.find(name) for name in every] == list(range(40))
    with pytest.raises(shards.UserError, match="no density"):
        found.find("class0/xxx.jpg")


@pytest.mark.parametrize("row", [1, 2])
def test_keys_that_lead_elsewhere_are_refused(row, made):
    """Forged, with a manifest that fits them."""
    keys = np.load(made / "keys.npy")
    keys[row, 3] = 1 << 63
    manifest = shards.load(made)
    file = shards.spec.write_file(made / "keys.npy", npy_bytes(keys), manifest.names[1].count)
    shards.spec.write(made, replace(manifest, names=[manifest.names[0], file]))
    with pytest.raises(shards.UserError, match=r"keys.npy is damaged: it is no list of 40 names"):
        shards.open(made).density(0, "fast")
    assert any("keys.npy is damaged" in line for line in verify_shards(made, "structure"))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a/b.jpg", "a/b"),
        ("b.seg.png", "b"),
        ("d.e/f.g.jpg", "d.e/f"),
        ("train/000.tar/a/b.jpg", "a/b"),
        ("x.TAR/000.tar/b.jpg", "b"),
        ("plain", "plain"),
        ("\u0130-000.tar/abc.jpg", "abc"),
    ],
)
def test_webdataset_keys_are_the_librarys(name, key):
    assert webdataset_key(name) == key
    library = pytest.importorskip("webdataset.tariterators")
    member = re.split(r"\.tar/", name, flags=re.IGNORECASE)[-1]
    assert key == (library.base_plus_ext(member)[0] or name)


def test_odd_names(tmp_path, small_source):
    """Bytes that are no UTF-8, quotes, line ends: what the listing calls them finds them."""
    photo = next(small_source.glob("*/*.jpg")).read_bytes()
    root = tmp_path / "odd"
    (root / "a").mkdir(parents=True)
    for name in (b"\xff\xfe.jpg", b'"q".jpg', b"line\nend.jpg", "\u00e9\u4e2d.jpg".encode()):
        with open(os.path.join(os.fsencode(root / "a"), name), "wb") as file:
            file.write(photo)
    source = open_source(root)
    build_shards(source, tmp_path / "out", bare(), 1)
    records = shards.open(tmp_path / "out")
    for number, entry in enumerate(source.entries):
        assert records[number].source == entry.name
        assert records.maps.names.find(f"./{entry.name}") == number  # as tar -C FOLDER . says it
        records.density(entry.name, "fast")
    assert verify_shards(tmp_path / "out", "decode") == []


def test_a_set_as_large_as_a_bench_measures(tmp_path):
    """The bench of docs/results/bench/maps.jsonl in small: it measures what it says."""
    from kamim.bench.maps import synthetic

    for row in synthetic(images=12_000, lookups=500):
        assert 0.035 < row["GB on disk"] < 0.04
        assert row["look-ups per second of processor time"]["min"] > 0
        assert row["lookups"] == 500 * 7 * 2


@pytest.mark.release
@pytest.mark.timeout(900)
def test_imagenet_is_within_its_bounds():
    """4 GB on disk, 200 MB resident, opened in 2 s, 100,000 look-ups per second of a core."""
    from kamim.bench.maps import synthetic

    for row in synthetic():
        assert row["GB on disk"] <= 4
        assert row["resident MB after them"] <= 200
        assert row["open and first look-up, s"] < 2
        assert row["look-ups per second of processor time"]["median"] >= 100_000
