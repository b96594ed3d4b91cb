"""Sources in many files: tars of others, Parquet, our own shards; hostile ones are refused."""

import io
import json

import archives
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from archives import picture, tar_bytes
from conftest import settings
from PIL import Image

import preprocess
from preprocess import Rejected, build_shards, decode_image, open_source
from shards import ShardSet, UserError, decode_frame
from shards.verification import verify_shards


def found(source):
    return [(e.name, e.label, source.read(e)) for e in source.entries]


@pytest.fixture
def tars(tmp_path):
    """Two training tars and a validation tar, with the members that people's tars have."""
    root = tmp_path / "wds"
    first = [
        ("n01/a.b_1.jpg", picture(1)),  # dots end the key: this is sample n01/a
        ("n01/a.cls", b"3"),
        ("n01/a.__worker__.pyd", b"cos\nsystem\n(S'false'\ntR."),
        ("x.json", b'{"label": 2, "filename": "x"}'),
        ("x.PNG", picture(2, ".png")),
        ("y.webp", picture(3)),
        ("y.json", b'{"caption": "two\\ncats"}'),
        ("y.txt", b"two cats"),
    ]
    second = [("0000.jpeg", picture(4)), ("0000.cls", b"0\n"), ("0000.features.pickle", b"\x80")]
    archives.unpack(
        [
            ("d-train-0000.tar", tar_bytes(first)),
            ("d-train-0001.tar", tar_bytes(second)),
            ("d-validation-0000.tar", tar_bytes(second)),
            ("readme.md", b"r"),
        ],
        root,
    )
    return root


def test_webdataset_tars_of_others(tars):
    source = open_source(f"webdataset:{tars}")
    assert found(source) == [
        ("d-train-0000.tar/n01/a.b_1.jpg", 3, picture(1)),
        ("d-train-0000.tar/x.PNG", 2, picture(2, ".png")),
        ("d-train-0000.tar/y.webp", -1, picture(3)),
        ("d-train-0001.tar/0000.jpeg", 0, picture(4)),
    ]
    assert (source.classes, source.ignored) == (["0", "1", "2", "3"], 3)
    assert [e.label for e in open_source(f"webdataset:{tars}", "val").entries] == [0]
    with pytest.raises(ValueError, match="no split test; by --split there is train, val"):
        open_source(f"webdataset:{tars}", "test")
    archives.unpack([("d-extra.tar", tar_bytes([]))], tars)
    with pytest.raises(ValueError, match=r"'d-extra.tar' does not tell its split, as others do"):
        open_source(f"webdataset:{tars}")
    (tars / "d-extra.tar").unlink()
    one = open_source(f"webdataset:{tars / 'd-train-0001.tar'}")
    assert [(e.name, e.part) for e in one.entries] == [("0000.jpeg", "")]
    with pytest.raises(ValueError, match=r"0001.tar is one file and has no split val"):
        open_source(f"webdataset:{tars / 'd-train-0001.tar'}", "val")
    (tars / "listing.txt").write_text("# chosen\nd-train-0001.tar\nd-validation-0000.tar\n")
    listed = open_source(f"webdataset:{tars / 'listing.txt'}")
    assert [e.part for e in listed.entries] == ["d-train-0001.tar", "d-validation-0000.tar"]
    (tars / "classnames.txt").write_text("ant\nbee\ncat\ndog\n")
    assert open_source(f"webdataset:{tars}").classes == ["ant", "bee", "cat", "dog"]
    (tars / "classnames.txt").write_text("ant\nbee\n")
    with pytest.raises(ValueError, match="label 3 is none of the 2 classes"):
        open_source(f"webdataset:{tars}")
    with pytest.raises(ValueError, match="say webdataset:"):
        open_source(str(tars))


def test_descriptions_tell_parts_apart(tars):
    before = open_source(f"webdataset:{tars}").description()
    (tars / "d-train-0001.tar").rename(tars / "d-train-0002.tar")
    assert open_source(f"webdataset:{tars}").description()["sha256"] != before["sha256"]


def test_hostile_tars_of_others(tmp_path):
    for number, (words, name, label) in enumerate(
        [
            ("'a.cls' gives no label: b'cat'", "a.jpg", b"cat"),
            ("gives no label", "a.jpg", b"1" * 40),
            ("gives no label", "a.jpg", b"-2"),
        ]
    ):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(tar_bytes([(name, picture(0)), ("a.cls", label)]))
        with pytest.raises(ValueError, match=words):
            open_source(f"webdataset:{path}")
    path = tmp_path / "names.tar"
    names = ["../up.jpg", "/etc/abs.jpg", "new\nline.jpg", "twice.jpg", "twice.jpg"]
    members = [(name, picture(n)) for n, name in enumerate(names)]
    path.write_bytes(tar_bytes([*members, ("link.jpg", None)]))
    out = tmp_path / "out"
    manifest = build_shards(open_source(f"webdataset:{path}"), out, settings(), 1, max_rejected=1)
    assert manifest.ledger.rejected == {"not-a-file": 1}
    records = ShardSet(out)
    assert [records[n].source for n in range(5)] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "0.tar",
        "1.tar",
        "2.tar",
        "names.tar",
        "out",
    ]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "out.tar").symlink_to(path)
    for text in (b"../x.tar\n", b"nul\0/x.tar\n", b"caf\xe9.tar\n"):
        (tmp_path / "list.txt").write_bytes(text)
        for place in ("folder", "list.txt"):
            with pytest.raises(UserError, match=r"cannot be read: (link|vanished)"):
                open_source(f"webdataset:{tmp_path / place}")
    (tmp_path / "caf\udce9.tar").write_bytes(path.read_bytes())
    assert len(open_source(f"webdataset:{tmp_path / 'list.txt'}").entries) == 6


def test_a_part_stays_open_and_another_file_of_its_name_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([(f"{n}.jpg", picture(n)) for n in range(20)]))
    source = open_source(f"webdataset:{path}")
    opened = []
    real = open
    monkeypatch.setattr("builtins.open", lambda *a, **k: opened.append(a) or real(*a, **k))
    assert [data for *_, data in found(source)] == [picture(n) for n in range(20)]
    assert len(opened) == 1
    path.unlink()
    path.write_bytes(b"short")
    with pytest.raises(Rejected, match="changed"):
        source.read(source.entries[5])
    path.unlink()
    with pytest.raises(Rejected, match="vanished"):
        source.read(source.entries[5])


def write_parquet(path, rows, features=None, group=2):
    """As the hub keeps images: a struct of bytes and path, names of classes in the metadata."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    if features:
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    table = pa.table({"image": [r[0] for r in rows], "label": [r[1] for r in rows]}, schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table, path, row_group_size=group)


FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["tench", "goldfish"], "_type": "ClassLabel"},
}


def test_parquet_as_the_hub_keeps_it(tmp_path):
    pictures = [picture(n) for n in range(5)]
    rows = [({"bytes": data, "path": f"n{n}.JPEG"}, n % 2) for n, data in enumerate(pictures)]
    rows[4] = ({"bytes": None, "path": "/etc/passwd"}, -1)
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", rows[:3], FEATURES)
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", rows[3:], FEATURES)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows[:1], FEATURES)
    source = open_source(f"parquet:{tmp_path}")
    assert source.classes == ["tench", "goldfish"]
    assert [entry.label for entry in source.entries] == [0, 1, 0, 1, -1]
    assert source.entries[3].name == "data/train-00001-of-00002.parquet/n3.JPEG"
    assert [
        data
        for *_, data in found(preprocess.Source("parquet", source.root, source.entries[:4], [], 0))
    ] == pictures[:4]
    with pytest.raises(Rejected, match="not-an-image"):
        source.read(source.entries[4])
    assert len(open_source(f"parquet:{tmp_path}", "test").entries) == 1
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", [(rows[0][0], 7)], FEATURES)
    with pytest.raises(ValueError, match="row 0: label 7 is none of 2 classes"):
        open_source(f"parquet:{tmp_path}")
    table = pa.table({"image": [b"x"], "label": ["cat"]})
    pa.parquet.write_table(table, tmp_path / "words.parquet")
    with pytest.raises(ValueError, match="row 0: the label 'cat' is no whole number; number the"):
        open_source(f"parquet:{tmp_path / 'words.parquet'}")
    (tmp_path / "words.parquet").unlink()
    with pytest.raises(ValueError, match="there is no split val"):
        open_source(f"parquet:{tmp_path}", "validation")
    (tmp_path / "data" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="is no whole Parquet file"):
        open_source(f"parquet:{tmp_path}")


def test_other_images_of_the_same_size_are_another_source(tmp_path):
    path, told = tmp_path / "train.parquet", []
    for first in range(30, 60, 3):
        pixels = np.arange(first, first + 3, dtype=np.uint8).repeat(48).reshape(3, 4, 4, 3)
        write_parquet(path, [({"bytes": encoded(each), "path": None}, 0) for each in pixels])
        told.append((path.stat().st_size, open_source(f"parquet:{path}").description()["sha256"]))
    assert len({size for size, _ in told}) == 1
    assert len({sha256 for _, sha256 in told}) == len(told)


def encoded(pixels):
    """Without compression."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def test_parquet_without_metadata_and_in_the_hubs_cache(tmp_path):
    repo = tmp_path / "datasets--a--b"
    write_parquet(repo / "blobs" / "abc", [({"bytes": picture(0), "path": None}, 1)])
    snapshot = repo / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (snapshot / "train-0.parquet").symlink_to("../../blobs/abc")
    source = open_source(f"parquet:{snapshot}")
    assert source.classes == ["0", "1"]
    assert found(source) == [("train-0.parquet/0", 1, picture(0))]
    (snapshot / "train-0.parquet").unlink()
    (tmp_path / "elsewhere.parquet").write_bytes((repo / "blobs" / "abc").read_bytes())
    (snapshot / "train-0.parquet").symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(ValueError, match="cannot be read: link"):
        open_source(f"parquet:{snapshot}")


@pytest.mark.parametrize("quality", [90, 0])
def test_finished_shards_as_a_source(quality, tmp_path):
    members = [(f"{'ab'[n % 2]}/{n}.jpg", picture(n)) for n in range(6)]
    archives.unpack(members, tmp_path / "source")
    chosen = settings(quality=quality)
    build_shards(open_source(str(tmp_path / "source")), tmp_path / "old", chosen, 1)
    with pytest.raises(UserError, match="old is one set and has no split val; leave --split out"):
        open_source(f"shards:{tmp_path / 'old'}", "val")
    source = open_source(f"shards:{tmp_path / 'old'}")
    records = ShardSet(tmp_path / "old")
    assert source.classes == ["a", "b"]
    for number in range(6):
        entry, record = source.entries[number], records[number]
        assert (entry.name, entry.label) == (record.source, record.label)
        pixels = decode_image(source.read(entry))
        assert np.array_equal(pixels, decode_frame(record.frame))
    orb = settings(quality=quality, detectors=(preprocess.detector_settings("orb"),))
    build_shards(source, tmp_path / "new", orb, 1)
    assert verify_shards(tmp_path / "new", "decode") == []
    again = build_shards(open_source(f"shards:{tmp_path / 'old'}"), tmp_path / "new", orb, 1)
    assert again.count == 6
    with (tmp_path / "old" / "shard-000000.tar").open("r+b") as file:
        file.write(bytes(100))
    with pytest.raises(Rejected, match="changed"):
        source.read(source.entries[0])
