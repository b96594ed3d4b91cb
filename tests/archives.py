"""Small archives in the exact layouts that datasets are published in, and a tar of any members."""

import io
import json
import pickle
import tarfile

import cv2
import numpy as np
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n01484850")


def picture(seed, suffix=".jpg", mode="RGB", side=(40, 48)):
    """A small picture of smooth noise, other for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 4), np.uint8)
    pixels = cv2.resize(noise, side[::-1], interpolation=cv2.INTER_CUBIC)
    stream, format = io.BytesIO(), {".jpg": "JPEG", ".png": "PNG"}[suffix]
    channels = pixels if mode == "CMYK" else pixels[:, :, :3].copy()
    Image.fromarray(channels, mode).save(stream, format)
    return stream.getvalue()


def tar_bytes(members, mode="w", mtime=0):
    """A tar of (name, data); data None is a link to /etc/passwd."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.mtime = mtime
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(data or b"")
            archive.addfile(info, io.BytesIO(data or b""))
    return stream.getvalue()


def imagenet_images():
    """wnid: {file name: bytes}; one is a PNG by the name of a JPEG, one is CMYK, as in ImageNet."""
    images = {
        w: {f"{w}_{n}.JPEG": picture(10 * c + n) for n in (18, 2, 7)} for c, w in enumerate(WNIDS)
    }
    images[WNIDS[1]][f"{WNIDS[1]}_2.JPEG"] = picture(1, ".png")
    images[WNIDS[2]][f"{WNIDS[2]}_7.JPEG"] = picture(2, mode="CMYK")
    return images


def imagenet_tar(path, images):
    """ILSVRC2012_img_train.tar: a tar of tars, in an order of its own."""
    inner = [(f"{wnid}.tar", tar_bytes(images[wnid].items())) for wnid in reversed(images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(inner))
    return path


def imagenet_folder(root, images):
    for wnid, files in images.items():
        for name, data in files.items():
            (root / wnid).mkdir(parents=True, exist_ok=True)
            (root / wnid / name).write_bytes(data)
    return root


def python2_pickle(table):
    """`table` as Python 2 wrote CIFAR: protocol 2, text and array bytes as 8-bit strings."""

    class Old(pickle._Pickler):
        dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

        def string(self, text):
            data = text.encode("latin1") if isinstance(text, str) else text
            self.write(b"T" + len(data).to_bytes(4, "little") + data)
            self.memoize(text)

        def array(self, value):
            string, tuple_ = self.string, self.save
            self.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n")
            tuple_((0,))
            string(b"b")
            self.write(b"\x87R")  # (ndarray, (0,), 'b') and call
            self.write(b"(K\x01")
            tuple_(value.shape)
            self.write(b"cnumpy\ndtype\n(")
            string(b"u1")
            self.write(b"K\x00K\x01tR(K\x03")
            string(b"|")
            self.write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
            string(value.tobytes())
            self.write(b"tb")

        dispatch[str] = dispatch[bytes] = string
        dispatch[np.ndarray] = array

    stream = io.BytesIO()
    Old(stream, protocol=2).dump(table)
    return stream.getvalue()


def cifar_pixels(seed, count):
    """uint8 [count, 3072], planes of red, green and blue."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_NAMES += ["dog", "frog", "horse", "ship", "truck"]


def cifar10_python(write=python2_pickle, count=4):
    """Members of cifar-10-python.tar.gz, with `count` images a batch."""
    folder = "cifar-10-batches-py"
    facts = {"num_cases_per_batch": count, "label_names": CIFAR10_NAMES, "num_vis": 3072}
    members = [(f"{folder}/batches.meta", write(facts))]
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        table = {
            "batch_label": f"training batch {number + 1} of 5",
            "labels": [(number + row) % 10 for row in range(count)],
            "data": cifar_pixels(number, count),
            "filenames": [f"leptodactylus_s_{number}{row:05d}.png" for row in range(count)],
        }
        members.append((f"{folder}/{name}", write(table)))
    return [*members, (f"{folder}/readme.html", b"<meta>")]


def cifar10_binary(count=4):
    """Members of cifar-10-binary.tar.gz with the same images."""
    folder = "cifar-10-batches-bin"
    members = [(f"{folder}/batches.meta.txt", "\n".join([*CIFAR10_NAMES, "", ""]).encode())]
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        rows = cifar_pixels(number, count)
        data = b"".join(bytes([(number + n) % 10]) + row.tobytes() for n, row in enumerate(rows))
        members.append((f"{folder}/{name}.bin", data))
    return members


def cifar100_python(count=4):
    names = {
        "fine_label_names": [f"fine{n}" for n in range(100)],
        "coarse_label_names": [f"coarse{n}" for n in range(20)],
    }
    members = [("cifar-100-python/meta", python2_pickle(names))]
    for number, name in enumerate(("test", "train")):
        table = {
            "filenames": [f"bos_taurus_s_{row:06d}.png" for row in range(count)],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": [99 - row for row in range(count)],
            "coarse_labels": list(range(count)),
            "data": cifar_pixels(number, count),
        }
        members.append((f"cifar-100-python/{name}", python2_pickle(table)))
    return members


def cifar100_binary(count=4):
    names = "\n".join([*(f"fine{n}" for n in range(100)), ""]).encode()
    members = [("cifar-100-binary/fine_label_names.txt", names)]
    for number, name in enumerate(("test", "train")):
        rows = cifar_pixels(number, count)
        data = b"".join(bytes([n, 99 - n]) + row.tobytes() for n, row in enumerate(rows))
        members.append((f"cifar-100-binary/{name}.bin", data))
    return members


def unpack(members, root):
    for name, data in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def packed(members, path):
    """The members as a .tar.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


SPECIES = (
    "00000_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
    "00001_Plantae_Tracheophyta_Magnoliopsida_Rosales_Rosaceae_Rosa_canina",
)


def inaturalist(root, **changes):
    """train.json and train/ as of 2021; `changes` replace lists of the JSON."""
    facts = {"width": 48, "height": 40, "license": 0, "rights_holder": "R"}
    facts |= {"latitude": 43.8, "longitude": -71.2, "location_uncertainty": 77}
    facts["date"] = "2020-07-14"
    images = [
        {"id": 40 + n, "file_name": f"train/{SPECIES[n % 2]}/{n:08x}.jpg", **facts}
        for n in range(5)
    ]
    for n, image in enumerate(images):
        unpack([(image["file_name"], picture(n))], root)
    table = {
        "info": {"year": 2021, "version": "v1.0"},
        "images": images,
        "categories": [
            {
                "id": n,
                "name": name.split("_", 6)[6].replace("_", " "),
                "common_name": "C",
                "supercategory": "Worms",
                "kingdom": "Animalia",
                "image_dir_name": name,
            }
            for n, name in enumerate(SPECIES)
        ],
        "annotations": [{"id": 7 + n, "image_id": 40 + n, "category_id": n % 2} for n in range(5)],
        "licenses": [{"id": 0, "name": "N", "url": "U"}],
    }
    (root / "train.json").write_text(json.dumps(table | changes))
    return root


def places365(root, large=False):
    size = "large" if large else "256"
    names = ["/a/airfield", "/a/airplane_cabin", "/b/bow_window/indoor"]
    lines = [f"{name}/0000000{n}.jpg" for name in names for n in (1, 2)]
    unpack([(f"data_{size}{line}", picture(n)) for n, line in enumerate(lines)], root)
    val = [f"Places365_val_0000000{n}.jpg" for n in (1, 2, 3)]
    unpack([(f"val_{size}/{name}", picture(50 + n)) for n, name in enumerate(val)], root)
    texts = {
        "categories_places365.txt": [f"{name} {n}" for n, name in enumerate(names)],
        "places365_train_standard.txt": [f"{line} {n // 2}" for n, line in enumerate(lines)],
        "places365_val.txt": [f"{name} {2 - n}" for n, name in enumerate(val)],
    }
    for name, rows in texts.items():
        (root / name).write_text("\n".join(rows) + "\n")
    return root
