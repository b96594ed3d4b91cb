"""The wheel and the sdist, as strangers install them: beside other packages and files of theirs.

Run by `make dist`, which builds them into build/dist.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIST = ROOT / "build" / "dist"

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def wheel():
    (found,) = DIST.glob("kamim-*.whl")
    return found


@pytest.fixture(scope="module")
def place(wheel, tmp_path_factory):
    """An environment with the wheel and Hugging Face's evaluate, and a folder of a user's files."""
    root = tmp_path_factory.mktemp("stranger")
    subprocess.run([sys.executable, "-m", "venv", root / "env"], check=True)
    pip = [root / "env" / "bin" / "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, f"{wheel}[demo]", "evaluate"], check=True)
    (root / "mine").mkdir()
    for name in ("train.py", "evaluate.py", "shards.py", "bench.py"):
        (root / "mine" / name).write_text("raise RuntimeError('the user did not ask for this')\n")
    return root


def run(place, *words, folder="mine"):
    env = {"PATH": f"{place}/env/bin:/usr/bin:/bin", "HOME": str(place)}
    proxies = {k: v for k, v in os.environ.items() if k.lower().endswith("_proxy")}
    return subprocess.run(
        words, cwd=place / folder, env=env | proxies, capture_output=True, text=True
    )


def test_the_wheel_holds_four_packages_and_their_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"kamim", "preprocess", "shards", "train"}
    assert {f"{top}/py.typed" for top in tops} < set(names)
    assert "shards/FORMAT.md" in names


def test_the_sdist_can_be_built_from():
    (sdist,) = DIST.glob("kamim-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "shards/FORMAT.md"} <= names


@pytest.mark.parametrize("words", [["kamim"], ["python", "-m", "kamim"]])
def test_it_runs_in_a_folder_with_files_of_the_same_names(place, words):
    done = run(place, *words, "--version")
    assert (done.returncode, done.stdout[:6]) == (0, "kamim "), done.stderr
    for command in (["shards", "build", "demo", f"out-{len(words)}"], ["shards", "verify"]):
        done = run(place, *words, *command, *([f"out-{len(words)}"] if len(command) == 2 else []))
        assert done.returncode == 0, done.stderr
    wrong = run(place, *words, "pretrain", f"out-{len(words)}", "--recipe", "vit_bas")
    assert (wrong.returncode, wrong.stderr.count("Traceback")) == (2, 0)


def test_what_is_missing_is_said_with_what_to_type(place):
    done = run(place, "kamim", "pretrain", "out-1", "--recipe", "small")
    assert done.returncode == 2
    assert "torch is not installed; type, in the folder of kamim's sources: pip" in done.stderr


def test_hugging_faces_evaluate_is_its_own(place):
    code = "import evaluate, kamim, shards; print(evaluate.load.__module__, evaluate.__version__)"
    done = run(place, "python", "-c", code, folder=".")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("evaluate.loading")


def test_the_bill_of_materials_lists_what_is_locked_with_hashes():
    listed = json.loads((DIST / "kamim.cdx.json").read_text())
    assert listed["bomFormat"] == "CycloneDX"
    assert listed["metadata"]["component"]["name"] == "kamim"
    pins = re.findall(r"(?m)^([\w.-]+)==", (ROOT / "requirements.lock").read_text())
    assert sorted(part["name"] for part in listed["components"]) == sorted(pins)
    for part in listed["components"]:
        hashes = [one for place in part["externalReferences"] for one in place.get("hashes", [])]
        assert all(one["alg"] == "SHA-256" for one in hashes)
        assert hashes, part["name"]
