"""The format: golden bytes, round trips, and slices of a tar that must not be taken for records."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from conftest import settings as small
from hypothesis import given, settings
from hypothesis import strategies as st

import preprocess
from shards import Bank, Detector, Record, Settings, ShardSet, ShardWriter
from shards.index import misplaced
from shards.record import decode_frame, encode_frame, from_members, members, npy_bytes
from shards.tar import INDEX_DTYPE as INDEX
from shards.tar import _header, members_in, parse_record, places_of
from shards.version2 import record_of

GOLDEN = REPOSITORY / "tests" / "golden" / "two-records.tar"
GOLDEN_2 = REPOSITORY / "tests" / "golden" / "two-records-v2.tar"
LEVELS = (np.arange(2 * 4 * 4, dtype=np.uint8) * 7 % 16 * 17).reshape(2, 4, 4)
COUNTS = (np.arange(3 * 2 * 6 * 6, dtype=np.uint32) ** 2 % 65).astype(np.uint8).reshape(3, 2, 6, 6)
NAMES = ("fast", "orb")
MAPS = dict(zip(NAMES, LEVELS, strict=True))
BANK = Bank(
    np.array([[0, 1, 300, 400], [2, 3, 301, 402], [70, 5, 290, 395]]),
    np.array([[0, 0], [1, 0], [1, 1]], bool),
    {name: COUNTS[:, row] for row, name in enumerate(NAMES)},
)
WEIGHTS = {"orb": (np.arange(3 * 2 * 2, dtype=np.uint16) * 1000 + 256).reshape(3, 2, 2)}
RECORDS = [
    Record(
        "000000007", b"\xff\xd8 not a picture \xff\xd9", 3, 375, 500, "a/ünï 'x'.jpg", MAPS, BANK
    ),
    Record(
        "000000009",
        b"\x93NUMPY not an array",
        -1,
        1,
        2**31,
        "b\udcff.png",
        {name: levels[::-1] for name, levels in MAPS.items()},
    ),
]
THIRD = replace(
    RECORDS[0],
    key="1000000000",
    maps={n: m + np.uint8(1) for n, m in MAPS.items()},
    weights=WEIGHTS,
)


FIRST, SECOND = 7168, 8192  # bytes of the golden records


def write(path: Path, records: list[Record]) -> ShardWriter:
    with ShardWriter(path) as writer:
        for record in records:
            writer.add(record)
    return writer


def test_golden_bytes(tmp_path):
    """To change the format: raise FORMAT_VERSION, say so in FORMAT.md and CHANGELOG.md, then
    replace the golden file by the one this test wrote."""
    writer = write(tmp_path / "two.tar", [RECORDS[0], THIRD])
    assert (tmp_path / "two.tar").read_bytes() == GOLDEN.read_bytes()
    assert writer.file.bytes == GOLDEN.stat().st_size
    assert writer.index["start"].tolist() == [0, FIRST]


def test_golden_bytes_of_version_2_are_the_same_records():
    data = GOLDEN_2.read_bytes()
    for record, (begin, end) in zip(RECORDS, [(0, 4608), (4608, 8704)], strict=True):
        assert record_of(*members_in(data[begin:end]), list(NAMES)).equals(record)


def test_records_come_back_by_the_index(tmp_path):
    writer = write(tmp_path / "three.tar", [*RECORDS, THIRD])
    data = (tmp_path / "three.tar").read_bytes()
    for row, record in zip(writer.index, [*RECORDS, THIRD], strict=True):
        assert parse_record(data[row["start"] : row["start"] + row["bytes"]]).equals(record)
        assert data[row["frame"] : row["frame"] + row["frame_bytes"]] == record.frame
        known = Settings(
            crop=48,
            grid=4,
            bank=len(record.bank.boxes) if record.bank else 0,
            detectors=tuple(Detector(name, {}) for name in NAMES),
        )
        for array, at in places_of(known)[0]:
            begin = int(row["arrays"]) + at
            found = {"density": record.maps, "counts": record.bank and record.bank.counts}
            expected = npy_bytes(found[array.kind][array.detector])
            assert data[begin - len(array.header) : begin + array.bytes] == expected


@given(
    st.integers(0, 10**15),
    st.sampled_from(["jpg", "fast.density.npy", "json"]),
    st.integers(0, 2**31),
)
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
    shape = (depth, grid, grid)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    maps = {f"d{row}": each for row, each in enumerate(levels)}
    record = Record("123456789", frame, label, 5, 6, source, maps)
    assert from_members(record.key, dict(members(record))).equals(record)


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 28), st.integers(0, 2**32 - 1))
def test_any_bank_survives(slots, detectors, cells, seed):
    rng = np.random.default_rng(seed)
    names = [f"d{number}" for number in range(detectors)]
    bank = Bank(
        rng.integers(0, 2**31, (slots, 4)),
        rng.integers(0, 2, (slots, 2)).astype(bool),
        {name: rng.integers(0, 65, (slots, cells, cells), dtype=np.uint8) for name in names},
    )
    maps = {name: np.zeros((2, 2), np.uint8) for name in names}
    record = Record("123456789", b"", 0, 5, 6, "", maps, bank)
    assert from_members(record.key, dict(members(record))).equals(record)


def meta_of(record, **changes):
    """The members of a record, with other metadata; a list goes in place of the field's last."""
    parts = dict(members(record))
    meta = json.loads(parts["json"])
    for name, value in changes.items():
        meta[name] = [*meta[name][:-1], value] if isinstance(value, list) else value
    return parts | {"json": json.dumps(meta).encode()}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("boxes", [0, 0, 1]),
        ("boxes", [0, 0, 1, 1.5]),
        ("boxes", [0, 0, 1, "1"]),
        ("boxes", [0, 0, 1, 99999999999999999999]),
        ("boxes", [0, 0, 1, 1 << 31]),
        ("boxes", [0, -1, 1, 1]),
        ("flips", [0, 2]),
        ("flips", [0, -1]),
        ("flips", [0, 0.5]),
        ("flips", [0, True, 1]),
        ("boxes", 3),
        ("flips", None),
    ],
)
def test_boxes_of_a_bank_that_are_none_are_refused(field, value):
    assert from_members("000000007", meta_of(RECORDS[0])).equals(RECORDS[0])
    with pytest.raises(ValueError, match="does not parse"):
        from_members("000000007", meta_of(RECORDS[0], **{field: value}))


@pytest.mark.parametrize("meta", [b'{"height":1,"source":"","width":1}', b"[" * 100_000, b"7"])
def test_metadata_that_are_none_are_refused(meta):
    with pytest.raises(ValueError, match="does not parse"):
        from_members("000000007", dict(members(RECORDS[0])) | {"json": meta})


@pytest.mark.parametrize(
    ("field", "value"), [("height", "5"), ("width", 1.5), ("source", 3), ("height", None)]
)
def test_metadata_of_other_types_are_refused(field, value):
    with pytest.raises(ValueError, match="must be integers"):
        from_members("000000007", meta_of(RECORDS[0], **{field: value}))


@pytest.mark.parametrize(
    "counts", [COUNTS[:2, 0], np.concatenate([COUNTS, COUNTS])[:4, 0], COUNTS[:, 0, 0]]
)
def test_counts_are_of_each_stored_crop(counts):
    parts = dict(members(RECORDS[0])) | {"fast.counts.npy": npy_bytes(counts)}
    with pytest.raises(ValueError, match="no counts of the 3 stored crops"):
        from_members("000000007", parts)


@pytest.mark.parametrize(
    "other",
    [
        replace(THIRD, key="1"),
        replace(THIRD, frame=b"x"),
        replace(THIRD, label=4),
        replace(THIRD, height=1),
        replace(THIRD, width=1),
        replace(THIRD, source=""),
        replace(THIRD, maps=MAPS),
        replace(THIRD, weights={}),
        replace(THIRD, bank=None),
        replace(THIRD, bank=replace(BANK, boxes=BANK.boxes + 1)),
        replace(THIRD, bank=replace(BANK, flips=~BANK.flips)),
        replace(THIRD, bank=replace(BANK, counts={"fast": COUNTS[:, 0]})),
    ],
)
def test_records_that_differ_anywhere_are_not_equal(other):
    assert THIRD.equals(replace(THIRD))
    assert not THIRD.equals(other)
    assert not other.equals(THIRD)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start", 1001),
        ("bytes", 1000),
        ("height", 0),
        ("width", 0),
        ("frame", 99),
        ("frame", 301),
        ("frame_bytes", 600),
        ("arrays", 149),
        ("arrays", 301),
        ("label", -2),
    ],
)
def test_an_index_of_places_elsewhere_is_found(field, value):
    row = np.zeros(1, INDEX)
    facts = {"start": 100, "bytes": 200, "height": 1, "width": 1, "frame": 100, "frame_bytes": 50}
    for name, fact in (facts | {"arrays": 150}).items():
        row[name] = fact
    assert not misplaced(row, 300, 150).any()
    assert misplaced(row, 300, 151).all()
    row[field] = value
    assert misplaced(row, 300, 150).all()


@pytest.mark.parametrize("suffix", ["fast.density.npy", "orb.counts.npy", "orb.weights.npy"])
def test_arrays_that_are_cut_or_of_another_type_are_refused(suffix):
    parts = dict(members(THIRD))
    for data in (
        parts[suffix][:-1],
        parts[suffix][:40],
        parts[suffix] + b"x",
        npy_bytes(np.zeros((3, 2, 2), np.float32)),
    ):
        with pytest.raises(ValueError, match="does not parse"):
            from_members("1000000000", parts | {suffix: data})


def test_stock_numpy_reads_each_array_alone():
    parts = dict(members(THIRD))
    for kind, arrays in (("density", THIRD.maps), ("counts", BANK.counts), ("weights", WEIGHTS)):
        for name, array in arrays.items():
            loaded = np.load(io.BytesIO(parts[f"{name}.{kind}.npy"]))
            np.testing.assert_array_equal(loaded, array)
            assert loaded.dtype == array.dtype


def test_what_is_not_one_whole_record_is_refused():
    data = GOLDEN.read_bytes()
    parse_record(data[:FIRST])
    label_of_the_next = data[FIRST + SECOND - 1024 : FIRST + SECOND]
    with pytest.raises(ValueError, match="not one whole"):
        parse_record(data[: FIRST - 1024] + label_of_the_next)
    with pytest.raises(ValueError, match=r"member '1000000000\.jpg'"):
        parse_record(data[: FIRST + 1024])
    cuts = [(512, FIRST), (0, FIRST - 1), (0, 1024), (0, FIRST - 1024), (1024, FIRST)]
    for begin, end in cuts:
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
        ("00000007.cls", tarfile.REGTYPE),  # eight digits
        ("00000007x.cls", tarfile.REGTYPE),
        ("000000007.json", tarfile.REGTYPE),  # twice
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
    words = "has members" if name.endswith("pyd") else f"member '{name}' does not belong into a"
    with pytest.raises(ValueError, match=words):
        parse_record(buffer.getvalue()[:end])


def test_pickles_in_npy_members_are_not_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    parts = dict(members(RECORDS[0])) | {"fast.density.npy": buffer.getvalue()}
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


@pytest.mark.parametrize("quality", [90, 0])
def test_a_reader_of_thirty_lines_written_from_the_page_reads_all_of_it(
    quality, small_source, tmp_path
):
    import plain_reader

    detectors = tuple(preprocess.detector_settings(name) for name in ("fast", "orb"))
    chosen = small(detectors=detectors, bank=3, weights=(0.25, 16), quality=quality)
    preprocess.build_shards(preprocess.open_source(str(small_source)), tmp_path / "set", chosen, 1)
    found = list(plain_reader.records(tmp_path / "set"))
    assert len(Path(plain_reader.__file__).read_text().splitlines()) <= 30
    ours = ShardSet(tmp_path / "set")
    assert len(found) == len(ours) == 40
    kinds = ("density", "counts", "weights")
    arrays = [f"{name}.{kind}.npy" for kind in kinds for name in ("fast", "orb")]
    frame = "jpg" if quality else "frame.npy"
    for number, (suffixes, theirs) in enumerate(found):
        record = ours[number]
        assert suffixes == [frame, "json", *arrays, "cls"]
        for name in ("frame", "label", "height", "width", "source"):
            assert theirs[name] == getattr(record, name)
        bank = Bank(np.array(theirs["boxes"]), np.array(theirs["flips"], bool), record.bank.counts)
        assert bank.equals(record.bank)
        for kind, mine in zip(kinds, (record.maps, bank.counts, record.weights), strict=True):
            for name, array in mine.items():
                np.testing.assert_array_equal(theirs[f"{name}.{kind}"], array)
                assert theirs[f"{name}.{kind}"].dtype == array.dtype
