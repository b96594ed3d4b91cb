"""Datasets by name: each published layout with its oddities gives the same images and labels."""

import os
import pickle
import subprocess
import sys

import archives
import numpy as np
import pytest
from archives import WNIDS
from conftest import DATA, errors, settings

import shards
from preprocess import Rejected, build_shards, datasets, decode_image, open_source
from shards import UserError


def small(where, split=""):
    """A few images in the layout of a dataset."""
    return open_source(where, split, partial=True)


def found(source):
    """(name, label, bytes) of every entry."""
    return [(e.name, e.label, source.read(e)) for e in source.entries]


@pytest.fixture
def images():
    return archives.imagenet_images()


def test_imagenet_is_the_same_from_the_tar_of_tars_from_folders_and_from_kaggle(images, tmp_path):
    tar = archives.imagenet_tar(tmp_path / "tars" / "ILSVRC2012_img_train.tar", images)
    kaggle = tmp_path / "kaggle"
    archives.imagenet_folder(kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "train", images)
    plain = archives.imagenet_folder(tmp_path / "plain" / "train", images)
    whole = tmp_path / "whole.tar"
    whole.write_bytes(
        archives.tar_bytes((f"{w}/{n}", d) for w in images for n, d in images[w].items())
    )
    expected = [
        (f"{wnid}/{name}", label, images[wnid][name])
        for label, wnid in enumerate(WNIDS)
        for name in sorted(images[wnid])
    ]
    for place in (tar, tar.parent, kaggle, kaggle / "ILSVRC", plain, plain.parent, whole):
        source = small(f"imagenet:{place}")
        assert source.classes == list(WNIDS), place
        assert found(source) == expected, place
    for name, _, data in expected:  # the PNG called JPEG and the CMYK one among them
        assert decode_image(data).shape == (40, 48, 3), name
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    manifests = [
        build_shards(small(f"imagenet:{place}"), tmp_path / "out" / str(n), settings(), 1)
        for n, place in enumerate((tar, plain))
    ]
    assert [shard.sha256 for shard in manifests[0].shards] == [
        shard.sha256 for shard in manifests[1].shards
    ]
    assert manifests[0].ledger.written == 9
    now = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if "out" not in p.parts}
    assert {p: t for p, t in now.items() if p != tmp_path} == {
        p: t for p, t in before.items() if p != tmp_path
    }  # nothing was unpacked


def test_imagenets_validation_set_has_kaggles_answers(images, tmp_path):
    flat = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    names = [f"ILSVRC2012_val_0000000{n}" for n in (1, 2, 3)]
    archives.unpack([(f"{n}.JPEG", archives.picture(k)) for k, n in enumerate(names)], flat)
    with pytest.raises(ValueError, match=r"put Kaggle's LOC_val_solution.csv beside it"):
        small(f"imagenet:{tmp_path}", "val")
    rows = [f"{n},{w} 1 2 3 4 {w} 5 6 7 8" for n, w in zip(names, reversed(WNIDS), strict=True)]
    answers = tmp_path / "LOC_val_solution.csv"
    answers.write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    source = small(f"imagenet:{tmp_path}", "val")
    assert [(e.name, e.label) for e in source.entries] == [
        (f"{n}.JPEG", 2 - k) for k, n in enumerate(names)
    ]
    answers.write_text("\n".join(["ImageId,PredictionString", *rows[:2]]) + "\n")
    with pytest.raises(ValueError, match=r"gives 'ILSVRC2012_val_00000003.JPEG' no class"):
        small(f"imagenet:{tmp_path}", "val")
    archives.imagenet_folder(tmp_path / "sorted" / "val", images)
    assert small(f"imagenet:{tmp_path / 'sorted'}", "val").classes == list(WNIDS)


def test_a_stray_folder_among_imagenets_classes_is_refused(images, tmp_path):
    root = archives.imagenet_folder(tmp_path, images)
    (root / "new_class").mkdir()
    (root / "new_class" / "x.jpg").write_bytes(archives.picture(0))
    with pytest.raises(ValueError, match="'new_class' among ImageNet's classes"):
        small(f"imagenet:{root}")
    assert len(open_source(f"folder:{root}").classes) == 4


def test_a_damaged_inner_tar_is_one_clear_line(images, tmp_path):
    tar = archives.imagenet_tar(tmp_path / "ILSVRC2012_img_train.tar", images)
    data = bytearray(tar.read_bytes())
    place = data.find(b"n01443537_7.JPEG")  # a header in the middle of the second inner tar
    damaged = bytearray(data)
    damaged[place : place + 60] = b"\xff" * 60
    larger = bytearray(data)
    larger[place + 124 : place + 136] = b"77777777777\0"
    negative = bytearray(data)
    negative[place + 124 : place + 136] = b"\xff" * 11 + b"\x00"
    for bad in (damaged, larger, negative, data[: place + 100]):
        tar.write_bytes(bad)
        with pytest.raises(ValueError, match=r"is not a whole uncompressed .tar") as caught:
            small(f"imagenet:{tmp_path}")
        assert "\n" not in str(caught.value)
        assert str(tar) in str(caught.value)
    tar.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"'n01443537.tar' in .*no header, behind byte \d+"):
        small(f"imagenet:{tmp_path}")


PYTHON2, BYTES_KEYS = (
    archives.python2_pickle,
    lambda table: pickle.dumps({key.encode(): value for key, value in table.items()}, protocol=2),
)


@pytest.mark.parametrize("write", [PYTHON2, pickle.dumps, BYTES_KEYS])
def test_cifar10_is_the_same_from_either_archive_packed_or_not(write, tmp_path):
    python, binary = archives.cifar10_python(write), archives.cifar10_binary()
    archives.packed(python, tmp_path / "1" / "cifar-10-python.tar.gz")
    archives.packed(binary, tmp_path / "2" / "cifar-10-binary.tar.gz")
    archives.unpack(python, tmp_path / "3")
    archives.unpack(binary, tmp_path / "4")
    places = [
        tmp_path / "3" / "cifar-10-batches-py",
        tmp_path / "4" / "cifar-10-batches-bin",
        tmp_path / "1" / "cifar-10-python.tar.gz",
        *(tmp_path / n for n in "1234"),
    ]
    for place in places:
        source = small(f"cifar10:{place}")
        assert source.classes == archives.CIFAR10_NAMES
        assert [entry.label for entry in source.entries] == [
            (b + r) % 10 for b in range(5) for r in range(4)
        ]
        for number in (0, 3, 17):
            pixels = decode_image(source.read(source.entries[number]))
            row = archives.cifar_pixels(number // 4, 4)[number % 4]
            assert np.array_equal(pixels, row.reshape(3, 32, 32).transpose(1, 2, 0))
        for split in ("test", "val"):
            test = small(f"cifar10:{place}", split)
            assert [entry.label for entry in test.entries] == [5, 6, 7, 8]
    assert source.entries[0].name == "data_batch_1/00000"
    names = [entry.name for entry in small(f"cifar10:{tmp_path / '1'}").entries]
    assert names[0] == "data_batch_1/leptodactylus_s_000000.png"


def test_cifar100_has_fine_labels(tmp_path):
    archives.unpack(archives.cifar100_python(), tmp_path / "python")
    archives.unpack(archives.cifar100_binary(), tmp_path / "binary")
    for where in ("python", "binary"):
        source = small(f"cifar100:{tmp_path / where}")
        assert source.classes == [f"fine{n}" for n in range(100)]
        assert [entry.label for entry in source.entries] == [99, 98, 97, 96]
        pixels = decode_image(source.read(source.entries[2]))
        row = archives.cifar_pixels(1, 4)[2]
        assert np.array_equal(pixels, row.reshape(3, 32, 32).transpose(1, 2, 0))


def test_cifar_as_a_tar_or_folders_of_class_folders(tmp_path):
    members = [(f"train/{c}/{n}.jpg", archives.picture(n)) for c in ("cat", "dog") for n in (1, 2)]
    (tmp_path / "train.tar").write_bytes(archives.tar_bytes(members))
    archives.unpack(members, tmp_path / "folders")
    for place in (tmp_path, tmp_path / "train.tar", tmp_path / "folders"):
        source = small(f"cifar10:{place}")
        assert source.classes == ["cat", "dog"]
        assert [entry.label for entry in source.entries] == [0, 0, 1, 1]
    members = [(name.replace("train", "test"), data) for name, data in members]
    archives.unpack(members, tmp_path / "folders")  # now it has what CIFAR-100's files are called
    assert small(f"cifar100:{tmp_path / 'folders'}").classes == ["cat", "dog"]


class Hostile:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    members = dict(archives.cifar10_python())
    mark = tmp_path / "ran"
    attacks = {
        "posix.system": pickle.dumps({"data": Hostile(os.system, (f"touch {mark}",))}),
        "builtins.eval": pickle.dumps({"data": Hostile(eval, (f"open({str(mark)!r}, 'w')",))}),
        "numpy.load": pickle.dumps({"data": Hostile(np.load, (str(mark),))}),
        "encodes as cp1252": pickle.dumps({b"x": 1}, 2).replace(b"latin1", b"cp1252"),
        "else than bytes": pickle.dumps({"data": np.zeros((4, 3072), np.float32)}),
        "something else": pickle.dumps({"data": np.array([1, "x"], object)}),
        "pickles": b"not a pickle at all",
    }
    for words, attack in attacks.items():
        members["cifar-10-batches-py/data_batch_3"] = attack
        root = tmp_path / str(abs(hash(words)))
        archives.unpack(members.items(), root)
        with pytest.raises(ValueError, match=words) as caught:
            small(f"cifar10:{root}")
        assert "data_batch_3 in" in str(caught.value)
    assert not mark.exists()


def test_cifar_that_is_not_whole_is_one_line(tmp_path):
    members = dict(archives.cifar10_binary())
    name = "cifar-10-batches-bin/data_batch_2.bin"
    for words, data in {
        "cut short": members[name][:-1],
        "label 77": b"\x4d" + members[name][1:],
    }.items():
        archives.unpack((members | {name: data}).items(), tmp_path / words)
        with pytest.raises(ValueError, match=words):
            small(f"cifar10:{tmp_path / words}")
    for number, table in enumerate(
        [
            {"data": archives.cifar_pixels(0, 2), "labels": [0, 1]},
            {"data": archives.cifar_pixels(0, 2), "labels": 7},
            {"data": archives.cifar_pixels(0, 2), "filenames": ["a", "b"], "labels": [0, "x"]},
            {"data": [1, 2]},
            {},
        ]
    ):
        python = dict(archives.cifar10_python()) | {
            "cifar-10-batches-py/data_batch_4": pickle.dumps(table)
        }
        archives.unpack(python.items(), tmp_path / f"python{number}")
        if number == 0:
            assert len(small(f"cifar10:{tmp_path / 'python0'}").entries) == 18
            continue
        with pytest.raises(ValueError, match="data_batch_4 in"):
            small(f"cifar10:{tmp_path / f'python{number}'}")
    del members[name]
    archives.unpack(members.items(), tmp_path / "gone")
    with pytest.raises(ValueError, match=r"lacks data_batch_2.bin"):
        small(f"cifar10:{tmp_path / 'gone'}")
    archive = archives.packed(archives.cifar10_python(), tmp_path / "cifar-10-python.tar.gz")
    for more in (b"", b"well compressed" * 10**5):
        archive = archives.packed([("more", more), *archives.cifar10_python()], archive)
        whole = archive.read_bytes()
        damaged = [whole[:5000]]
        for at in range(64, len(whole), len(whole) // 9):
            damaged.append(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        for data in damaged:
            archive.write_bytes(data)
            with pytest.raises(UserError, match=r"is not a whole .tar.gz"):
                small(f"cifar10:{archive}")
    archive = archives.packed([("x" * (1 << 25), b"")], archive)  # 34 kB that become 34 MB
    with pytest.raises(UserError, match=r"not a whole .tar.gz \(a header of 335\d+ bytes"):
        small(f"cifar10:{archive}")


def test_inaturalist_by_its_json_and_by_its_folders(tmp_path):
    root = archives.inaturalist(tmp_path)
    source = small(f"inaturalist:{root}")
    assert source.classes == list(archives.SPECIES)
    assert [entry.label for entry in source.entries] == [0, 0, 0, 1, 1]
    assert all(decode_image(data).shape == (40, 48, 3) for _, _, data in found(source))
    (root / "train.json").unlink()
    folders = small(f"inaturalist:{root}")
    assert [(e.label, e.size) for e in folders.entries] == [
        (e.label, e.size) for e in source.entries
    ]
    assert folders.classes == source.classes


def test_a_hostile_list_of_inaturalists_leads_nowhere(tmp_path):
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    (tmp_path / "i" / "train").mkdir(parents=True)
    (tmp_path / "i" / "train" / "out").symlink_to(tmp_path)
    names = [
        "../secret.jpg",
        str(secret),
        "train/../../secret.jpg",
        "train/out/secret.jpg",
        "train/nul\0.jpg",
        "train/nul\0/a.jpg",
        "train/new\nline.jpg",
    ]
    images = [{"id": 100 + n, "file_name": name} for n, name in enumerate(names)]
    images.append({"id": 40, "file_name": f"train/{archives.SPECIES[0]}/00000000.jpg"})
    root = archives.inaturalist(tmp_path / "i", images=images)
    source = small(f"inaturalist:{root}")
    reasons = {}
    for entry in source.entries:
        try:
            reasons[entry.name] = source.read(entry) == archives.picture(0)
        except Rejected as error:
            reasons[entry.name] = error.reason
    flaws = dict.fromkeys(names[:6], "link") | {names[6]: "vanished"}
    assert reasons == flaws | {images[-1]["file_name"]: True}
    for words, changes in {
        "category 9, which is none": {"annotations": [{"image_id": 40, "category_id": 9}]},
        "two categories": {"annotations": [{"image_id": 40, "category_id": n} for n in (0, 1)]},
        "no list of iNaturalist's": {"images": [7]},
    }.items():
        archives.inaturalist(root, **changes)
        with pytest.raises(ValueError, match=words):
            small(f"inaturalist:{root}")


@pytest.mark.parametrize("large", [False, True])
def test_places365_small_and_large(large, tmp_path):
    root = archives.places365(tmp_path / "p", large)
    source = small(f"places365:{root}")
    assert source.classes == ["a/airfield", "a/airplane_cabin", "b/bow_window/indoor"]
    assert [entry.label for entry in source.entries] == [0, 0, 1, 1, 2, 2]
    assert source.entries[4].name == "b/bow_window/indoor/00000001.jpg"
    val = small(f"places365:{root}", "val")
    assert [(e.name[-5], e.label) for e in val.entries] == [("1", 2), ("2", 1), ("3", 0)]
    with pytest.raises(ValueError, match=r"places365_train_challenge.txt from the archive"):
        small(f"places365:{root}", "train-challenge")
    lists = root / "filelist_places365-standard"
    lists.mkdir()
    for path in root.glob("*.txt"):
        path.rename(lists / path.name)
    assert small(f"places365:{root}").description() == source.description()
    listing = lists / "places365_val.txt"
    listing.write_text("Places365_val_00000001.jpg 365\n")
    with pytest.raises(ValueError, match="label 365, which no category has"):
        small(f"places365:{root}", "val")
    for line in ("Places365_val_00000001.jpg", "a.jpg " + "9" * 5000):
        listing.write_text(f"{line}\n")
        with pytest.raises(UserError, match="line 1: not a name and a label"):
            small(f"places365:{root}", "val")


def test_what_is_not_found_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAMIM_DATA", str(tmp_path / "disk"))
    monkeypatch.chdir(tmp_path)
    bases = tuple(base for base in datasets.BASES if not base.startswith("/"))
    monkeypatch.setattr(datasets, "BASES", (*bases, "/nowhere/datasets"))
    with pytest.raises(ValueError, match="was not found") as caught:
        open_source("imagenet")
    for words in (
        "ILSVRC2012_img_train.tar",
        "ILSVRC/Data/CLS-LOC/train",
        "/nowhere/datasets",
        f"{tmp_path}/disk/imagenet",
        f"{tmp_path}/home/data/imagenet",
        "image-net.org",
        "imagenet:PATH",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    images = archives.imagenet_images()
    archives.imagenet_tar(
        tmp_path / "home" / "datasets" / "imagenet" / "ILSVRC2012_img_train.tar", images
    )
    assert len(small("imagenet").entries) == 9
    archives.unpack(archives.cifar10_python(), tmp_path / "data")  # where torchvision puts it
    assert len(small("cifar10").entries) == 20
    for where, split, words in [
        ("imagenet", "test", "has no split test; it has train, val"),
        ("demo", "val", "the demo has no split val"),
        ("webdataset:", "", "needs the path or URL of images"),
        ("parquet:/nowhere", "", "no parquet source at /nowhere"),
        ("pets", "", r"no source at pets: give .*NAME:PATH; there are demo, imagenet, cifar10"),
        ("imagenet:", "", r"has no path; give imagenet:PATH"),
        ("folder", "", r"give folder:PATH \(make: DATA=PATH\)$"),
        ("folder:", "", r"give folder:PATH \(make: DATA=PATH\)"),
        ("CIFAR-10", "", r"is it cifar10\? Else"),
        ("imagnet:/x", "", r"is it imagenet:/x\? Else"),
        ("shard", "", r"is it shards:PATH\? Else"),
        ("dmeo", "", r"is it demo\? Else"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_source(where, split)


def test_the_command_takes_names_and_splits(tmp_path):
    archives.unpack(archives.cifar10_python(), tmp_path / "few")
    archives.unpack(
        [(f"{split}/cat/{split}.png", archives.picture(1, ".png")) for split in ("train", "test")],
        tmp_path / "mine",
    )
    command = [sys.executable, "-m", "kamim", "shards", "build"]
    flags = ["--frame", "80", "--crop", "64", "--map-crops", "1", "--grid", "16", "--jobs", "1"]
    flags += ["--split", "test"]

    def run(source):
        words = [*command, source, str(tmp_path / "out"), *flags]
        return subprocess.run(words, capture_output=True, text=True)

    few = run(f"cifar10:{tmp_path / 'few'}")
    assert (few.returncode, errors(few)) == (2, 1)
    assert "holds 4 images of 10 classes, and cifar10 (split test) has 10,000" in few.stderr
    assert not (tmp_path / "out").exists()
    done = run(f"folder:{tmp_path / 'mine'}")
    assert "1 input = 1 written + 0 rejected" in done.stdout, done.stderr
    manifest = shards.load(tmp_path / "out")
    assert manifest.classes == ["cat"]
    assert manifest.source == open_source(f"folder:{tmp_path / 'mine'}", "test").description()


@pytest.fixture
def nobodys(tmp_path, monkeypatch):
    """A machine that has no dataset in the usual places, and is in a folder of its own."""
    monkeypatch.setattr(datasets, "BASES", ("data", "."))
    monkeypatch.delenv("KAMIM_DATA", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "cifar100", "inaturalist", "places365"])
@pytest.mark.parametrize("split", ["", "train", "val"])
def test_what_nobody_named_is_no_dataset(name, split, nobodys):
    """A set built before with the pictures that commands left in it, and a package called train,
    had been taken for CIFAR.
    """
    picture = archives.picture(0)
    names = [
        "data/demo-fast/fidelity.png",
        "data/photos/a/1.jpg",
        "train/figures/loss.png",
        "train/models.py",
        "val/x/1.jpg",
        f"{name}/train/dog/1.jpg",
        f"{name}/test/dog/1.jpg",
    ]
    archives.unpack([(path, picture) for path in names], nobodys)
    (nobodys / "train.tar").write_bytes(archives.tar_bytes([("a/1.jpg", picture)]))
    (nobodys / "test.tar").write_bytes(b"no tar")
    for partial in (False, True):
        with pytest.raises(ValueError, match=f"^{name} .* was not found: looked for") as caught:
            open_source(name, split, partial)
        assert "\n" not in str(caught.value)


def test_class_folders_stand_for_cifar_where_names_and_counts_are_as_published(
    nobodys, monkeypatch
):
    """In a searched place by their names; where DATA names them, whatever they are called."""
    monkeypatch.setitem(datasets.NAMED["cifar10"].splits, "test", 100)
    for number, classes in enumerate((archives.CIFAR10_NAMES, [f"{n}" for n in range(10)])):
        members = [(f"test/{c}/{n}.png", archives.picture(n)) for c in classes for n in range(10)]
        place = nobodys / str(number)
        archives.unpack(members, place / "folders" / "cifar10")
        (place / "tars" / "cifar10").mkdir(parents=True)
        (place / "tars" / "cifar10" / "test.tar").write_bytes(archives.tar_bytes(members))
        for kind in ("folders", "tars"):
            monkeypatch.setenv("KAMIM_DATA", str(place / kind))
            given = open_source(f"cifar10:{place / kind / 'cifar10'}", "test")
            assert (given.classes, len(given.entries)) == (classes, 100)
            if number == 0:
                assert open_source("cifar10", "test") == given
                continue
            with pytest.raises(ValueError, match="taken only where PATH gives them"):
                open_source("cifar10", "test")


def test_counts_far_from_those_published_are_refused(nobodys, monkeypatch):
    monkeypatch.setitem(datasets.NAMED["cifar10"].splits, "test", 100)
    names = archives.CIFAR10_NAMES
    wrong = {
        "98": (names, 98),
        "97": (names, 97),
        "102": (names, 102),
        "103": (names, 103),
        "nine": (names[:9], 99),
        "eleven": ([*names, "yak"], 99),
    }
    for word, (classes, count) in wrong.items():
        place = nobodys / word
        archives.unpack(
            [(f"{classes[n % len(classes)]}/{n}.png", b"") for n in range(count)], place
        )
        if word in ("98", "102"):
            assert len(open_source(f"cifar10:{place}", "test").entries) == count
            continue
        with pytest.raises(ValueError, match=r"name where all of it lies, .*--partial") as caught:
            open_source(f"cifar10:{place}", "test")
        with pytest.raises(ValueError, match="--partial"):
            shards.build(f"cifar10:{place}", nobodys / "out", split="test")
        found = f"{place} holds {count} images of {len(classes)} classes"
        assert f"{found}, and cifar10 (split test) has 100 images of 10" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(open_source(f"cifar10:{place}", "test", partial=True).entries) == count


def test_part_of_a_published_layout_is_refused_wherever_it_is(images, nobodys, monkeypatch):
    archives.imagenet_folder(nobodys / "data" / "imagenet" / "train", images)
    archives.inaturalist(nobodys / "data" / "inaturalist")
    archives.places365(nobodys / "data" / "places365")
    archives.unpack(archives.cifar100_python(), nobodys / "data")
    for name, found in {
        "imagenet": ("9 images of 3 classes", "1,281,167 images of 1,000 classes"),
        "inaturalist": ("5 images of 2 classes", "2,686,843 images of 10,000 classes"),
        "places365": ("6 images of 3 classes", "1,803,460 images of 365 classes"),
        "cifar100": ("4 images of 100 classes", "50,000 images of 100 classes"),
    }.items():
        for where in (name, f"{name}:{nobodys / 'data' / name}"):
            where = where.replace("data/cifar100", "data/cifar-100-python")
            with pytest.raises(ValueError, match="--partial") as caught:
                open_source(where)
            assert all(words in str(caught.value) for words in found)
            assert small(where).entries
    for path in (nobodys / "data" / "inaturalist" / "train").rglob("*0.jpg"):
        path.unlink()
    with pytest.raises(ValueError, match="holds 4 images of 2 classes"):  # 5 are listed, 4 there
        open_source("inaturalist")


def test_a_class_called_train_is_no_split(nobodys):
    """It is one of CIFAR-100's."""
    classes = list(datasets.NAMED["cifar100"].folders)
    assert len(classes) == 100
    assert classes == sorted(classes)
    archives.unpack([(f"all/{c}/1.png", archives.picture(0)) for c in classes], nobodys)
    source = small(f"cifar100:{nobodys / 'all'}")
    assert source.classes == classes


def test_only_the_split_asked_for_is_taken(nobodys):
    """Its name is no class, even if a part is enough."""
    archives.unpack([("c/train/cat/1.png", archives.picture(0))], nobodys)
    for split in ("test", "val"):
        with pytest.raises(ValueError, match=r"holds no split test of cifar10; .* there is train"):
            small(f"cifar10:{nobodys / 'c'}", split)


def test_cifar_as_it_is_at_hand_is_whole(monkeypatch):
    if not (DATA / "cifar10" / "train.tar").exists():
        pytest.skip(f"no CIFAR-10 under {DATA}; set KAMIM_DATA to the folder that has it")
    monkeypatch.setenv("KAMIM_DATA", str(DATA))
    for split, count in (("train", 50_000), ("test", 10_000)):
        source = open_source("cifar10", split)
        assert source.root == os.path.realpath(DATA / "cifar10" / f"{split}.tar")
        assert (source.classes, len(source.entries)) == (archives.CIFAR10_NAMES, count)
