"""Commands as a user types them: by a process of their own, in this one, and without torch."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

KAMIM = [sys.executable, "-m", "kamim"]
# A kamim that cannot import torch: a word that is checked after it fails with another line.
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
import typed
found = [typed.kamim(*words) for words in json.load(sys.stdin)]
print(json.dumps([[each.returncode, each.stdout, each.stderr] for each in found]))
"""


def kamim_process(*arguments, **options):
    return subprocess.run([*KAMIM, *map(str, arguments)], capture_output=True, text=True, **options)


def kamim(*arguments):
    """As kamim_process, but here: to import everything anew takes a second."""
    from kamim.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    hook = threading.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with (
        mock.patch.object(sys, "argv", ["kamim", *map(str, arguments)]),
        mock.patch.dict(os.environ),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    threading.excepthook = hook
    return subprocess.CompletedProcess(arguments, ended.value.code, out.getvalue(), err.getvalue())


def without_torch(*commands, cwd):
    """How each of `commands`, lists of words, ends in one process that cannot import torch."""
    told = json.dumps([[str(word) for word in words] for words in commands])
    path = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=told,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = zip(commands, json.loads(done.stdout.splitlines()[-1]), strict=True)
    return [subprocess.CompletedProcess(words, *each) for words, each in found]
