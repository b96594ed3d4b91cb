"""Shared fixtures: real photographs where they are at hand, small sources made on the spot."""

import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import hypothesis
import numpy as np
import pytest

import preprocess
import preprocess.source
import shards
from preprocess import build_shards, open_source
from shards.beton import convert_to_ffcv

# The same examples each time, however slow the machine; `make test-all` tries new ones.
patient = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("same", derandomize=True, **patient)
hypothesis.settings.register_profile("new", **patient)
hypothesis.settings.load_profile("same")

REPOSITORY = Path(__file__).parent.parent
DATA = Path(os.environ.get("KAMIM_DATA", REPOSITORY.parent / "shared" / "data")).resolve()
CACHES = (".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/", "__pycache__/")
STAMPS = ("core", "train", "ffcv", "test", "remote", "parquet")  # what make has installed


# Workers share the cores: with a thread for each core, each would wait for the others' threads.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # nor do they spin while they wait
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

# A shell has what it starts in the background ignore SIGINT, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests work in folders of their own; what they start finds this checkout all the same.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
)


def lines_of_git(root: Path, *words: str) -> list[str]:
    """What a git command that ends its lines by NUL prints in `root`, whoever owns that."""
    command = ["git", "-c", "safe.directory=*", *words, "-z"]
    done = subprocess.run(command, cwd=root, capture_output=True, check=True)
    return list(filter(None, done.stdout.decode().split("\0")))


def source_files(root: Path) -> list[str]:
    """Tracked files as they are now, and new ones in the folders that hold tracked ones.

    What a user leaves beside them (exports, data, runs, pages) is none of the project's.
    """
    tracked = lines_of_git(root, "ls-files", "--cached")
    folders = sorted({f"{name.split('/')[0]}/" for name in tracked if "/" in name})
    new = lines_of_git(root, "ls-files", "--others", "--exclude-standard", *folders)
    return [name for name in (*tracked, *new) if (root / name).is_file()]


def copy_repository(folder: Path) -> Path:
    """The project's files in `folder`, with this run's environment as .venv; returns `folder`.

    Skips, visibly, where only git could say which files are the project's.
    """
    if not (REPOSITORY / ".git").exists():
        pytest.skip(f"{REPOSITORY} is no git checkout")
    for name in source_files(REPOSITORY):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, folder / name)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name not in STAMPS:
            (folder / ".venv" / path.name).symlink_to(path)
    for stamp in STAMPS:  # newer than pyproject.toml: make installs nothing from here
        (folder / ".venv" / stamp).touch()
    return folder


def left_in(root: Path) -> set[str]:
    """Untracked files and folders in `root`, ignored ones too, and tracked ones that are gone."""
    found = lines_of_git(root, "ls-files", "--others", "--deleted", "--directory")
    return {name for name in found if not name.endswith(CACHES)}


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run in an empty folder, and hold all tests to leaving the checkout as it was."""
    git = (REPOSITORY / ".git").exists()
    before = left_in(REPOSITORY) if git else set()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    changed = left_in(REPOSITORY) ^ before if git else set()
    assert not changed, f"tests wrote into the checkout or took from it: {sorted(changed)}"


@pytest.fixture(autouse=True)
def alike() -> Iterator[None]:
    """The same random numbers, and threads of torch, whichever tests ran before in this process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    if not (torch := sys.modules.get("torch")):
        return (yield)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # FFCV sets it


@pytest.fixture(scope="session")
def photos() -> list[Path]:
    """Paths of the 800 ImageNet photographs; skips, visibly, where they are absent."""
    found = sorted((DATA / "imagenet-sample").glob("*/*.JPEG"))
    if not found:
        pytest.skip(f"no photographs under {DATA}; set KAMIM_DATA to the folder that has them")
    return found


@pytest.fixture(scope="session")
def demo_images() -> list[np.ndarray]:
    """The 312 demo images as uint8 RGB; they need no data of anybody's."""
    source = preprocess.open_source("demo")
    return [preprocess.decode_image(source.read(entry)) for entry in source.entries]


@pytest.fixture(scope="session")
def forty(tmp_path_factory: pytest.TempPathFactory, demo_images: list[np.ndarray]) -> Path:
    """A folder of 4 classes with 10 small JPEGs each, cut from the demo images."""
    root = tmp_path_factory.mktemp("forty")
    for number, image in enumerate(demo_images[::7][:40]):
        path = root / f"class{number % 4}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(image, (96, 80))[:, :, ::-1])
    return root


@pytest.fixture
def small_source(forty: Path, tmp_path: Path) -> Path:
    """A copy of `forty`, with its times of change: by them a build knows its source again."""
    return Path(shutil.copytree(forty, tmp_path / "source"))


def settings(**changes: object) -> shards.Settings:
    """Small, fast settings for builds in tests."""
    plain = {
        "frame": 64,
        "quality": 90,
        "crop": 64,
        "area": (0.67, 1.0),
        "map_crops": 1,
        "bank": 0,
        "grid": 16,
        "mark": "ring",
        "detect_on": "source",
        "detectors": (preprocess.detector_settings("fast"),),
        "shard_size": 4,
    }
    return shards.Settings(**(plain | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished set, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """build_once(small_source, out, settings) builds what was not built yet; `out` is a copy."""
    made = {}

    def build(source, out, chosen):
        key = repr(chosen)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("made") / "set"
            build_shards(open_source(str(source)), made[key], chosen, 1)
        return Path(shutil.copytree(made[key], out))

    return build


@pytest.fixture
def built(small_source, tmp_path, build_once):
    detectors = tuple(preprocess.detector_settings(n) for n in ("fast", "orb"))
    chosen = settings(frame=120, detectors=detectors, crop=96, bank=2)
    return build_once(small_source, tmp_path / "built", chosen)


@pytest.fixture(params=["jpeg", "raw"])
def converted(request, built, tmp_path):
    convert_to_ffcv(built, tmp_path / request.param, request.param)
    return tmp_path / request.param


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    """Runs an example as a script, in this process; gives the numbers that it prints."""

    def run(name, *arguments):
        path = str(REPOSITORY / "examples" / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(path, run_name="__main__")
        return [float(line) for line in capsys.readouterr().out.splitlines()]

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # where datasets writes
    return run


def copied(loader):
    """The batches of a loader, kept: the loader reuses its arrays."""

    def kept(field):
        if isinstance(field, dict):
            return {name: np.array(array) for name, array in field.items()}
        return np.array(field)

    return [type(batch)(batch.step, *map(kept, batch[1:])) for batch in loader]


def errors(done):
    """How many lines a command ended in; a busy machine also has it say what it waits for."""
    lines = done.stderr.splitlines()
    return len([line for line in lines if not re.search(r"(, \d+ s| \.\.\. [\d:]+)$", line)])
