"""The command line itself: statuses, lines, tracebacks, completion; without torch."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
import typed
from conftest import REPOSITORY

import kamim.doctor
from kamim.__main__ import _with_home
from preprocess import BuildError
from shards import errors
from shards.errors import EXTRAS, UserError, install

DOCTOR = """
import os, signal, sys
from preprocess import BuildError
from shards.errors import UserError
import kamim.doctor
def examine():
    {work}
kamim.doctor.examine = examine
from kamim.__main__ import main
sys.argv = ["kamim", *{words}]
main()
"""


def ended(work, *words):
    """How `kamim doctor` ends when `work` is what it does."""
    code = DOCTOR.format(work=work, words=[*words, "doctor"])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_what_is_done_is_status_0():
    done = ended("return [('Python', 'there', '')]")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["Python", "there"]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("give less"), 2, "kamim: give less"),
        (BuildError("half is done"), 1, "kamim: half is done"),
        (
            FileExistsError(17, "File exists", "a.txt"),
            2,
            "kamim: a.txt is a file, or lies below one",
        ),
        (FileExistsError("somebody's"), 1, "kamim: somebody's"),
        (OSError(28, "No space left on device", "/data"), 1, "No space left on device: /data"),
        (ModuleNotFoundError("No module", name="torch"), 2, "sources: pip install '.[train]'"),
        (ModuleNotFoundError("No module", name="cv2"), 2, "pip install opencv-python-headless"),
        (ModuleNotFoundError("x", name="nosuch.part"), 2, "nosuch.part is not installed; type: "),
        (ModuleNotFoundError("No x", name="shards.nosuch"), 70, "a bug of kamim (ModuleNotFou"),
        (ModuleNotFoundError("No train", name="train"), 70, "a bug of kamim (ModuleNotFoundErro"),
        (ModuleNotFoundError("No numpy.x", name="numpy.nosuch"), 70, "a bug of kamim (Module"),
        (ModuleNotFoundError("no name"), 70, "a bug of kamim (ModuleNotFoundError: no name)"),
        (ValueError("broadcast"), 70, "kamim: a bug of kamim (ValueError: broadcast)"),
        (KeyError("x"), 70, "kamim: a bug of kamim (KeyError: 'x')"),
    ],
    ids=repr,
)
def test_a_request_that_is_wrong_and_a_bug_of_ours_end_differently(
    error, status, line, monkeypatch
):
    def examine():
        raise error

    monkeypatch.setattr(kamim.doctor, "examine", examine)
    done = typed.kamim("doctor")
    assert (done.returncode, done.stdout) == (status, "")
    first, *rest = done.stderr.splitlines()
    assert first.startswith("kamim: ")
    assert line in first
    assert bool(rest) == (status == 70)
    assert ("Traceback" in done.stderr) == (status == 70)


def test_a_module_of_ours_that_lacks_is_a_bug():
    done = ended("import shards.nosuch")
    assert done.returncode == 70
    assert "import shards.nosuch" in done.stderr or "in examine" in done.stderr


@pytest.mark.parametrize(
    ("work", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGINT); signal.pause()", 130),
        ("os.kill(os.getpid(), signal.SIGTERM); signal.pause()", 143),
    ],
)
def test_what_was_stopped_says_so(work, status):
    # A shell's background job, as this test may be in, is born deaf to Ctrl-C.
    done = ended(f"signal.signal(signal.SIGINT, signal.default_int_handler); {work}")
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == "kamim: stopped\n"
    done = ended(f"import kamim.__main__; kamim.__main__.GO_ON.add('doctor'); {work}")
    assert done.stderr == "kamim: stopped; what is finished is kept, the same command goes on\n"


def test_home_folders_are_found_where_no_shell_names_them(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for typed_, meant in (("~/x", "/home/me/x"), ("--out=~/x", "--out=/home/me/x")):
        assert _with_home(typed_) == meant
    for same in ("a~/x", "--out=a~/x", "--set", "~", "imagenet:~/x"):
        assert _with_home(same) == same


def test_debug_shows_where_a_request_failed():
    done = ended("raise UserError('give less')", "--debug")
    assert done.returncode == 2
    assert done.stderr.splitlines()[:2] == [
        "kamim: give less",
        "Traceback (most recent call last):",
    ]


def test_the_version_is_that_of_the_package():
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        version = tomllib.load(file)["project"]["version"]
    done = typed.kamim("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kamim {version}\n", "")


def test_a_shell_can_complete_commands_and_options():
    def completed(words):
        shell = {"_KAMIM_COMPLETE": "complete_bash", "COMP_CWORD": f"{len(words.split()) - 1}"}
        env = {**os.environ, **shell, "COMP_WORDS": words}
        return typed.kamim_process(env=env).stdout.split()

    assert completed("kamim pre") == ["pretrain"]
    assert completed("kamim shards verify --lev") == ["--level"]
    help_text = re.sub(r"\s+", " ", typed.kamim("--help").stdout)
    assert "--install-completion" in help_text
    assert "--show-completion" in help_text


def test_a_usage_error_names_the_value_and_the_rule():
    done = typed.kamim("shards", "build", "demo", "out", "--jobs", "two")
    assert done.returncode == 2
    assert re.fullmatch(r"kamim: --jobs 'two' \w.* integer \(see --help\)\n", done.stderr)


def test_what_to_type_can_be_typed_by_whoever_reads_it(monkeypatch, tmp_path):
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(EXTRAS) < set(extras)
    assert install("sklearn.manifold").endswith("pip install '.[train]'")
    assert install("PIL") == "type: pip install pillow"
    assert install("webdataset") == "type: pip install webdataset"
    assert install("ffcv") == "type, in the folder of kamim's sources: make ffcv"
    monkeypatch.setattr(errors, "MAKEFILE", tmp_path / "Makefile")  # as from a wheel
    assert "make" not in install("ffcv")
    assert "pip install '.[ffcv]' && pip install --no-deps ffcv" in install("ffcv")
