"""Listing: a fixed order, labels from folders, odd names, nothing followed out of its root."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from archives import cifar10_binary, picture, tar_bytes, unpack
from conftest import settings

from preprocess import Rejected, build_shards, open_source
from preprocess.layouts.folder import list_folder
from preprocess.layouts.tar import members
from preprocess.repair import repair_shards
from preprocess.source import Source
from shards.beton import convert_to_ffcv

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
        assert source.read(entry) == (tree / entry.name).read_bytes()


def test_a_name_that_is_no_utf8_survives(tree):
    raw = os.fsencode(tree / "a") + b"/\xff\xfe.jpg"
    with open(raw, "wb") as file:
        file.write(b"raw")
    source = open_source(str(tree))
    entry = next(e for e in source.entries if os.fsencode(e.name).endswith(b"\xff\xfe.jpg"))
    assert Source("folder", str(tree), [], []).read(entry) == b"raw"
    assert source.description()["sha256"]


def test_changes_of_the_inputs_change_the_description(tree):
    before = open_source(str(tree)).description()
    os.utime(tree / "b" / "y.webp", ns=(1, 1))
    touched = open_source(str(tree)).description()
    (tree / "b" / "new.jpg").write_bytes(b"n")
    assert len({d["sha256"] for d in (before, touched, open_source(str(tree)).description())}) == 3


@pytest.mark.parametrize("kind", ["tar", "webdataset", "cifar10", "ffcv"])
def test_other_images_of_the_same_sizes_are_another_source(kind, built, tmp_path):
    def listed():
        return open_source(f"{kind}:{path}".removeprefix("tar:"), partial=True).description()

    if kind == "cifar10":
        path = tmp_path / "cifar-10-batches-bin"
        unpack(cifar10_binary(), tmp_path)
        file, at = path / "data_batch_3.bin", 5000
    elif kind == "ffcv":
        convert_to_ffcv(built, tmp_path / "set")
        path = file = tmp_path / "set" / "records.beton"
        at = 1 << 16
    else:
        path = file = tmp_path / "images.tar"
        path.write_bytes(tar_bytes([("a/1.jpg", picture(1)), ("a/2.jpg", picture(2))]))
    before = listed()
    if kind != "ffcv":  # others tell an image by itself, so a copy is the same source
        os.utime(file, ns=(2, 2))
    assert listed() == before
    content = bytearray(file.read_bytes())
    if file.suffix == ".tar":  # its writer notes when the image was changed
        content = tar_bytes([("a/1.jpg", picture(1)), ("a/2.jpg", picture(2)[::-1])], mtime=7)
    else:
        content[at] ^= 1
    file.write_bytes(content)
    if kind == "ffcv":
        os.utime(file, ns=(1, 1))
    after = listed()
    assert after["sha256"] != before["sha256"]
    assert after | {"sha256": ""} == before | {"sha256": ""}


def test_links_out_of_the_source_are_rejected_and_inside_are_read(tree, tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    (tree / "a" / "out.jpg").symlink_to(secret)
    (tree / "a" / "in.jpg").symlink_to(tree / "b" / "y.webp")
    (tree / "outside").symlink_to(tmp_path, target_is_directory=True)
    (tree / "a" / "loop").symlink_to(tree, target_is_directory=True)
    source = open_source(str(tree))
    entries = {entry.name: entry for entry in source.entries}
    assert Source("folder", str(tree), [], []).read(entries["a/in.jpg"]) == b"y"
    for name in ("a/out.jpg", "outside"):
        with pytest.raises(Rejected) as caught:
            Source("folder", str(tree), [], []).read(entries[name])
        assert caught.value.reason == "link"
    assert source.classes == ["a", "b"]


def test_a_pipe_named_as_an_image_does_not_hang(tree):
    os.mkfifo(tree / "a" / "pipe.jpg")
    source = open_source(str(tree))
    entry = next(entry for entry in source.entries if entry.name == "a/pipe.jpg")
    with pytest.raises(Rejected, match="not-a-file"):
        Source("folder", str(tree), [], []).read(entry)
    (tree / "b" / "y.webp").unlink()
    os.mkfifo(tree / "b" / "y.webp")
    entry = next(entry for entry in source.entries if entry.name == "b/y.webp")
    with pytest.raises(Rejected, match="not-a-file"):
        Source("folder", str(tree), [], []).read(entry)


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
    found = [Source("tar", str(path), [], []).read(entry) for entry in source.entries]
    assert sorted(found) == sorted([data for _, data in members] + [b"again"])
    assert source.ignored == 1


@pytest.mark.parametrize("way", ["data/photos", "data//photos", "data/./photos", "./data/photos"])
def test_classes_are_the_same_however_a_path_was_typed(way, tmp_path):
    make_tar(tmp_path / "x.tar", [(f"{way}/{c}/{n}.jpg", b"x") for c in "ab" for n in "12"])
    source = open_source(str(tmp_path / "x.tar"))
    assert (source.classes, [entry.label for entry in source.entries]) == (["a", "b"], [0, 0, 1, 1])


def test_what_stands_behind_the_end_of_a_tar_is_not_lost_in_silence(tmp_path):
    path = tmp_path / "x.tar"
    make_tar(path, [(f"a/{n}.jpg", b"x") for n in range(6)])
    whole = path.read_bytes()
    hole = bytearray(whole)
    hole[2048:2560] = bytes(512)  # the header of the third
    for data in (bytes(hole), whole + whole, whole + bytes(1 << 21) + b"x"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"data, and no header, behind byte \d+"):
            open_source(str(path))
    path.write_bytes(whole + bytes(1 << 21))
    assert len(open_source(str(path)).entries) == 6


def test_a_webdataset_tar_is_not_read_without_its_labels(tmp_path):
    path = tmp_path / "000.tar"
    make_tar(path, [("1.jpg", b"x"), ("1.cls", b"3")])
    with pytest.raises(ValueError, match=r"is a WebDataset tar, with labels; say webdataset:/.*r$"):
        open_source(str(path))
    assert open_source(f"webdataset:{path}").entries[0].label == 3


def test_a_server_of_whole_files_is_not_taken_for_a_broken_tar():
    class Remote(io.BytesIO):
        def read(self, size=-1):
            raise ValueError("The HTTP server doesn't appear to support range requests.")

    with pytest.raises(ValueError, match=r"server of http://x/y.tar gives whole files only"):
        list(members(Remote(), "http://x/y.tar"))


def test_a_hostile_tar_reaches_nothing(tmp_path):
    path = tmp_path / "bad.tar"
    members = [("../../etc/x.jpg", b"up"), ("/abs/y.jpg", b"abs"), ("a/link.jpg", None)]
    make_tar(path, members)
    source = open_source(str(path))
    found = {}
    for entry in source.entries:
        try:
            found[entry.name] = Source("tar", str(path), [], []).read(entry)
        except Rejected as error:
            found[entry.name] = error.reason
    assert found == {"../../etc/x.jpg": b"up", "/abs/y.jpg": b"abs", "a/link.jpg": "not-a-file"}


@pytest.mark.parametrize("time", ["nan", "-inf", "1e300", "none"])
def test_a_strange_time_in_a_tar_is_no_error(time, tmp_path):
    info = tarfile.TarInfo("a/1.jpg")
    info.pax_headers = {"mtime": time}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info)
    assert open_source(str(tmp_path / "x.tar")).description()["inputs"] == 1


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


def test_three_mistakes_are_three_lines(tree):
    """What is given is missing, is a file of another kind, or lacks the split."""
    (tree / "train").mkdir()
    photo = tree / "loose.jpg"
    parquet = tree / "rows.parquet"
    parquet.write_bytes(b"x" * 600)
    (tree / "x.tar").write_bytes(tar_bytes([("a/1.jpg", b"x")]))
    for where, split, words in [
        (f"{tree}/c", "", f"no source at {tree}/c: give a folder"),
        (f"folder:{tree}/c", "", f"no folder source at {tree}/c: there is no such place"),
        (f"imagenet:{tree}/c", "", f"there is no {tree}/c to read imagenet from"),
        (str(photo), "", f"{photo} is a file, and no uncompressed .tar; give a folder"),
        (str(parquet), "", f"say parquet:{parquet}"),
        (f"cifar10:{photo}", "", f"{photo} is not a whole uncompressed .tar"),
        (f"places365:{photo}", "", f"{photo} is a file that is no places365"),
        (f"parquet:{tree}/a", "", f"{tree}/a holds no .parquet; name one"),
        (f"webdataset:{tree}/a", "", f"{tree}/a holds no .tar; name one"),
        (str(tree), "val", f"{tree} has no folder val for --split val; by --split there is train"),
        (f"folder:{tree}/a", "val", "has no folder val for --split val; leave --split out"),
        (f"{tree}/x.tar", "val", f"{tree}/x.tar is one file and has no split val"),
        (f"imagenet:{tree}/a", "val", f"{tree}/a holds no imagenet (split val): looked for"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            open_source(where, split)
        assert "\n" not in str(caught.value)


def test_folder_takes_a_tar_as_a_path_does(tmp_path):
    make_tar(tmp_path / "x.tar", [("a/1.jpg", b"x")])
    assert open_source(f"folder:{tmp_path}/x.tar") == open_source(f"{tmp_path}/x.tar")


def test_a_folder_called_as_a_layout_is_read_by_its_path_only(tree, monkeypatch):
    """`make shards DATASET=shards` in a checkout had listed the package of that name."""
    monkeypatch.chdir(tree)
    (tree / "a").rename(tree / "shards")
    with pytest.raises(ValueError, match=r"give shards:PATH .*, or ./shards for the folder"):
        open_source("shards")
    assert open_source("./shards").entries


def refuse(monkeypatch, *folders):
    """Reading the `folders` fails, also for root, whom permissions do not stop."""
    real, refused = os.scandir, {str(folder) for folder in folders}

    def scandir(path="."):
        if str(path) in refused:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)


@pytest.mark.parametrize("name", ["a", "a/deeper"])
def test_a_folder_that_cannot_be_listed_stops_or_is_in_the_ledger(
    name, small_source, tmp_path, monkeypatch
):
    (small_source / "a" / "deeper").mkdir(parents=True)
    unpack([("a/1.jpg", picture(1)), ("a/deeper/2.jpg", picture(2))], small_source)
    whole = open_source(str(small_source))
    refuse(monkeypatch, small_source / name)
    with pytest.raises(ValueError, match=r"a(/deeper)?/' cannot be listed, .*chmod") as caught:
        open_source(str(small_source))
    assert f"'{small_source / name}/'" in str(caught.value)
    assert "\n" not in str(caught.value)
    source = open_source(str(small_source), partial=True)
    assert source.classes == whole.classes  # labels do not shift
    assert [e.label for e in source.entries if e.flaw] == [whole.classes.index("a")]
    manifest = build_shards(source, tmp_path / "out", settings(), 1, max_rejected=1)
    ledger = manifest.ledger
    assert (ledger.rejected, ledger.inputs) == ({"unreadable": 1}, len(source.entries))
    assert f'"source": "{name}/"' in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_a_root_that_cannot_be_listed_is_one_line(tree, monkeypatch):
    refuse(monkeypatch, tree)
    for where in (str(tree), f"imagenet:{tree}", f"webdataset:{tree}", f"folder:{tree}"):
        with pytest.raises(ValueError, match=r"cannot be (listed|read)") as caught:
            open_source(where, partial=True)
        assert str(tree) in str(caught.value)


AS_NOBODY = """
import os, sys
from preprocess import open_source
os.chroot(sys.argv[1])  # folders above may be closed to others
os.setgroups([])
os.setuid(65534)
print([entry.name for entry in open_source("/root", partial=True).entries if entry.flaw])
open_source("/root")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_permissions_are_respected_by_name(tree, tmp_path):
    """As a user without rights: a folder that cannot be listed, and files without facts."""
    tmp_path.chmod(0o755)
    (tree / "b").chmod(0o311)
    (tree / "a" / "deeper").chmod(0o644)
    command = [sys.executable, "-c", AS_NOBODY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "chroot" in done.stderr:
        pytest.skip(f"chroot is not allowed here: {done.stderr.splitlines()[-1]}")
    assert done.stdout == "['a/deeper/z.jpg', 'b/']\n", done.stderr
    assert "UserError: '/root/b/' cannot be listed" in done.stderr


def test_finished_sets_in_a_source_are_left_out_and_counted(built, small_source, tmp_path):
    """Their pictures had been inputs, and their folders classes."""
    before = open_source(str(small_source))
    (built / "fidelity.png").write_bytes(picture(0))
    (built / "below").mkdir()
    (built / "below" / "x.png").write_bytes(picture(0))
    for place in ("demo-fast", "class1/deep/demo-fast"):
        shutil.copytree(built, small_source / place)
    (small_source / "class2" / "manifest.json").write_text('{"name": "an app"}')
    source = open_source(str(small_source))
    assert source.sets == ("class1/deep/demo-fast", "demo-fast")
    assert source.entries == before.entries
    assert source.classes == before.classes
    assert source.ignored == 1  # the manifest.json of others
    with pytest.raises(ValueError, match=r"is a finished set of shards; .* by shards:"):
        open_source(str(small_source / "demo-fast"))
    command = [sys.executable, "-m", "kamim", "shards", "build", str(small_source)]
    flags = ["--frame", "64", "--crop", "64", "--map-crops", "1", "--grid", "16", "--jobs", "1"]
    done = subprocess.run([*command, str(tmp_path / "out"), *flags], capture_output=True, text=True)
    assert "40 inputs = 40 written" in done.stdout
    assert "2 folders of finished shards left out: class1/deep/demo-fast" in done.stderr
    listed = open_source(f"webdataset:{built}")  # named itself, it is one of tars
    assert len(listed.entries) == 40


def test_links_out_of_a_class_are_named(tree, tmp_path):
    """A linked folder within a class had been left out without a word."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.jpg").write_bytes(b"x")
    (tree / "a" / "far").symlink_to(tmp_path / "far")
    (tree / ".pool").mkdir()  # within the source, and where nobody looks
    (tree / "a" / "near").symlink_to(tree / ".pool")
    flawed = [entry for entry in open_source(str(tree)).entries if entry.flaw]
    assert [(entry.name, entry.label, entry.flaw) for entry in flawed] == [
        ("a/far/", 0, "link"),
        ("a/near/", 0, "link"),
    ]


def test_an_out_in_the_source_is_refused(small_source, tmp_path):
    source = open_source(str(small_source))
    (tmp_path / "way").symlink_to(small_source)
    for out in (
        small_source,
        small_source / "out",
        small_source / "class0" / "out",
        tmp_path / "way" / "out",
        small_source / ".." / "source" / "out",
    ):
        for work in (build_shards, repair_shards):
            with pytest.raises(ValueError, match="name a folder outside of it") as caught:
                work(source, out, settings(), 1)
            assert str(out) in str(caught.value)
            assert str(small_source) in str(caught.value)
        assert not (small_source / "out").exists()
    assert list_folder(str(small_source)) == source
    (tmp_path / "x.tar").write_bytes(tar_bytes([("a/1.jpg", picture(0))]))
    build_shards(open_source(str(tmp_path / "x.tar")), tmp_path / "source-out", settings(), 1)


def test_the_demo_has_at_least_256_photographs(demo_images):
    assert len(demo_images) >= 256
    assert len({image.tobytes() for image in demo_images}) == len(demo_images)
    assert min(min(image.shape[:2]) for image in demo_images) >= 128
