"""The command line: one clear line for each mistake, exit statuses, JSON, Ctrl-C."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from typing import get_args

import pytest
from conftest import REPOSITORY, errors
from typed import KAMIM, kamim

SMALL = ["--frame", "64", "--crop", "64", "--map-crops", "1", "--grid", "16", "--shard-size", "4"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--detector", "superpoint"], "unknown detector 'superpoint'; there are fast, orb, sift"),
        (["--detector", "fast,fast"], "twice"),
        (["--detector", ""], "names no detector before or after a comma"),
        (["--detector", "fast,"], "names no detector before or after a comma"),
        (["--detector", "fast,Orb"], "unknown detector 'Orb'; did you mean orb? There are"),
        (["--levels", "16"], "--levels 16 is for upgraded sets"),
        (["--edge-rule", "."], "--edge-rule . cannot be read (Is a directory)"),
        (["--detector-option", "fast.treshold=3"], "no option 'treshold'; it has threshold"),
        (["--detector-option", "fast.threshold=many"], "'many' is no int"),
        (["--detector-option", "orb.nfeatures=9"], "not DETECTOR.OPTION=VALUE"),
        (["--detector-option", "fast.threshold=255"], "255 is out of range; give 0 to 254"),
        (["--detector", "orb", "--detector-option", "orb.patchSize=1"], "OpenCV refuses orb with"),
        (["--detector", "orb", "--detector-option", "orb.scaleFactor=1"], "give 1.01 or more"),
        (["--detector", "orb", "--detector-option", "orb.nlevels=0"], "orb.nlevels=0"),
        (["--detector", "sift", "--detector-option", "sift.sigma=nan"], "finite"),
        (
            ["--frame", "0"],
            "--frame 0 stores densities alone, and quality is 90: build them by `kamim maps",
        ),
        (["--frame", "8"], "--frame 8 is out of range"),
        (["--quality", "101"], "--quality 101 is out of range; give 0 to 100"),
        (["--crop", "190"], "--crop 190 is no multiple of 8; give 192"),
        (["--crop", "8"], "--crop 8 is out of range; give 32 to 1024"),
        (["--area", "0"], "--area 0.0 is out of range"),
        (["--map-crops", "-1"], "--map-crops -1 is out of range; give 0 to 64"),
        (["--bank", "256"], "--bank 256 is out of range; give 0 to 255"),
        (["--grid", "0"], "--grid 0"),
        (["--weights", "8"], "--weights 8 is not T,w_ps"),
        (["--jobs", "-1"], "--jobs -1"),
        (["--jobs", "two"], "--jobs 'two'"),
        (["--jobs=two"], "--jobs 'two'"),
        (["--backend", "slurm"], "'slurm' is not one of 'loky', 'dask', 'ray' (see --help)"),
        (["--max-rejected", "7"], "--max-rejected 7"),
        (["--mark", "star"], "--mark"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, words, tmp_path):
    done = kamim("shards", "build", "demo", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert errors(done) == 1
    assert done.stderr.startswith("kamim: ")
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_wrong_places_are_one_line_and_status_2(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for arguments in (
        ["build", tmp_path / "nowhere", tmp_path / "out"],
        ["build", "demo", tmp_path / "full"],
        ["verify", tmp_path / "full"],
        ["inspect", tmp_path / "nowhere"],
        ["unknown"],
        ["build"],
    ):
        done = kamim("shards", *arguments)
        status = 1 if arguments[0] == "verify" else 2
        assert (done.returncode, errors(done)) == (status, 1), done.stderr
        assert "Traceback" not in done.stderr


def test_build_verify_inspect_speak_json_and_english(small_source, tmp_path):
    out = tmp_path / "out"
    done = kamim("shards", "build", small_source, out, *SMALL, "--json")
    assert done.returncode == 0
    result = json.loads(done.stdout)
    assert (result["inputs"], result["written"], result["rejected"]) == (40, 40, {})
    again = kamim("shards", "build", small_source, out, *SMALL)
    assert again.returncode == 0
    assert "40 inputs = 40 written + 0 rejected" in again.stdout
    for level in ("structure", "checksum", "decode"):
        assert kamim("shards", "verify", out, "--level", level).returncode == 0
    deep = kamim("shards", "verify", out, "--level", "redetect", "--source", small_source)
    assert "40 records are sound at level redetect" in deep.stdout
    assert kamim("shards", "verify", out, "--level", "redetect").returncode == 2
    page = kamim("shards", "inspect", out, "--samples", "3")
    assert page.stdout.strip() == str(out / "inspect.html")
    told = json.loads(kamim("shards", "inspect", out, "--samples", "3", "--json").stdout)
    assert told == {"folder": str(out), "page": str(out / "inspect.html"), "records": 40}
    assert kamim("shards", "inspect", out, "--w-ps", "7").returncode == 2
    lost = tmp_path / "nowhere" / "page.html"
    unwritten = kamim("shards", "inspect", out, "--page", lost)
    assert unwritten.stderr == f"kamim: No such file or directory: {lost}\n"
    with (out / "shard-000002.tar").open("r+b") as file:
        file.write(b"X")
    bad = kamim("shards", "verify", out, "--json")
    assert bad.returncode == 1
    assert "shard-000002.tar" in json.loads(bad.stdout)["problems"][0]
    assert bad.stderr.startswith(
        f"kamim: {out} has 1 problem at level checksum, first in shard-000002.tar; restore it, or "
        f"type: kamim shards build SOURCE {out} "
    )
    typed = bad.stderr.split("type: kamim ")[1].replace("SOURCE", str(small_source)).split()
    assert f"{out}: repaired shard-000002.tar" in kamim(*typed).stderr
    assert kamim("shards", "verify", out).returncode == 0
    nowhere = kamim("shards", "verify", tmp_path / "nowhere")
    assert (nowhere.returncode, nowhere.stdout) == (2, "")
    assert f"build it first: kamim shards build SOURCE {tmp_path / 'nowhere'}" in nowhere.stderr


def test_what_cannot_be_written_is_refused_before_any_work(small_source, tmp_path, monkeypatch):
    """A URL where only local files are written had become a folder called s3:."""
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "a set"
    assert kamim("shards", "build", small_source, out, *SMALL).returncode == 0
    for words, line in (
        (
            ["build", small_source, "S3://bucket/set", *SMALL],
            "S3://bucket/set is no URL; give s3://",
        ),
        (["copy", out, "s3:/bucket/set"], "s3:/bucket/set is no URL"),
        (
            ["convert", out, "--out", "s3://bucket/set"],
            "s3:/bucket/set is a URL; this is written on",
        ),
        (["edge-rule", "fast", small_source, "--out", "no/x.json"], "there is no folder no for x"),
        (["build", small_source, "new", "--reuse", out], "name one, or leave it out"),
    ):
        done = kamim("shards", *words)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert line in done.stderr.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"a set", small_source.name}


def test_the_set_above_is_converted_beside_itself(small_source, tmp_path, monkeypatch):
    assert kamim("shards", "build", small_source, tmp_path / "set", *SMALL).returncode == 0
    (tmp_path / "set" / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "set" / "deep")
    assert kamim("shards", "convert", "..").returncode == 0
    assert (tmp_path / "set-ffcv").is_dir()


def test_what_an_error_says_to_type_can_be_typed(small_source, tmp_path):
    out = tmp_path / "an out"
    assert kamim("shards", "build", small_source, out, *SMALL).returncode == 0
    (out / "shard-000002.tar").unlink()
    done = kamim("shards", "build", small_source, out, *SMALL)
    assert done.returncode == 1
    warning, line = done.stderr.splitlines()
    assert "is small" in warning
    assert line.startswith(f"kamim: {out / 'shard-000002.tar'} is missing")
    mended = kamim(*shlex.split(done.stderr.split("type: kamim ")[1]))
    assert mended.returncode == 0, mended.stderr
    assert mended.stderr.splitlines()[-1] == f"{out}: repaired shard-000002.tar"
    more = kamim("shards", "build", small_source, out, *SMALL, "--detector", "fast,orb")
    assert more.returncode == 2
    typed = shlex.split(more.stderr.splitlines()[-1].split("new folder: kamim ")[1])
    assert kamim(*typed).returncode == 0
    assert kamim("shards", "verify", f"{out}-orb").returncode == 0


def test_a_folder_whose_name_is_no_utf8_is_printed_as_it_was_typed(small_source, tmp_path):
    out = tmp_path / "caf\udce9"
    words = [*KAMIM, "shards", "build", small_source, out, *SMALL, "--jobs", "1"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    done = subprocess.run(words, capture_output=True, env=strict)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(os.fsencode(out))


def test_it_works_where_stderr_is_closed(small_source, tmp_path):
    words = [*KAMIM, "shards", "build", small_source, tmp_path / "out", *SMALL, "--jobs", "2"]
    done = subprocess.run(words, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2))
    assert done.returncode == 0, done.stdout
    assert done.stdout.decode().startswith(f"{tmp_path / 'out'}: 40 inputs = 40 written")
    assert kamim("shards", "verify", tmp_path / "out", "--level", "decode").returncode == 0


def test_small_frames_and_too_many_jobs_are_said(small_source, tmp_path):
    flags = ["--frame", "100", "--map-crops", "0", "--jobs", "999"]
    done = kamim("shards", "build", small_source, tmp_path / "out", *flags)
    assert done.returncode == 0
    said = done.stderr.splitlines()
    assert "--frame 100 is small for --crop 192 and --area 0.67" in said[0]
    assert said[0].endswith("give --frame 235 or more")
    assert said[1].startswith("--jobs 999 on ")
    fits = kamim("shards", "build", small_source, tmp_path / "b", "--frame", "235", "--jobs", "1")
    assert "is small" not in fits.stderr
    assert "cores" not in fits.stderr


def test_convert_speaks_json(small_source, tmp_path):
    out = tmp_path / "out"
    assert kamim("shards", "build", small_source, out, *SMALL).returncode == 0
    done = kamim("shards", "convert", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["out"], result["records"]) == (f"{out}-ffcv", 40)
    assert result["bytes"] == (tmp_path / "out-ffcv" / "records.beton").stat().st_size


def test_words_are_checked_before_any_library_is_there(tmp_path):
    """What the command line imports to answer; typing the wrong word costs no more."""
    heavy = ("cv2", "numpy", "joblib", "pandas", "torch", "tqdm", "PIL", "simplejpeg")
    code = (
        "import sys, typer, preprocess.cli as c\n"
        "try: c.app(sys.argv[1:], standalone_mode=False)\n"
        "except ValueError as error: print(error)\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    for arguments, words in [
        (["build", "--help"], "Usage"),
        (["build", "demo", str(tmp_path / "out"), "--detector", "fsat"], "unknown detector 'fsat'"),
        (["build", "demo", str(tmp_path / "out"), "--crop", "190"], "give 192"),
    ]:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True
        )
        assert words in done.stdout, done.stderr
        assert done.stdout.splitlines()[-1] == "[]"
    control = subprocess.run(
        [sys.executable, "-c", f"import cv2\n{code}", "build", "--help"],
        capture_output=True,
        text=True,
    )
    assert "cv2" in control.stdout.splitlines()[-1]


def test_help_names_every_dataset_and_backend():
    from preprocess import datasets, executors, options

    assert datasets.NAMES == options.DATASETS
    assert get_args(options.Backend) == executors.BACKENDS


def test_too_many_rejected_is_status_1(small_source, tmp_path):
    (small_source / "class0" / "empty.jpg").write_bytes(b"")
    done = kamim("shards", "build", small_source, tmp_path / "out", *SMALL)
    assert done.returncode == 1
    assert "2.4% of the inputs were rejected" in done.stderr
    accepted = kamim(
        "shards", "build", small_source, tmp_path / "out", *SMALL, "--max-rejected", "0.1"
    )
    assert accepted.returncode == 0
    assert "1 empty" in accepted.stdout


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_stopping_is_clean_and_the_same_command_goes_on(number, status, small_source, tmp_path):
    out = tmp_path / "out"
    slow = {**os.environ, "PYTHONPATH": f"{REPOSITORY}/tests/slow_build:{REPOSITORY}"}
    slow["SLOW_SECONDS"] = "0.2"
    command = [*KAMIM, "shards", "build", str(small_source), str(out), *SMALL, "--jobs", "2"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=slow,
        start_new_session=True,
        # A shell's background job, as this test may be in, is born deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(out.glob(".build/*[0-9].json")) and process.poll() is None:
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, log = process.communicate(timeout=300)
    assert process.returncode == status
    assert "Traceback" not in log
    assert "the same command goes on" in log.splitlines()[-1]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert kamim("shards", "verify", out, "--level", "decode").returncode == 0
    assert not list(out.glob("*.tmp"))


def test_help_says_what_each_option_is():
    for arguments in ([], ["shards"], ["maps"], ["shards", "build"], ["shards", "verify"]):
        done = kamim(*arguments, "--help")
        assert done.returncode == 0
        assert "Usage: kamim" in done.stdout
        listed = done.stdout.partition("Commands:")[2]
        assert "..." not in listed  # each is said in one line
        options = done.stdout.partition("Options:")[2]
        assert not re.search(r"<(str>|int|float|path|list)", options)


def test_the_current_folder_lends_no_room(tmp_path):
    """`python -m kamim` beside files of the user's that are called as our rooms are."""
    for name in ("train", "shards", "preprocess", "evaluate"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('theirs')\n")
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for words in (["--version"], ["recipes"]):
        done = subprocess.run(
            [*KAMIM, *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
