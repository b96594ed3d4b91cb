"""The format: golden bytes, round trips, and slices of a tar that must not be taken for records."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import Bank, Record, ShardWriter
from shards.record import (
    decode_frame,
    encode_frame,
    from_members,
    from_rows,
    members,
    npy_bytes,
    packed,
    to_rows,
    unpacked,
)
from shards.tar import _header, parse_record

GOLDEN = REPOSITORY / "tests" / "golden" / "two-records.tar"
MAPS = (np.arange(2 * 4 * 4, dtype=np.uint8) * 7 % 16 * 17).reshape(2, 4, 4)
BANK = Bank(
    np.array([[0, 1, 300, 400], [2, 3, 301, 402], [70, 5, 290, 395]], np.uint32),
    np.array([[0, 0], [1, 0], [1, 1]], np.uint8),
    (np.arange(3 * 2 * 6 * 6, dtype=np.uint32) ** 2 % 65).astype(np.uint8).reshape(3, 2, 6, 6),
)
RECORDS = [
    Record(
        "000000007", b"\xff\xd8 not a picture \xff\xd9", 3, 375, 500, "a/ünï 'x'.jpg", MAPS, BANK
    ),
    Record("000000009", b"\x93NUMPY not an array", -1, 1, 2**31, "b\udcff.png", MAPS[:, ::-1]),
]


def same(a: Record, b: Record) -> bool:
    names = ("key", "frame", "label", "height", "width", "source")
    banks = a.bank.equals(b.bank) if a.bank and b.bank else a.bank is b.bank
    maps = np.array_equal(a.maps, b.maps)
    return banks and maps and all(getattr(a, n) == getattr(b, n) for n in names)


def write(path: Path, records: list[Record]) -> ShardWriter:
    with ShardWriter(path) as writer:
        for record in records:
            writer.add(record)
    return writer


def test_golden_bytes(tmp_path):
    """To change the format: raise FORMAT_VERSION, say so in FORMAT.md and CHANGELOG.md, then
    replace the golden file by the one this test wrote."""
    writer = write(tmp_path / "two.tar", RECORDS)
    assert (tmp_path / "two.tar").read_bytes() == GOLDEN.read_bytes()
    assert writer.file.bytes == GOLDEN.stat().st_size
    assert writer.index["start"].tolist() == [0, 4608]


def test_records_come_back_by_the_index(tmp_path):
    writer = write(tmp_path / "two.tar", RECORDS)
    data = (tmp_path / "two.tar").read_bytes()
    for row, record in zip(writer.index, RECORDS, strict=True):
        assert same(parse_record(data[row["start"] : row["start"] + row["bytes"]]), record)
        assert data[row["frame"] : row["frame"] + row["frame_bytes"]] == record.frame
        bank = int(row["maps"] + row["maps_bytes"])
        assert data[row["maps"] : bank] == npy_bytes(packed(record.maps))
        stored = data[bank : bank + int(row["bank_bytes"])]
        assert stored == (npy_bytes(to_rows(record.bank)) if record.bank else b"")


@given(st.integers(0, 10**15), st.sampled_from(["jpg", "maps.npy", "json"]), st.integers(0, 2**31))
def test_headers_are_tarfiles_own(key, suffix, size):
    info = tarfile.TarInfo(f"{key:09d}.{suffix}")
    info.size, info.mode = size, 0o644
    assert _header(info.name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_a_tar_depends_on_its_records_alone(tmp_path):
    with tarfile.open(GOLDEN) as archive:
        for info in archive:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")
            assert info.isreg()


@given(
    st.binary(max_size=2000),
    st.integers(-1, 2**31 - 1),
    st.text(max_size=300),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
)
def test_any_record_survives(frame, label, source, depth, grid, seed):
    halves = np.random.default_rng(seed).integers(0, 256, (depth, 2 * grid, grid), dtype=np.uint8)
    maps = unpacked(halves)
    np.testing.assert_array_equal(packed(maps), halves)
    record = Record("123456789", frame, label, 5, 6, source, maps)
    assert same(from_members(record.key, dict(members(record))), record)


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 28), st.integers(0, 2**32 - 1))
def test_any_bank_survives(slots, detectors, cells, seed):
    rng = np.random.default_rng(seed)
    bank = Bank(
        rng.integers(0, 2**32, (slots, 4)).astype(np.uint32),
        rng.integers(0, 2, (slots, 2)).astype(np.uint8),
        rng.integers(0, 65, (slots, detectors, cells, cells)).astype(np.uint8),
    )
    rows = to_rows(bank)
    assert rows.shape == (slots, 18 + detectors * cells**2)
    assert from_rows(rows, detectors).equals(bank)


def test_rows_of_a_bank_that_are_of_no_square_are_refused():
    rows = to_rows(BANK)
    for wrong in (rows[:0], rows[:, :17], rows[:, :-1], rows[0]):
        with pytest.raises(ValueError, match="the bank's rows are"):
            from_rows(wrong, 2)
    parts = dict(members(RECORDS[0]))
    for cut in (1, 40, 200, 300):
        with pytest.raises(ValueError, match="does not parse"):
            from_members("000000007", parts | {"maps.npy": parts["maps.npy"][:-cut]})


def test_stock_numpy_reads_maps_and_bank():
    stream = io.BytesIO(dict(members(RECORDS[0]))["maps.npy"])
    maps, rows = np.load(stream), np.load(stream)
    np.testing.assert_array_equal(unpacked(maps), MAPS)
    assert from_rows(rows, 2).equals(BANK)


def test_what_is_not_one_whole_record_is_refused():
    data = GOLDEN.read_bytes()
    parse_record(data[:4608])
    with pytest.raises(ValueError, match="not one whole"):
        parse_record(data[:5632])
    for begin, end in [(512, 4608), (0, 4607), (0, 1024), (0, 3584), (1024, 4608)]:
        with pytest.raises(ValueError, match=r"record|header|member"):
            parse_record(data[begin:end])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../000000007.cls", tarfile.REGTYPE),
        ("/000000007.cls", tarfile.REGTYPE),
        ("000000007.cls", tarfile.SYMTYPE),
        ("000000007.pyd", tarfile.REGTYPE),
        ("000000007.cls", tarfile.FIFOTYPE),
    ],
)
def test_hostile_members_are_refused(name, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for suffix, data in members(RECORDS[0])[:2]:
            info = tarfile.TarInfo(f"000000007.{suffix}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
        end = archive.offset
    with pytest.raises(ValueError, match=r"member"):
        parse_record(buffer.getvalue()[:end])


def test_pickles_in_npy_members_are_not_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    parts = dict(members(RECORDS[0])) | {"maps.npy": buffer.getvalue()}
    with pytest.raises(ValueError, match="does not parse"):
        from_members("000000007", parts)


def test_frames_as_jpeg_and_raw():
    rgb = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_frame(encode_frame(rgb, 0)), rgb)
    jpeg = encode_frame(rgb, 90)
    assert decode_frame(jpeg).shape == rgb.shape
    for damaged in (jpeg[:-10], b"", b"junk\xff\xd9", encode_frame(rgb, 0)[:-1]):
        with pytest.raises(ValueError, match=r"frame|npy"):
            decode_frame(damaged)


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "x.tar") as writer:  # noqa: PT012
        writer.add(RECORDS[0])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
