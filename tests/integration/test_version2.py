"""Sets of format version 2: refused in a line by every command, converted without the source."""

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, contents, settings
from typed import kamim

import shards
from preprocess import build_shards, detector_settings, open_source, redetect_maps
from preprocess.shard import library_versions
from shards.files import LOCK
from shards.spec import fingerprint, load, parse, plain, to_json
from shards.verification import verify_shards
from shards.version2 import read_manifest, upgrade_set

OLD = REPOSITORY / "tests" / "golden" / "version2"


def source_of(root):
    """What the golden set was built from by version 2."""
    rng = np.random.default_rng(0)
    for number in range(3):
        path = root / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (12, 14, 3), dtype=np.uint8)
        size = (120, 90 + 10 * number)
        cv2.imwrite(str(path), cv2.resize(blocks, size, interpolation=cv2.INTER_CUBIC))
    (root / "class1" / "bad.png").write_bytes(b"not a picture")
    return open_source(str(root))


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def test_an_upgrade_is_what_a_build_with_16_levels_writes(old, tmp_path):
    manifest = upgrade_set(old, tmp_path / "new")
    assert (manifest.format_version, manifest.count, manifest.settings.levels) == (3, 3, 16)
    assert manifest.ledger.rejected == {"not-an-image": 1}
    assert verify_shards(tmp_path / "new", "decode") == []
    detectors = tuple(map(detector_settings, ("fast", "sift")))
    chosen = settings(frame=32, bank=2, detectors=detectors, shard_size=2, levels=16)
    source = source_of(tmp_path / "source")
    if manifest.versions != library_versions(chosen):
        pytest.skip("the golden set was built by other libraries")
    assert redetect_maps(shards.ShardSet(tmp_path / "new"), source) == []
    build_shards(source, tmp_path / "built", chosen, 1, max_rejected=1)
    built, new = contents(tmp_path / "built"), contents(tmp_path / "new")
    made, kept = load(tmp_path / "built"), load(tmp_path / "new")
    # Files are told apart by their times, which these have anew.
    assert replace(made, source=kept.source, fingerprint=kept.fingerprint) == kept
    assert {**built, "manifest.json": b""} == {**new, "manifest.json": b""}
    facts = {"format_version": 3, "settings": plain(chosen)}
    facts |= {"source": kept.source, "versions": kept.versions}
    assert kept.fingerprint == fingerprint(json.loads(json.dumps(facts)))


def test_frames_are_the_same_bytes_and_densities_the_same_numbers(old, tmp_path):
    """Read by plain NumPy and tarfile, as version 2's FORMAT.md said."""
    import io
    import tarfile

    upgrade_set(old, tmp_path / "new")
    records = iter(shards.ShardSet(tmp_path / "new"))
    for path in sorted(old.glob("*.tar")):
        with tarfile.open(path) as archive:
            parts = [archive.extractfile(member).read() for member in archive]
        for frame, maps, label, meta in zip(*[iter(parts)] * 4, strict=True):
            record, stream = next(records), io.BytesIO(maps)
            halves, rows = np.load(stream), np.load(stream)
            assert record.frame == frame
            assert record.label == int(label)
            assert json.loads(meta) == {
                "height": record.height,
                "source": record.source,
                "width": record.width,
            }
            for number, name in enumerate(("fast", "sift")):
                half = halves[number]
                np.testing.assert_array_equal(record.maps[name][:, ::2], (half & 15) * 17)
                np.testing.assert_array_equal(record.maps[name][:, 1::2], (half >> 4) * 17)
                counts = rows[:, 18 + 64 * number :][:, :64].reshape(2, 8, 8)
                np.testing.assert_array_equal(record.bank.counts[name], counts)
            boxes = np.frombuffer(rows[:, :16].tobytes(), "<u4").reshape(2, 4)
            np.testing.assert_array_equal(record.bank.boxes, boxes)
            np.testing.assert_array_equal(record.bank.flips, rows[:, 16:18])
    assert next(records, None) is None


def test_every_other_command_names_the_upgrade_in_one_line(old, tmp_path):
    for words in (
        ["shards", "verify", old],
        ["shards", "inspect", old],
        ["shards", "convert", old],
        ["shards", "copy", old, tmp_path / "copy"],
        ["shards", "build", "demo", old],
        ["shards", "build", f"shards:{old}", tmp_path / "x"],
        ["shards", "build", "demo", tmp_path / "x", "--reuse", old],
    ):
        done = kamim(*words)
        assert done.returncode in (1, 2)
        said = done.stdout + done.stderr
        assert "version 2, this kamim reads version 3; convert the set" in said, said
        assert f"kamim shards upgrade {old} NEW" in said
        assert "Traceback" not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


@pytest.mark.parametrize("name", ["shard-000001.tar", "index.npy", "rejected.jsonl"])
def test_a_damaged_file_stops_it_by_name(name, old, tmp_path):
    data = bytearray((old / name).read_bytes())
    data[len(data) // 2] ^= 1
    (old / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its sha256"):
        upgrade_set(old, tmp_path / "new")
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_a_damaged_manifest_and_other_versions_are_refused(old, tmp_path):
    path = old / "manifest.json"
    text = path.read_text()
    for wrong, words in (
        (text.replace('"grid": 16', '"grid": 18'), "does not match its checksum"),
        (text + " ", "does not match its checksum"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        (text.replace('"format_version": 2', '"format_version": 3'), "only version 2"),
    ):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=words):
            read_manifest(old)
    path.write_text(text)
    assert parse("x", to_json(read_manifest(old))) == read_manifest(old)


def test_a_killed_upgrade_is_done_again_and_a_finished_one_stays(old, tmp_path):
    upgrade_set(old, tmp_path / "new")
    whole = contents(tmp_path / "new")
    (tmp_path / "new" / "manifest.json").unlink()
    (tmp_path / "new" / "shard-000000.tar").write_bytes(b"cut")
    (tmp_path / "new" / "shard-000001.tar.0123456789ab.tmp").write_bytes(b"cut")
    (tmp_path / "new" / LOCK).touch()
    upgrade_set(old, tmp_path / "new")
    assert contents(tmp_path / "new") == whole
    before = (tmp_path / "new" / "shard-000000.tar").stat().st_mtime_ns
    upgrade_set(old, tmp_path / "new")
    assert (tmp_path / "new" / "shard-000000.tar").stat().st_mtime_ns == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"something else \(thesis.tex\)"):
        upgrade_set(old, tmp_path / "full")
