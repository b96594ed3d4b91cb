"""Datasets in layouts of their own, with names and pickles in them that are meant to do harm.

A case is lost as in `stress.sources`.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

from stress.cases import Case
from stress.forked import kamim
from stress.kills import LIMIT
from stress.material import SMALL
from stress.pickles import Payload, refused
from stress.source_targets import parquet_of, tar_of
from stress.sources import built
from stress.watch import spawn_watched

Layout = Callable[[Path, list[bytes], list[str]], str]  # folder, photographs, names: the source


def layouts(arena: Path, photos: list[bytes], secret: Path) -> Case:
    """Builds from lists that name files outside, and from archives with a pickle or worse in."""
    case = Case("archives", "datasets' lists, tars of tars, samples, Parquet, pickles")
    for layout in (places365, inaturalist, imagenet, webdataset, parquet):
        place = arena / f"layout-{layout.__name__}"
        (place / "data_256").mkdir(parents=True)
        (place / "data_256" / "way").symlink_to(secret.parent)
        far = ["../" * 12 + str(secret)[1:], str(secret)]
        far += [f"way/{secret.name}", f"data_256/way/{secret.name}"]
        source = layout(place, photos, far)
        flaw = built(arena, source, Path(f"{place}-out"), secret, layout.__name__, len(photos))
        case.trial(flaw)
    log, canary = arena / "trick.log", arena / "canary"
    for trick in (cifar, listed):
        place = arena / f"trick-{trick.__name__}"
        place.mkdir()
        out = Path(f"{place}-out")
        words = ["shards", "build", trick(place, photos, canary), out, "--partial", *SMALL]
        process = spawn_watched(kamim, *words, log=log, secret=secret, allowed=[out])
        status = process.wait(LIMIT)
        flaw = refused(status, process.text(), log.with_suffix(".deeds"), canary)
        case.trial(f"{trick.__name__}: {flaw}" if flaw else "")
    return case


def places365(place: Path, photos: list[bytes], far: list[str]) -> str:
    """A list of files, some of them outside the folder of images."""
    folder = _folder(place / "data_256", photos)
    names = [f"/{name}" for name in folder] + far
    (place / "places365_train_standard.txt").write_text("".join(f"{n} 0\n" for n in names))
    (place / "categories_places365.txt").write_text("/a/airfield 0\n")
    return f"places365:{place}"


def inaturalist(place: Path, photos: list[bytes], far: list[str]) -> str:
    """A JSON of files, some of them outside, and a category by the name of a way out."""
    names = [f"data_256/{name}" for name in _folder(place / "data_256", photos)] + far
    table = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "category_id": 7} for n in range(len(names))],
        "categories": [{"id": 7, "supercategory": "x", "name": "../../<script>"}],
    }
    (place / "train.json").write_text(json.dumps(table))
    return f"inaturalist:{place}/train.json"


def imagenet(place: Path, photos: list[bytes], far: list[str]) -> str:
    """A tar of class tars whose members are called as files outside."""
    names = [f"{n}.JPEG" for n in range(len(photos))] + [f"{name}.JPEG" for name in far]
    inner = tar_of(dict(zip(names, photos * 2, strict=False)))
    (place / "train.tar").write_bytes(tar_of({"n01440764.tar": inner, "../n01440765.tar": inner}))
    return f"imagenet:{place}/train.tar"


def webdataset(place: Path, photos: list[bytes], far: list[str]) -> str:
    """Samples keyed as files outside, with programs among their members."""
    members = {f"a/{n}.jpg": photo for n, photo in enumerate(photos)}
    members |= {name.replace("..", "up.."): photos[0] for name in far}
    members |= {
        f"a/0.{suffix}": b"cos\nsystem\n(S'true'\ntR." for suffix in ("pyd", "pickle", "pth")
    }
    (place / "x.tar").write_bytes(tar_of(members | dict.fromkeys(far, photos[0])))
    return f"webdataset:{place}/x.tar"


def parquet(place: Path, photos: list[bytes], far: list[str]) -> str:
    """Rows without pictures, whose paths lead outside."""
    names = [f"{n}.jpg" for n in range(len(photos))] + far
    data = parquet_of([*photos, *[b""] * len(far)], names)
    (place / "rows.parquet").write_bytes(data)
    return f"parquet:{place}/rows.parquet"


def cifar(place: Path, photos: list[bytes], canary: Path) -> str:
    """A batch that is a program."""
    folder = place / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps({b"data": Payload(canary)}, protocol=2))
    return f"cifar100:{place}"


def listed(place: Path, photos: list[bytes], canary: Path) -> str:
    """A list of tars that names one outside its folder."""
    (place / "below").mkdir()
    (place / "x.tar").write_bytes(tar_of({"0.jpg": photos[0]}))
    (place / "below" / "tars.txt").write_text("../x.tar\n")
    return f"webdataset:{place}/below/tars.txt"


def _folder(folder: Path, photos: list[bytes]) -> list[str]:
    """Names of `photos`, written into `folder`."""
    (folder / "a").mkdir()
    for number, photo in enumerate(photos):
        (folder / "a" / f"{number}.jpg").write_bytes(photo)
    return [f"a/{number}.jpg" for number in range(len(photos))]
