"""verify: finds every kind of damage, at the level that says it does, and names the place."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import settings

import preprocess
from preprocess import build_shards, open_source, redetect_maps
from shards import LEVELS, ShardSet, UserError, load
from shards.record import npy_bytes
from shards.spec import FORMAT_VERSION, to_json, write_file
from shards.verification import verify_shards
from shards.version2 import upgrade_set


@pytest.fixture
def built(small_source, tmp_path):
    build_shards(open_source(str(small_source)), tmp_path / "built", settings(), 1)
    return tmp_path / "built"


def test_a_sound_set_has_no_problems(built):
    for level in LEVELS:
        assert verify_shards(built, level) == []
    with pytest.raises(ValueError, match="structure, checksum, decode"):
        verify_shards(built, "everything")


def test_any_changed_byte_is_found(built):
    """Every byte of the manifest, 150 others anywhere: checksum finds each one."""
    rng = np.random.default_rng(0)
    places = [("manifest.json", at) for at in range((built / "manifest.json").stat().st_size)]
    for name in ["index.npy", *(f"shard-{n:06d}.tar" for n in range(10))]:
        size = (built / name).stat().st_size
        places += [(name, int(at)) for at in rng.integers(0, size, 14)]
    for name, at in places:
        path = built / name
        data = bytearray(path.read_bytes())
        before = data[at]
        data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            if name == "manifest.json":
                with pytest.raises(ValueError, match=name):
                    load(built)
            else:
                assert any(name in problem for problem in verify_shards(built)), (name, at)
        finally:
            data[at] = before
            path.write_bytes(data)
    assert verify_shards(built) == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "shard-000003.tar").unlink(), "shard-000003.tar is missing"),
        (lambda f: os.truncate(f / "shard-000003.tar", 5000), "has 5000 bytes"),
        (lambda f: (f / "index.npy").unlink(), "index.npy is missing"),
        (lambda f: (f / "manifest.json").unlink(), "not a finished set"),
        (lambda f: (f / "manifest.json").write_text("{}"), "damaged"),
        (lambda f: (f / "manifest.json").write_text("[1"), "damaged"),
        (lambda f: (f / "rejected.jsonl").unlink(), "rejected.jsonl is missing"),
        (lambda f: (f / "shard-000077.tar").write_bytes(b""), "not in the manifest"),
        (lambda f: (f / "shard-000000.tar.1.tmp").write_bytes(b""), "not in the manifest"),
    ],
)
def test_structure_finds(built, damage, words):
    damage(built)
    problems = verify_shards(built, "structure")
    assert len(problems) == 1
    assert words in problems[0]
    assert "\n" not in problems[0]


def test_a_folder_without_a_manifest_is_a_source_unless_it_holds_files_of_ours(built, tmp_path):
    """The command that an error names is never one that is refused."""
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    (tmp_path / "unfinished" / ".build").mkdir(parents=True)
    (built / "manifest.json").unlink()
    for folder, words in (
        (tmp_path / "photos", f"build {tmp_path / 'photos'} OUT`"),
        (tmp_path / "unfinished", "the command that began it goes on"),
        (tmp_path / "nowhere", f"build SOURCE {tmp_path / 'nowhere'}`"),
        (built, f"build SOURCE {built}`"),
    ):
        with pytest.raises(ValueError, match="not a finished set of shards") as caught:
            load(folder)
        assert str(caught.value).endswith(words)


def test_swapped_shards_are_found_by_structure(built):
    a, b = built / "shard-000001.tar", built / "shard-000002.tar"
    data = a.read_bytes(), b.read_bytes()
    a.write_bytes(data[1])
    b.write_bytes(data[0])
    assert verify_shards(built, "structure")


def test_a_newer_format_is_refused_by_its_number(built):
    text = (built / "manifest.json").read_text()
    newer = text.replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99')
    (built / "manifest.json").write_text(newer)
    (problem,) = verify_shards(built)
    assert "format version 99" in problem
    assert f"version {FORMAT_VERSION}" in problem


def resign(built, change):
    """Change the manifest and give it a checksum that fits, as an attacker or a bug would."""
    from shards.spec import fingerprint

    content = json.loads((built / "manifest.json").read_text())
    content.pop("checksum")
    change(content)
    content["checksum"] = fingerprint(content)
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (built / "manifest.json").write_text(text)


@pytest.mark.parametrize("depth", [300, 100_000])
def test_a_manifest_deeper_than_it_can_be_is_damaged(built, depth):
    nested = "[" * depth + "]" * depth
    resign(built, lambda content: content["source"].update(more="HERE"))
    text = (built / "manifest.json").read_text()
    (built / "manifest.json").write_text(text.replace('"HERE"', nested))
    assert "manifest.json is damaged" in verify_shards(built)[0]
    with pytest.raises(UserError, match=r"manifest.json (is damaged|has format version 3)"):
        upgrade_set(built, built.with_name("new"))


def test_a_ledger_that_does_not_balance_is_refused(built):
    resign(built, lambda content: content["ledger"].update(inputs=41))
    assert "does not balance" in verify_shards(built)[0]


def test_file_names_that_leave_the_folder_are_refused(built):
    resign(built, lambda content: content["shards"][0].update(name="../../etc/passwd"))
    assert "names may hold no folder" in verify_shards(built)[0]


def test_decode_names_shard_and_key_of_a_bad_record(built):
    """A record damaged before the checksums were made, as by a faulty build."""
    records = ShardSet(built)
    path, row = records.locate(17)
    data = bytearray(path.read_bytes())
    middle = int(row["frame"] + row["frame_bytes"] // 2)
    data[int(row["frame"]) : middle] = bytes(middle - int(row["frame"]))
    manifest = load(built)
    shard = write_file(path, bytes(data), 4)
    files = [shard if f.name == shard.name else f for f in manifest.shards]
    (built / "manifest.json").write_bytes(to_json(replace(manifest, shards=files)))
    assert verify_shards(built, "checksum") == []
    (problem,) = verify_shards(built, "decode")
    assert path.name in problem
    assert "record 000000017" in problem


@pytest.mark.parametrize("data", [b"", b"junk", b"\x93NUMPY\x01\x00\x10\x00{}             \n"])
def test_an_index_that_is_no_array_is_damage_whatever_its_checksum(built, data):
    row = write_file(built / "index.npy", data, 40)
    (built / "manifest.json").write_bytes(to_json(replace(load(built), index=row)))
    assert "index.npy is damaged: it is no array" in verify_shards(built)[0]
    with pytest.raises(UserError, match=r"index.npy is damaged: it is no array"):
        ShardSet(built)


@pytest.mark.parametrize("kind", ["V52", "<i8"])
def test_an_index_of_other_rows_is_damage_whatever_its_checksum(built, kind):
    row = write_file(built / "index.npy", npy_bytes(np.zeros(40, kind)), 40)
    (built / "manifest.json").write_bytes(to_json(replace(load(built), index=row)))
    with pytest.raises(UserError, match=r"index.npy is damaged: .* for 40 records"):
        ShardSet(built)


def test_a_set_is_of_maps_if_it_has_no_frames(built):
    manifest = load(built)
    bare = replace(manifest.settings, frame=0, quality=0)
    maps = replace(manifest, container="maps", settings=bare)
    (built / "manifest.json").write_bytes(to_json(maps))
    assert load(built) == maps
    (built / "manifest.json").write_bytes(to_json(replace(maps, container="webdataset")))
    with pytest.raises(UserError, match="is damaged"):
        load(built)


@pytest.mark.parametrize("field", ["label", "height", "width"])
def test_decode_holds_the_index_to_the_records(built, field):
    """Training takes labels and sizes from the index, stock readers from the records."""
    index = np.load(built / "index.npy")
    index[field][17] += 1
    row = write_file(built / "index.npy", npy_bytes(index), 40)
    (built / "manifest.json").write_bytes(to_json(replace(load(built), index=row)))
    assert verify_shards(built, "checksum") == []
    (problem,) = verify_shards(built, "decode")
    assert problem.endswith("record 000000017: the index has another size or label")


def test_redetect_compares_with_the_source(built, small_source):
    records, source = ShardSet(built), open_source(str(small_source))
    assert redetect_maps(records, source, 10**15) == []  # as many as there are
    with pytest.raises(ValueError, match="--source"):
        redetect_maps(records, None)
    other = (small_source / "class1" / "001.jpg").read_bytes()
    (small_source / "class0" / "000.jpg").write_bytes(other)
    (small_source / "class2" / "002.jpg").unlink()
    problems = redetect_maps(records, open_source(str(small_source)), 40)
    assert len(problems) == 2
    assert "class0/000.jpg" in problems[0]
    assert "map differs in" in problems[0]
    assert "the source has no 'class2/002.jpg'" in problems[1]


def test_redetect_tells_apart_two_members_of_one_name(small_source, tmp_path):
    from test_sources import make_tar

    images = [path.read_bytes() for path in sorted(small_source.rglob("*.jpg"))[:4]]
    make_tar(tmp_path / "twice.tar", [("t/a/x.jpg", data) for data in images[:3]])
    source = open_source(str(tmp_path / "twice.tar"))
    build_shards(source, tmp_path / "out", settings(), 1)
    records = ShardSet(tmp_path / "out")
    assert [records[n].source for n in range(3)] == ["t/a/x.jpg"] * 3
    assert len({records[n].frame for n in range(3)}) == 3
    assert redetect_maps(records, source) == []


def test_redetect_notices_another_detector(built, small_source, monkeypatch):
    monkeypatch.setitem(preprocess.detectors.DEFAULTS["fast"], "threshold", 11)
    records, source = ShardSet(built), open_source(str(small_source))
    assert redetect_maps(records, source) == []  # the manifest's options count, not the defaults
    from preprocess import detectors

    real = detectors.detect
    monkeypatch.setattr("preprocess.densities.detect", lambda d, g, crop: real(d, g, crop)[1:])
    assert redetect_maps(records, source)


def test_moving_a_set_changes_nothing(built, tmp_path):
    shutil.move(built, tmp_path / "elsewhere")
    assert verify_shards(tmp_path / "elsewhere", "decode") == []


def test_a_set_in_a_store_is_sent_to_the_command_that_fetches_and_checks_it():
    (problem,) = verify_shards(Path("s3://bucket/set"))
    assert "s3://bucket/set is not on this machine" in problem
    assert "kamim shards copy s3://bucket/set FOLDER" in problem
