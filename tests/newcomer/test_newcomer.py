"""A newcomer's first hour on a fresh copy: the README as printed, then every usual mistake.

Nothing lies beside the copy, the home folder is empty and no network answers. Each mistake must
end in its status, with one line that names the next step, in time, and change nothing. The lines
are kept in mistakes.txt, to be read like code; `UPDATE=1 make test-newcomer` writes it anew.
"""

import fnmatch
import hashlib
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import cv2
import pytest
from conftest import copy_repository
from newcomer.mistakes import MISTAKES, PREPARE
from test_readme import BLOCKS, DEVELOP, commands

HERE = Path(__file__).parent
GOLDEN = HERE / "mistakes.txt"
ABSENT = "ffcv,wandb"  # a newcomer has neither
WORDS_SECONDS, TORCH_SECONDS = 2, 30  # on a quiet machine
# make's own last line, and signs of life, which a slow machine shows more of.
BESIDE = re.compile(r"^make: \*\*\*|^loading .* \.\.\. \d\d:\d\d$|^(loading|making) .*, \d+ s$")

# The README trains for a minute on a quiet machine, for ten on a busy one.
pytestmark = [pytest.mark.release, pytest.mark.timeout(1800)]


class Newcomer:
    """A person in a folder with a copy of the repository, and nothing else in the world."""

    def __init__(self, root):
        self.folder, self.home = root / "kamim", root / "home"
        copy_repository(self.folder)
        self.home.mkdir()
        nobody = "http://127.0.0.1:9"
        own = {k: os.environ[k] for k in ("TMPDIR", "LD_LIBRARY_PATH") if k in os.environ}
        self.env = own | {
            "ABSENT": ABSENT,
            "HOME": str(self.home),
            "KAMIM_DATA": str(self.home),
            "PATH": f"{self.folder}/.venv/bin{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{HERE / 'absent'}{os.pathsep}{self.folder}",
            "HTTP_PROXY": nobody,
            "HTTPS_PROXY": nobody,
            "https_proxy": nobody,
            "PIP_NO_INDEX": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "2",
        }

    def types(self, command):
        return subprocess.run(
            command,
            shell=True,
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=1200,
        )

    def tree(self, without):
        """SHA-256 of all files but those of the environment, caches and the folder `without`."""
        found = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            ours = name.startswith(".venv/") or "__pycache__" in name
            if path.is_file() and not ours and not (without and name.startswith(f"{without}/")):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def removes(self, names):
        """Files that were not to be written, so that the next mistake is judged by itself."""
        for name in names:
            (self.folder / name).unlink()
            with suppress(OSError):  # the folder holds others
                (self.folder / name).parent.rmdir()


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    return Newcomer(tmp_path_factory.mktemp("newcomer"))


@pytest.fixture(scope="module")
def followed(newcomer):
    """How each command of the README went."""
    return [
        (command, expected, newcomer.types(command))
        for block in BLOCKS
        for command, expected in commands(block)
        if command not in DEVELOP
    ]


@pytest.fixture(scope="module")
def prepared(newcomer, demo_images):
    """The newcomer with photographs, finished and damaged sets, and a run of their own."""
    for number, image in enumerate(demo_images[::13][:24]):
        for name in ("photos", "spoilt"):
            path = newcomer.folder / name / ("cats", "dogs")[number % 2] / f"{number:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image[:, :, ::-1])
    (newcomer.folder / "spoilt" / "cats" / "bad.jpg").write_text("no photograph")
    for command in PREPARE:
        done = newcomer.types(command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    return newcomer


@pytest.fixture(scope="module")
def golden():
    """Lines of mistakes.txt by command; what tests put in is written back if UPDATE is set."""
    entries = GOLDEN.read_text().removeprefix("$ ").split("\n$ ") if GOLDEN.exists() else []
    known = dict(entry.strip().split("\n", 1) for entry in entries)
    yield known
    if os.environ.get("UPDATE"):
        order = [m.command for m in MISTAKES if m.command in known]
        GOLDEN.write_text("\n".join(f"$ {command}\n{known[command]}\n" for command in order))


def quiet_start():
    """Seconds that Python takes to start just now: what a busy machine does to any command."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return time.perf_counter() - begin


def test_the_readme_is_followed_with_nothing_beside_it(followed):
    for command, expected, done in followed:
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        lines = done.stdout.strip().splitlines()
        patterns = [line.replace("[", "[[]").replace("...", "*") for line in expected]
        assert len(lines) == len(patterns), f"{command}\n{done.stdout}"
        assert all(map(fnmatch.fnmatchcase, lines, patterns)), f"{command}\n{done.stdout}"
    assert len(followed) >= 5


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m.command for m in MISTAKES])
def test_a_mistake_is_one_line_with_the_next_step_and_changes_nothing(mistake, prepared, golden):
    if mistake.searches and any(Path(place).exists() for place in ("/data", "/datasets")):
        pytest.skip("this machine has a /data or /datasets, which may hold what is asked for")
    before = prepared.tree(mistake.writes)
    slow = quiet_start()
    begin = time.perf_counter()
    done = prepared.types(mistake.command)
    took = time.perf_counter() - begin
    slow = max(slow, quiet_start())
    said = [line for line in done.stderr.splitlines() if not BESIDE.search(line)]
    if mistake.writes or mistake.status == 0:  # work was begun, and progress is told, too
        said = [line for line in said if re.search(mistake.says, line)]
    line = " / ".join(said).replace(str(prepared.folder.parent), "FOLDER")
    line = re.sub(r"^Makefile:\d+: ", "Makefile: ", line)
    line = re.sub(
        r"\b[0-9a-f]{12}\.\.\.|\b\d{5}(?= bytes|; restore)", "N", line
    )  # bytes are a library's
    if os.environ.get("UPDATE"):
        golden[mistake.command] = f"{done.returncode}  {line}"
    after = prepared.tree(mistake.writes)
    changed = set(after.items()) ^ set(before.items())
    prepared.removes(after.keys() - before.keys())
    assert (done.returncode, len(said)) == (mistake.status, 1), done.stdout + done.stderr
    assert line.startswith("kamim: ") or mistake.command.startswith("make") or not mistake.status
    assert re.search(mistake.says, line), line
    assert not changed, sorted({name for name, _ in changed})
    allowed = (TORCH_SECONDS if mistake.torch else WORDS_SECONDS) + 40 * slow
    assert took < allowed, f"{took:.1f} s, more than {allowed:.1f}"
    assert golden.get(mistake.command) == f"{done.returncode}  {line}"


def test_the_golden_text_is_of_these_sixty_and_more():
    found = re.findall(r"^\$ (.*)$", GOLDEN.read_text(), re.M)
    assert found == [mistake.command for mistake in MISTAKES]
    assert len(set(found)) >= 60
