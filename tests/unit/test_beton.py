"""FFCV sets without FFCV: converting, refusing, finding damage in a .beton."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import contents, copied

from preprocess import open_source
from shards import ShardSet, decode_frame, load
from shards import beton as layout
from shards.beton import convert_to_ffcv
from shards.files import LOCK, alone
from shards.loader import Loader
from shards.order import Plan
from shards.record import equal
from shards.spec import to_json, write_file
from shards.verification import verify_shards


def test_every_record_is_the_sources(built, converted):
    source, copy = ShardSet(built), ShardSet(converted)
    assert len(copy) == len(source) == 40
    for number in range(40):
        a, b = source[number], copy[number]
        assert (a.key, a.label, a.height, a.width) == (b.key, b.label, b.height, b.width)
        assert equal(a.maps, b.maps)
        assert equal(a.weights, b.weights)
        assert a.bank.equals(b.bank)
        np.testing.assert_array_equal(decode_frame(a.frame), decode_frame(b.frame))
        assert converted.name == "raw" or a.frame == b.frame
    for level in ("structure", "checksum", "decode"):
        assert verify_shards(converted, level) == []


def test_converting_twice_gives_the_same_bytes_and_a_finished_set_stays(built, converted, tmp_path):
    convert_to_ffcv(built, tmp_path / "again", converted.name)
    assert contents(tmp_path / "again") == contents(converted)
    before = (converted / layout.BETON).stat().st_mtime_ns
    convert_to_ffcv(built, converted, converted.name)
    assert (converted / layout.BETON).stat().st_mtime_ns == before


def test_refusals(built, converted, tmp_path):
    other = "raw" if converted.name == "jpeg" else "jpeg"
    with pytest.raises(ValueError, match="holds another set"):
        convert_to_ffcv(built, converted, other)
    with pytest.raises(ValueError, match="FFCV set already"):
        convert_to_ffcv(converted, tmp_path / "x", "jpeg")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"something else \(thesis.tex\)"):
        convert_to_ffcv(built, tmp_path / "full", "jpeg")


@pytest.mark.parametrize("frames", ["jpeg", "raw"])
@pytest.mark.parametrize("bank", [False, True])
def test_the_plain_loader_reads_an_ffcv_set(built, tmp_path, frames, bank):
    """As it does among several sets."""
    convert_to_ffcv(built, tmp_path / "ffcv", frames)
    plan, how = Plan(40, 12, seed=2), {"maps": ["fast", "orb"], "bank": bank}
    ours = copied(Loader(ShardSet(built), plan, 0, 9, **how))
    for one, other in zip(
        ours, Loader(ShardSet(tmp_path / "ffcv"), plan, 0, 9, **how), strict=True
    ):
        np.testing.assert_equal(one._asdict(), other._asdict())


def test_skipping_refuses_an_ffcv_set(converted, tmp_path):
    pytest.importorskip("torch")
    from test_pretrain import run

    with pytest.raises(ValueError, match="--on-error skip needs tars"):
        run(converted, tmp_path / "run", skip_damaged=True)


def test_one_conversion_at_a_time(built, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        alone(tmp_path / "out", tmp_path / "out" / LOCK),
        pytest.raises(ValueError, match="another process is writing into"),
    ):
        convert_to_ffcv(built, tmp_path / "out", "jpeg")
    convert_to_ffcv(built, tmp_path / "out", "jpeg")
    assert verify_shards(tmp_path / "out", "decode") == []


def test_a_bad_record_stops_the_conversion_by_name(built, tmp_path):
    from test_loader import damage

    damage(ShardSet(built), 17, "frame", b"\0" * 400)
    with pytest.raises(ValueError, match="frame"):
        convert_to_ffcv(built, tmp_path / "out", "raw")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").glob("*.tmp"))


@pytest.mark.parametrize("frames", ["raw", "jpeg"])
def test_a_damaged_set_is_not_made_into_a_sound_one(frames, built, tmp_path):
    path, row = ShardSet(built).locate(17)
    with path.open("r+b") as file:  # in the JPEG's data, which decodes all the same
        file.seek(int(row["frame"]) + int(row["frame_bytes"]) - 40)
        file.write(bytes(8))
    with pytest.raises(ValueError, match=r"shard-000004.tar is damaged: its sha256"):
        convert_to_ffcv(built, tmp_path / "out", frames)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(ValueError, match=r"shard-000004.tar is damaged: its sha256"):
        open_source(f"shards:{built}")


def test_a_conversion_that_another_finished_meanwhile_is_left_alone(built, tmp_path, monkeypatch):
    real = layout.finished_copy

    def slow(out, *args):
        found = real(out, *args)
        monkeypatch.setattr(layout, "finished_copy", real)
        convert_to_ffcv(built, out, "raw")
        return found

    monkeypatch.setattr(layout, "finished_copy", slow)
    with pytest.raises(ValueError, match="holds another set"):
        convert_to_ffcv(built, tmp_path / "out", "jpeg")
    assert ShardSet(tmp_path / "out").manifest.settings.quality == 0


def test_any_changed_byte_and_any_cut_is_found(converted):
    path = converted / layout.BETON
    rng = np.random.default_rng(0)
    data = bytearray(path.read_bytes())
    for at in [0, 9, 30, 5000, len(data) - 1, *rng.integers(0, len(data), 25)]:
        before = data[at]
        data[at] ^= 1
        path.write_bytes(data)
        assert any(layout.BETON in problem for problem in verify_shards(converted)), at
        data[at] = before
    path.write_bytes(data[:-1])
    assert "bytes, the manifest says" in verify_shards(converted, "structure")[0]
    with pytest.raises(ValueError, match="bytes, the manifest says"):
        ShardSet(converted)


def test_tables_that_do_not_fit_the_index_are_found_by_structure(converted):
    """Signed anew, so that no checksum tells."""
    path, manifest = converted / layout.BETON, load(converted)
    data = bytearray(path.read_bytes())
    mine = layout.beton_format(manifest.settings)
    rows = layout.HEADER.itemsize + len(mine.fields) * layout.DESCRIPTOR.itemsize
    data[rows + 7 * mine.row.itemsize + mine.row.fields["label"][1]] ^= 1  # of record 7
    file = write_file(path, bytes(data), 40)
    (converted / "manifest.json").write_bytes(to_json(replace(manifest, shards=[file])))
    (problem,) = verify_shards(converted, "structure")
    assert "header or metadata are not those of its index" in problem


def test_a_damaged_conversion_is_done_again_and_never_called_fine(built, tmp_path):
    out = tmp_path / "out"
    convert_to_ffcv(built, out)
    whole = contents(out)
    for name in ("records.beton", "index.npy"):
        data = bytearray(whole[name])
        data[len(data) // 2] ^= 1
        (out / name).write_bytes(data)
        convert_to_ffcv(built, out)
        assert contents(out) == whole
    (out / "records.beton").unlink()
    assert convert_to_ffcv(built, out).count == 40
    assert contents(out) == whole
