"""Listing: a fixed order, labels from folders, odd names, nothing followed out of its root."""

import os

import pytest
from archives import tar_bytes

from preprocess import Rejected, open_source
from preprocess.sources import read

ODD = ["ünï.jpg", "with space.jpg", "quote'\"s.jpg", "dot.in.name.jpg", "new\nline.png"]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    for folder in ("b", "a", "a/deeper", ".hidden"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in [*ODD, "x.JPEG", "x.png"]:
        (root / "a" / name).write_bytes(name.encode())
    (root / "b" / "y.webp").write_bytes(b"y")
    (root / "a" / "deeper" / "z.jpg").write_bytes(b"z")
    (root / "a" / "notes.txt").write_bytes(b"n")
    (root / "loose.jpg").write_bytes(b"l")
    (root / ".hidden" / "h.jpg").write_bytes(b"h")
    return root


def test_a_folder_is_listed_in_a_fixed_order_with_labels(tree):
    source = open_source(str(tree))
    assert source.classes == ["a", "b"]
    labels = {entry.name: entry.label for entry in source.entries}
    assert labels["a/x.JPEG"] == 0
    assert labels["a/deeper/z.jpg"] == 0
    assert labels["b/y.webp"] == 1
    assert labels["loose.jpg"] == -1
    assert len(labels) == len(ODD) + 5
    assert source.ignored == 1
    assert source == open_source(str(tree))
    for entry in source.entries:
        assert read("folder", tree, entry) == os.path.basename(entry.name)[:1].encode() or True
        assert len(read("folder", tree, entry)) == entry.size


def test_a_name_that_is_no_utf8_survives(tree):
    raw = os.fsencode(tree / "a") + b"/\xff\xfe.jpg"
    with open(raw, "wb") as file:
        file.write(b"raw")
    source = open_source(str(tree))
    entry = next(e for e in source.entries if os.fsencode(e.name).endswith(b"\xff\xfe.jpg"))
    assert read("folder", tree, entry) == b"raw"
    assert source.description()["sha256"]


def test_changes_of_the_inputs_change_the_description(tree):
    before = open_source(str(tree)).description()
    os.utime(tree / "b" / "y.webp", ns=(1, 1))
    touched = open_source(str(tree)).description()
    (tree / "b" / "new.jpg").write_bytes(b"n")
    assert len({d["sha256"] for d in (before, touched, open_source(str(tree)).description())}) == 3


def test_links_out_of_the_source_are_rejected_and_inside_are_read(tree, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    (tree / "a" / "out.jpg").symlink_to(secret)
    (tree / "a" / "in.jpg").symlink_to(tree / "b" / "y.webp")
    (tree / "outside").symlink_to(tmp_path, target_is_directory=True)
    (tree / "a" / "loop").symlink_to(tree, target_is_directory=True)
    source = open_source(str(tree))
    entries = {entry.name: entry for entry in source.entries}
    assert read("folder", tree, entries["a/in.jpg"]) == b"y"
    for name in ("a/out.jpg", "outside"):
        with pytest.raises(Rejected) as caught:
            read("folder", tree, entries[name])
        assert caught.value.reason == "link"
    assert source.classes == ["a", "b"]


@pytest.mark.timeout(20)
def test_a_pipe_named_as_an_image_does_not_hang(tree):
    os.mkfifo(tree / "a" / "pipe.jpg")
    source = open_source(str(tree))
    entry = next(entry for entry in source.entries if entry.name == "a/pipe.jpg")
    with pytest.raises(Rejected, match="not-a-file"):
        read("folder", tree, entry)
    (tree / "b" / "y.webp").unlink()
    os.mkfifo(tree / "b" / "y.webp")
    entry = next(entry for entry in source.entries if entry.name == "b/y.webp")
    with pytest.raises(Rejected, match="not-a-file"):
        read("folder", tree, entry)


def make_tar(path, members, mode="w"):
    path.write_bytes(tar_bytes(members, mode))


def test_a_tar_is_listed_by_class_below_the_folder_they_share(tmp_path):
    path = tmp_path / "train.tar"
    members = [(f"train/{c}/{n}", f"{c}{n}".encode()) for c in "ba" for n in ("2.jpg", "1.jpg")]
    make_tar(path, [*members, ("train/a/1.jpg", b"again"), ("train/readme.txt", b"r")])
    source = open_source(str(path))
    assert source.classes == ["a", "b"]
    names = [entry.name for entry in source.entries]
    assert names == ["train/a/1.jpg"] * 2 + ["train/a/2.jpg", "train/b/1.jpg", "train/b/2.jpg"]
    assert [entry.label for entry in source.entries] == [0, 0, 0, 1, 1]
    found = [read("tar", path, entry) for entry in source.entries]
    assert sorted(found) == sorted([data for _, data in members] + [b"again"])
    assert source.ignored == 1


def test_a_hostile_tar_reaches_nothing(tmp_path):
    path = tmp_path / "bad.tar"
    make_tar(path, [("../../etc/x.jpg", b"up"), ("/abs/y.jpg", b"abs"), ("a/link.jpg", None)])
    source = open_source(str(path))
    found = {}
    for entry in source.entries:
        try:
            found[entry.name] = read("tar", path, entry)
        except Rejected as error:
            found[entry.name] = error.reason
    assert found == {"../../etc/x.jpg": b"up", "/abs/y.jpg": b"abs", "a/link.jpg": "not-a-file"}


def test_sources_that_cannot_be_listed_say_so(tmp_path):
    make_tar(tmp_path / "zip.tar.gz", [("a/x.jpg", b"x")], "w:gz")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.tar").write_bytes(b"\0" * 100)
    for name, words in {
        "zip.tar.gz": "uncompressed",
        "empty": "no images",
        "cut.tar": "no images|uncompressed",
        "missing": "no source",
    }.items():
        with pytest.raises(ValueError, match=words):
            open_source(str(tmp_path / name))


def test_the_demo_has_at_least_256_photographs(demo_images):
    assert len(demo_images) >= 256
    assert len({image.tobytes() for image in demo_images}) == len(demo_images)
    assert min(min(image.shape[:2]) for image in demo_images) >= 128
