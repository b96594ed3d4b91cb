"""100,000 inputs are listed, described and planned in seconds and little memory."""

import json
import subprocess
import sys
import tarfile

import pytest

COUNT = 100_000
SCRIPT = """
import json, re, sys, time
import preprocess.building
from pathlib import Path
from conftest import settings
from shards.remote.place import Place
started = time.process_time()
source = preprocess.open_source(sys.argv[1])
facts = preprocess.building.facts_of(source, settings(shard_size=1000))
assert preprocess.building.check_folder(Place.of(sys.argv[2]), facts) is None
seconds = time.process_time() - started
# Not ru_maxrss, which begins with what the process that started this one had.
peak = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps([len(source.entries), len(source.classes), seconds, peak]))
"""


def write_tar(path):
    with open(path, "wb") as file:
        for n in range(COUNT):
            info = tarfile.TarInfo(f"train/n{n // 1000:08d}/n{n // 1000:08d}_{n}.JPEG")
            info.size = 700
            file.write(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        file.write(bytes(1024))


def write_folder(path):
    for n in range(COUNT):
        folder = path / f"n{n // 1000:08d}"
        if n % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{folder.name}_{n}.JPEG").touch()


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_tar, write_folder])
def test_100_000_inputs_are_planned_in_10_seconds_and_300_mb(write, tmp_path):
    write(tmp_path / "source")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "source"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    inputs, classes, seconds, peak = json.loads(done.stdout)
    assert (inputs, classes) == (COUNT, COUNT // 1000)
    assert seconds < 10  # of this process: others may share the machine
    assert peak < 300  # MB, with OpenCV and all libraries
