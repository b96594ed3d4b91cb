"""Finished sets damaged at rest: each changed byte, cut, swapped, missing or doubled file is found.

Damage survives as a loss if `verify` calls the set sound, if training would begin on it, or if the
loader gives anything but ValueError or a batch.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from shards import ShardSet, load
from shards.beton import convert_to_ffcv
from shards.files import MANIFEST
from shards.loader import Loader
from shards.order import Plan
from shards.spec import INDEX, REJECTED
from shards.verification import damaged_files, verify_shards
from stress.cases import Case
from stress.forked import kamim, spawn
from stress.kills import LIMIT, warm_up
from stress.material import SMALL, make_source

CHANGES = 500  # single bytes of each kind of file, at scale 1
STARTS = 20  # of the tars' changes, on which `kamim pretrain` itself is tried


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case a kind of file, and one for whole files."""
    warm_up()
    source, tars = make_source(arena / "source", 12, seed), arena / "tars"
    (source / "class1" / "bad.jpg").write_bytes(b"not a picture")
    flags = ["--shard-size", 4, "--max-rejected", 1]
    log = arena / "setup.log"
    process = spawn(kamim, "shards", "build", source, tars, *SMALL, *flags, log=log)
    assert process.wait(LIMIT) == 0, process.text()
    convert_to_ffcv(tars, arena / "ffcv")
    maps, bare = arena / "maps", ["--grid", 16, "--map-crops", 1, "--max-rejected", 1]
    process = spawn(kamim, "maps", "build", source, maps, *bare, log=log)
    assert process.wait(LIMIT) == 0, process.text()
    beton = arena / "ffcv" / load(arena / "ffcv").shards[0].name
    count = max(5, round(CHANGES * scale))
    files = {
        "tars": [tars / shard.name for shard in load(tars).shards],
        MANIFEST: [tars / MANIFEST],
        INDEX: [tars / INDEX],
        REJECTED: [tars / REJECTED],
        ".beton": [beton],
        "densities without frames": [maps / shard.name for shard in load(maps).shards],
        "their names": [maps / file.name for file in load(maps).names],
    }
    for name, paths in files.items():
        yield changes(name, paths, count, f"{name} {seed}")
    yield starts(files["tars"], arena, max(2, round(STARTS * scale)), f"starts {seed}")
    yield cuts([path for paths in files.values() for path in paths], count // 5, f"cuts {seed}")
    yield whole(arena, seed)


def flaw_of(folder: Path) -> str:
    """What is wrong with how the damage in `folder` is met, or nothing."""
    try:
        problems = verify_shards(folder, "checksum")
    except Exception as error:
        return f"verify raised {error!r}"
    if not problems:
        return "verify found nothing"
    try:
        records = ShardSet(folder)
    except ValueError:
        return ""  # neither training nor anything else opens it
    if not damaged_files(folder, records.manifest):
        others = ("is not in the manifest",)  # a file too many: nobody reads it
        return "" if any(word in problems[0] for word in others) else "training would begin on it"
    return _loaded(records)


def _loaded(records: ShardSet) -> str:
    """Without the check before the first step: a batch or a ValueError, by either way to read."""
    if records.manifest.container != "webdataset":
        return ""
    plan = Plan(len(records), 4, 0)
    for skip in (False, True):
        try:
            for _ in Loader(records, plan, 0, plan.steps(1), skip=skip, workers=1, prefetch=1):
                pass
        except ValueError:
            pass
        except Exception as error:
            return f"the loader raised {error!r}"
    return ""


def changes(name: str, paths: list[Path], count: int, seed: str) -> Case:
    """`count` times one byte of one of `paths` is another."""
    case, rng = Case("damage", f"one byte of {name}"), random.Random(seed)
    folder = paths[0].parent
    for _ in range(count):
        path = rng.choice(paths)
        place, other = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        _change(path, place, other)
        flaw = flaw_of(folder)
        _change(path, place, other)
        case.trial(f"{flaw}: byte {place} of {path.name} xor {other}" if flaw else "")
    case.note = "found by verify --level checksum, and before the first step"
    return case


def _change(path: Path, place: int, other: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ other]))


def starts(paths: list[Path], arena: Path, count: int, seed: str) -> Case:
    """`kamim pretrain` on a set with one byte changed: status 2, one line, no step."""
    case, rng = Case("damage", "kamim pretrain, one byte of a tar"), random.Random(seed)
    for _ in range(count):
        path = rng.choice(paths)
        place, other = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        _change(path, place, other)
        flags = ["--recipe", "tiny", "--batch", 4, "--epochs", 1, "--device", "cpu"]
        out = arena / "run"
        process = spawn(kamim, "pretrain", path.parent, "--out", out, *flags, log=arena / "run.log")
        status = process.wait(LIMIT)
        _change(path, place, other)
        said = process.text().strip().splitlines()
        wrong = status != 2 or out.exists() or len(said) != 1 or path.name not in said[0]
        case.trial(f"status {status}: {process.text()[-300:]}" if wrong else "")
    case.note = "refused by name before the first step"
    return case


def cuts(paths: list[Path], count: int, seed: str) -> Case:
    """Files cut short, or with bytes after their end."""
    case, rng = Case("damage", "cut short, or longer"), random.Random(seed)
    for _ in range(count):
        path = rng.choice(paths)
        kept = path.parent.parent / f"{path.name}.kept"
        shutil.copyfile(path, kept)
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.truncate(rng.choice([0, 1, size - 1, size + 1, size + 512, rng.randrange(size)]))
        flaw = flaw_of(path.parent)
        case.trial(f"{flaw}: {path.name} of {path.stat().st_size} bytes" if flaw else "")
        kept.replace(path)
    return case


def copy_over(folder: Path, source: Path, name: str) -> None:
    """`source` in place of `name`."""
    shutil.copyfile(source, folder / name)


def remove(folder: Path, name: str) -> None:
    """`name` is gone."""
    (folder / name).unlink()


def whole(arena: Path, seed: int) -> Case:
    """Files that are missing, exchanged, doubled, or another set's."""
    case = Case("damage", "files missing, swapped, doubled or foreign")
    foreign, log = arena / "foreign", arena / "foreign.log"
    flags = ["--shard-size", 4, "--max-rejected", 1]
    source = make_source(arena / "elsewhere", 13, seed + 9)
    process = spawn(kamim, "shards", "build", source, foreign, *SMALL, *flags, log=log)
    assert process.wait(LIMIT) == 0, process.text()
    tars, one, two = arena / "tars", "shard-000000.tar", "shard-000001.tar"

    def swap(folder: Path) -> None:
        (folder / one).rename(folder / "x")
        (folder / two).rename(folder / one)
        (folder / "x").rename(folder / two)

    def replaced(folder: Path, link: bool) -> None:
        (folder / one).unlink()
        (folder / one).symlink_to("nowhere") if link else (folder / one).mkdir()

    ways: dict[str, Callable[[Path], object]] = {
        "swapped": swap,
        "doubled under its neighbour's name": partial(copy_over, source=tars / one, name=two),
        "doubled under a new name": partial(copy_over, source=tars / one, name="shard-000009.tar"),
        "a folder for a shard": partial(replaced, link=False),
        "a link for a shard": partial(replaced, link=True),
    }
    for name in (one, INDEX, REJECTED, MANIFEST):
        ways[f"missing {name}"] = partial(remove, name=name)
    for name in (one, INDEX, MANIFEST):
        ways[f"foreign {name}"] = partial(copy_over, source=foreign / name, name=name)
    for name, way in ways.items():
        copy = arena / "copy"
        shutil.copytree(arena / "tars", copy)
        way(copy)
        flaw = flaw_of(copy)
        case.trial(f"{flaw}: {name}" if flaw else "")
        shutil.rmtree(copy)
    pairs = {"swapped into a .beton set": INDEX, "a .beton's manifest": MANIFEST}
    for name, file in pairs.items():
        shutil.copytree(arena / "ffcv", arena / "copy")
        shutil.copyfile(arena / "tars" / file, arena / "copy" / file)
        flaw = flaw_of(arena / "copy")
        case.trial(f"{flaw}: {name}" if flaw else "")
        shutil.rmtree(arena / "copy")
    sound = [verify_shards(arena / name, "checksum") for name in ("tars", "ffcv")]
    case.trial("" if sound == [[], []] else f"the restored sets are not sound: {sound}")
    return case
