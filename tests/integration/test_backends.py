"""Engines that run a build, the real ones: same bytes, workers and schedulers killed, refusals."""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY, contents, settings
from test_cli import SMALL
from typed import KAMIM
from typed import kamim_process as kamim

import preprocess.building
import preprocess.shard
from preprocess import BuildError, build_shards, open_source
from preprocess import executors as backends
from preprocess.shard import Written, confirm, write_shard
from shards.remote.place import Place
from shards.verification import verify_shards

SLOW = {
    **os.environ,
    "PYTHONPATH": f"{REPOSITORY}/tests/slow_build{os.pathsep}{REPOSITORY}",
    "SLOW_SECONDS": "0.1",
}

BARE = """import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "preprocess":
            raise ModuleNotFoundError("No module named 'preprocess'", name=name)
sys.meta_path.insert(0, Without())
"""


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextmanager
def started(*command, cwd=None, env=SLOW):
    """A process group of our own, killed at the end whatever happened."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=cwd,
        env=env,
    )
    try:
        yield process
    finally:
        kill_group(process)


def kill_group(process):
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def scheduler(port, **options):
    line = ["--host", "127.0.0.1", "--port", port, "--no-dashboard", "--no-show"]
    return started("distributed.cli.dask_scheduler", *line, **options)


def worker(port, threads=1, **options):
    line = [f"127.0.0.1:{port}", "--nthreads", threads, "--no-nanny", "--no-dashboard"]
    return started("distributed.cli.dask_worker", *line, **options)


def wait_for(port):
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)


def rows(out):
    return len(list(out.glob(".build/*[0-9].json")))


@pytest.fixture
def calm(small_source, tmp_path, build_once):
    return contents(build_once(small_source, tmp_path / "calm", settings()))


def test_the_commands_of_the_page_are_real():
    """Every option of the lines in docs/clusters.md is one that its program has."""
    pytest.importorskip("distributed")
    from distributed.cli import dask_scheduler, dask_worker
    from typer.testing import CliRunner

    from kamim.__main__ import app

    page = (REPOSITORY / "docs" / "clusters.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", page, re.M | re.S)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    texts = [line.partition("#")[0].split() for line in lines]
    seen = set()
    for program, command, *arguments in texts:
        if program == "dask":
            main = {"scheduler": dask_scheduler, "worker": dask_worker}[command].main
            main.make_context(command, arguments)
        elif "kamim" in (program, *arguments):
            words = arguments if program == "kamim" else arguments[arguments.index("pretrain") :]
            name = [command, arguments[0]] if program == "kamim" else ["pretrain"]
            text = CliRunner().invoke(app, [*name, "--help"]).stdout
            assert all(word in text for word in words if word.startswith("--"))
        elif program == "bash":
            assert (REPOSITORY / command).is_file()
        seen.add(program)
    assert seen == {"bash", "dask", "kamim", "ray", "torchrun"}


def test_a_dask_cluster_without_workers_is_told(monkeypatch, capsys):
    pytest.importorskip("distributed")
    monkeypatch.setattr(backends, "WORKER_SECONDS", 0)
    monkeypatch.setattr(backends, "POLL_SECONDS", 0.01)
    with ThreadPoolExecutor(1) as pool:
        client = SimpleNamespace(
            status="running",
            ncores=dict,
            scheduler=SimpleNamespace(address="tcp://head:8786"),
            submit=lambda work, *task, pure: pool.submit(work, *task),
        )
        tasks = iter([(0.2,), (0.0,)])
        assert list(backends._dask_results(client, 0, time.sleep, tasks)) == [None, None]
    said = capsys.readouterr().err
    assert said == "tcp://head:8786 has no worker yet; start one: dask worker tcp://head:8786\n"


def test_dask_on_this_machine_gives_the_same_bytes(small_source, calm, tmp_path):
    pytest.importorskip("distributed")
    manifest = build_shards(
        open_source(str(small_source)), tmp_path / "out", settings(), 2, backend="dask"
    )
    assert manifest.ledger.balanced
    assert contents(tmp_path / "out") == calm


def test_a_cluster_that_closes_slowly_is_no_error():
    """On a busy machine Dask's had taken more than its five seconds, and a whole build failed."""

    class Slow:
        def close(self, timeout):
            raise TimeoutError(timeout)

    backends._close(Slow(), 0.1)


@pytest.mark.slow
def test_ray_on_this_machine_gives_the_same_bytes(small_source, calm, tmp_path):
    pytest.importorskip("ray")
    source = open_source(str(small_source))
    manifest = build_shards(source, tmp_path / "out", settings(), 2, backend="ray")
    assert manifest.ledger.balanced
    assert contents(tmp_path / "out") == calm
    (small_source / "class1" / "bad.jpg").write_bytes(b"x")
    source = open_source(str(small_source))
    with pytest.raises(BuildError, match=r"^'class1/bad.jpg' was rejected") as caught:
        build_shards(source, tmp_path / "strict", settings(), 2, "fail", backend="ray")
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_ray_runs_the_task_of_a_killed_worker_again(small_source, calm, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    command = [*KAMIM, "shards", "build", str(small_source), str(out), *SMALL]
    command += ["--backend", "ray", "--jobs", "2"]
    process = subprocess.Popen(command, env=SLOW, stderr=subprocess.PIPE, text=True)
    while rows(out) < 2 and process.poll() is None:
        time.sleep(0.02)
    names = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    mine = [line.split()[0] for line in names.splitlines() if "ray::write_shard" in line]
    assert mine
    os.kill(int(mine[0]), signal.SIGKILL)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert contents(out) == calm


@pytest.mark.slow
def test_a_dask_cluster_loses_a_worker_and_its_scheduler(small_source, calm, tmp_path):
    """Separate processes; -9 to a worker, then to the scheduler, whose workers leave with it."""
    pytest.importorskip("distributed")
    port, out, seen = free_port(), tmp_path / "out", []
    command = [*KAMIM, "shards", "build", str(small_source), str(out), *SMALL]
    command += ["--backend", "dask", "--scheduler", f"127.0.0.1:{port}"]
    with scheduler(port) as first:
        wait_for(port)
        with worker(port) as doomed, worker(port):
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            for goal, victim in ((1, doomed), (4, first)):
                while rows(out) < goal and process.poll() is None:
                    time.sleep(0.02)
                kill_group(victim)
                seen.append(rows(out))
            with scheduler(port):
                wait_for(port)
                with worker(port), worker(port):
                    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert "the Dask scheduler is gone" in log
    assert "Traceback" not in log, log
    assert seen[-1] < 10  # or the kills fell beside the work and proved nothing
    assert contents(out) == calm
    assert verify_shards(out, "decode") == []


@pytest.mark.slow
def test_a_scheduler_gone_for_good_ends_in_one_line(small_source, calm, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(preprocess.building, "TRIES", 1)
    monkeypatch.setattr(preprocess.building, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(backends, "CONNECT_SECONDS", 2)
    port, out, source = free_port(), tmp_path / "out", open_source(str(small_source))
    with scheduler(port) as doomed:
        wait_for(port)
        with worker(port, threads=2):

            def kill():
                while rows(out) < 2:
                    time.sleep(0.02)
                kill_group(doomed)

            killer = threading.Thread(target=kill)
            killer.start()
            with pytest.raises(BuildError, match="run the same command again"):
                build_shards(source, out, settings(), backend="dask", scheduler=f"127.0.0.1:{port}")
            killer.join()
    assert 2 <= rows(out) < 10
    build_shards(source, out, settings(), 1)
    assert contents(out) == calm


@pytest.mark.slow
def test_workers_that_do_not_have_us_are_named(small_source, tmp_path):
    pytest.importorskip("distributed")
    port, place = free_port(), tmp_path / "bare"
    place.mkdir()
    (place / "sitecustomize.py").write_text(BARE)
    bare = {**os.environ, "PYTHONPATH": str(place)}
    with scheduler(port, cwd=place, env=bare):
        wait_for(port)
        with worker(port, cwd=place, env=bare):
            cluster = ["--backend", "dask", "--scheduler", f"127.0.0.1:{port}"]
            done = kamim("shards", "build", small_source, tmp_path / "out", *SMALL, *cluster)
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no module 'preprocess': install kamim" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("token", ["", "0123456789abcdef0123456789abcdef"])
def test_a_running_ray_cluster_is_joined_by_its_address(
    token, small_source, calm, tmp_path, monkeypatch
):
    pytest.importorskip("ray")
    auth = {"RAY_AUTH_MODE": "token" if token else "disabled", "RAY_AUTH_TOKEN": token}
    place = tempfile.mkdtemp(prefix="ray")  # tmp_path is too long for its sockets
    port, options = free_port(), ["--num-cpus", 2, "--object-store-memory", 100_000_000]
    options += ["--include-dashboard=false", "--disable-usage-stats", "--temp-dir", place]
    line = ["shards", "build", small_source, tmp_path / "out", *SMALL]
    line += ["--backend", "ray", "--scheduler", f"127.0.0.1:{port}"]
    start = ["start", "--head", "--block", "--port", port, *options]
    with started("ray.scripts.scripts", *start, env={**SLOW, **auth}) as head:
        wait_for(port)
        for name, value in auth.items():
            monkeypatch.setenv(name, value)
        done = kamim(*line)
        os.killpg(head.pid, signal.SIGTERM)  # it ends what it started, in groups of their own
        head.wait(timeout=60)
    shutil.rmtree(place)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == calm


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["loky", "dask", "ray"])
def test_ctrl_c_leaves_no_process_behind(backend, small_source, tmp_path):
    if backend != "loky":
        pytest.importorskip(backends.PACKAGES[backend])
    out, mark = tmp_path / "out", f"kamim-test-{os.getpid()}-{backend}"
    command = [*KAMIM, "shards", "build", str(small_source), str(out), *SMALL, "--jobs", "2"]
    process = subprocess.Popen(
        [*command, "--backend", backend],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**SLOW, "MARK": mark},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not rows(out) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, log = process.communicate(timeout=300)
    assert process.returncode == 130, log
    assert "Traceback" not in log, log
    assert "the same command goes on" in log.splitlines()[-1]
    deadline = time.monotonic() + 30
    while left := alive(mark):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def alive(mark):
    """Command lines of processes, zombies aside, that have MARK=`mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ")[:120])
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--backend", "spark"], "--backend"),
        (["--scheduler", "a:1"], "--scheduler a:1 needs --backend dask or --backend ray"),
        (["--backend", "dask", "--scheduler", "there"], "--scheduler there is not HOST:PORT"),
        (["--backend", "dask", "--scheduler", "x.json"], "x.json is no scheduler file"),
        (["--backend", "dask", "--scheduler", "127.0.0.1:1"], "start it with `dask scheduler`"),
        (["--backend", "ray", "--scheduler", "ray://127.0.0.1:1"], "`ray start --head --port 1`"),
    ],
)
def test_a_scheduler_that_cannot_be_is_one_line(arguments, words, tmp_path, capsys, monkeypatch):
    import kamim.__main__ as command_line

    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: True)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["kamim", "shards", "build", "demo", str(out), *arguments])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    heard = capsys.readouterr()
    assert (stopped.value.code, heard.out, heard.err.count("\n")) == (2, "", 1)
    assert words in heard.err
    assert not out.exists()


@pytest.mark.parametrize("backend", ["dask", "ray"])
def test_a_missing_library_is_named_with_what_to_type(backend, monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"pip install '.\[{backend}\]'"):
        backends.check(backend, "")


@pytest.fixture
def job(small_source, tmp_path):
    """A job whose first shard was written, as on another machine."""
    source, out = open_source(str(small_source)), tmp_path / "out"
    facts = preprocess.building.facts_of(source, settings())
    with preprocess.building.claim(source, settings(), Place.of(out), facts) as job:
        yield job, source.entries[:4], write_shard(job, 0, source.entries[:4])


def test_what_a_worker_says_is_looked_at(job, monkeypatch):
    job, entries, written = job
    monkeypatch.setattr(preprocess.shard, "PATIENCE_SECONDS", 0.2)
    shard = job.out.folder / "shard-000000.tar"
    assert written == Written(0, 4, shard.stat().st_size, socket.gethostname(), -1)
    confirm(job, written, entries)
    with pytest.raises(BuildError, match=r"with 7 bytes, here it has \d+; shards must be on"):
        confirm(job, written._replace(bytes=7), entries)
    with pytest.raises(BuildError, match=r"node7 could not read .* this machine can; the source"):
        confirm(job, written._replace(host="node7", unread=2), entries)
    assert not [*preprocess.shard.read_rows(job.work, job.out, job.fingerprint, [0])]
    shard.unlink()
    with pytest.raises(BuildError, match="here it has None"):
        confirm(job, written, entries)


def test_a_shard_that_comes_into_sight_later_is_waited_for(job):
    """As NFS shows another machine's file after a while."""
    real, entries, written = job
    shard = real.out.folder / "shard-000000.tar"
    aside = shard.rename(shard.with_suffix(".aside"))
    coming = threading.Timer(0.3, aside.rename, [shard])
    coming.start()
    confirm(real, written, entries)
    assert shard.exists()
    coming.join()


def test_a_worker_elsewhere_or_with_other_libraries_is_refused(job, tmp_path, monkeypatch):
    job, entries, _ = job
    with pytest.raises(BuildError, match="does not see the folder"):
        write_shard(replace(job, work=Place(str(tmp_path))), 1, entries)
    with pytest.raises(BuildError, match="does not see the folder"):
        write_shard(replace(job, fingerprint="0" * 64), 1, entries)
    monkeypatch.setattr(preprocess.shard.cv2, "__version__", "4.0.0")
    with pytest.raises(BuildError, match=r"has opencv 4.0.0, this build began with .*; install"):
        write_shard(job, 1, entries)


@pytest.mark.slow
def test_a_loky_worker_that_dies_costs_one_try(small_source, calm, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preprocess.building, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(preprocess.building, "write_shard", _dies_once)
    build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 2)
    assert contents(tmp_path / "out") == calm
    assert "a worker process died, perhaps for lack of memory" in capsys.readouterr().err


def test_an_engine_lost_before_it_told_of_a_shard_is_looked_for_again(
    small_source, calm, tmp_path, monkeypatch
):
    """Shards counted only once told of: a scheduler that died early had ended the build."""
    run, lost = backends.run, []

    def silent(backend, scheduler, jobs, work, tasks):
        if not lost:
            work(*next(tasks))
            lost.append(backends.Lost("the engine is gone"))
            raise lost[0]
        yield from run(backend, scheduler, jobs, work, tasks)

    monkeypatch.setattr(preprocess.building.backends, "run", silent)
    monkeypatch.setattr(preprocess.building, "PAUSE_SECONDS", 0)
    build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 1)
    assert contents(tmp_path / "out") == calm
    assert lost


def _dies_once(job, number, entries):
    if number == 3:
        try:
            (job.work.folder / "died").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os._exit(9)
    return write_shard(job, number, entries)


def test_a_worker_that_the_system_does_not_let_start_is_said_as_the_system_says_it(
    small_source, tmp_path, monkeypatch
):
    """joblib 1.6 then trips over what it never opened: a name that has no value."""
    from joblib.externals import loky
    from joblib.externals.loky.backend import popen_loky_posix

    def pipe():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    loky.get_reusable_executor().shutdown()
    monkeypatch.setattr(popen_loky_posix, "os", SimpleNamespace(**vars(os) | {"pipe": pipe}))
    with pytest.raises(OSError, match="Too many open files"):
        build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 2)
    monkeypatch.undo()
    build_shards(open_source(str(small_source)), tmp_path / "out", settings(), 2)
    assert not verify_shards(tmp_path / "out", "decode")
