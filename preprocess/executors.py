"""Where the tasks of a build run: processes of this machine, a Dask cluster or a Ray cluster.

If a worker dies, the engine runs its task again elsewhere. Lost says that the engine itself is
gone. joblib's own dask and ray backends are not used: docs/decisions.md says why.
"""

import importlib.util
import json
import logging
import math
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import joblib

from preprocess import BuildError
from shards.errors import UserError, install

Tasks = Iterator[tuple[Any, ...]]
Results = Generator[Any, None, None]
PACKAGES = {"dask": "distributed", "ray": "ray"}
BACKENDS = ("loky", *PACKAGES)
CONNECT_SECONDS, WORKER_SECONDS, POLL_SECONDS = 10, 10, 1.0
AHEAD = 16  # tasks beyond one per core: no worker waits, and adaptive clusters grow


class Lost(Exception):
    """The engine, not a task, is gone; the message says what happened. A new one may go on."""


def check(backend: str, scheduler: str) -> None:
    """Raise UserError, saying what to type, unless `backend` can run here with `scheduler`."""
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    if backend == "loky":
        if scheduler:
            raise UserError(f"--scheduler {scheduler} needs --backend dask or --backend ray")
        return
    if importlib.util.find_spec(PACKAGES[backend]) is None:
        raise UserError(f"{backend} is not installed; {install(PACKAGES[backend])}")
    if scheduler and (backend, scheduler) != ("ray", "auto"):
        _knock(backend, _address(scheduler))


def run(backend: str, scheduler: str, jobs: int, work: Callable[..., Any], tasks: Tasks) -> Results:
    """Yield `work(*task)` for each of `tasks`, which are drawn only as fast as they are run.

    jobs: tasks at once; 0: one per core, of this machine or of all that the scheduler has. Closing
    the generator ends what it started. Raises Lost, BuildError, and what `work` raises.
    """
    if backend == "dask":
        return _dask(scheduler, jobs, work, tasks)
    if backend == "ray":
        return _ray(scheduler, jobs, work, tasks)
    return _loky(jobs, work, tasks)


def _loky(jobs: int, work: Callable[..., Any], tasks: Tasks) -> Results:
    pool = joblib.Parallel(
        n_jobs=jobs or joblib.cpu_count(),
        return_as="generator_unordered",
        # No array goes by a file, so nothing is written below this folder. By default a killed
        # build would leave some in shared memory for good; joblib 1.6 wants a name in ASCII.
        max_nbytes=None,
        temp_folder=os.sep,
    )
    with ExitStack() as stack:
        stack.callback(cv2.setNumThreads, cv2.getNumThreads())  # one job is done in this process
        try:
            results = pool(joblib.delayed(work)(*task) for task in tasks)
            stack.callback(results.close)  # ends the workers' tasks when we are stopped midway
            yield from results
        except joblib.externals.loky.process_executor.TerminatedWorkerError:
            raise Lost("a worker process died, perhaps for lack of memory (fewer --jobs)") from None
        except UnboundLocalError as error:  # joblib 1.6, when the system lets no worker start
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _dask(scheduler: str, jobs: int, work: Callable[..., Any], tasks: Tasks) -> Results:
    from distributed import Client, LocalCluster
    from distributed.comm import CommClosedError

    for name in {"asyncio", *logging.root.manager.loggerDict}:  # what matters is said by Lost
        if name.partition(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if scheduler:
            place: Any = _address(scheduler)
        else:
            place = LocalCluster(
                n_workers=jobs or joblib.cpu_count(),
                threads_per_worker=1,
                processes=True,
                dashboard_address=None,
                memory_limit=0,
                silence_logs=logging.CRITICAL,
            )
            stack.callback(_close, place, 30)
        try:
            client = Client(place, timeout=CONNECT_SECONDS, set_as_default=False)
        except OSError:
            raise Lost(f"no Dask scheduler answers at {place}") from None
        stack.callback(_close, client, 2)
        try:
            if not scheduler:
                client.run(_deafen)
            yield from _dask_results(client, jobs if scheduler else 0, work, tasks)
        except (CommClosedError, CancelledError):
            raise Lost("the Dask scheduler is gone, or it was restarted") from None


def _close(part: Any, timeout: float) -> None:
    """Close a cluster or client. If that takes longer, it goes on by itself, and is no error of a
    build.
    """
    with suppress(TimeoutError):
        part.close(timeout=timeout)


def _dask_results(client: Any, jobs: int, work: Callable[..., Any], tasks: Tasks) -> Results:
    from distributed.scheduler import KilledWorker
    from tqdm import tqdm

    ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
    waiting: set[Any] = set()
    most, asked, alone = jobs, -math.inf, time.monotonic() + WORKER_SECONDS
    while True:
        if client.status != "running":
            raise CancelledError
        if not jobs and time.monotonic() > asked + POLL_SECONDS:  # workers come and go
            cores, asked = sum(client.ncores().values()), time.monotonic()
            most, alone = cores + AHEAD, math.inf if cores else alone
            if asked > alone:
                place = client.scheduler.address
                line = f"{place} has no worker yet; start one: dask worker {place}"
                tqdm.write(line, file=sys.stderr)
                alone = math.inf
        for task in islice(tasks, max(0, most - len(waiting))):
            future = client.submit(work, *task, pure=False)
            future.add_done_callback(ended.put)
            waiting.add(future)
        if not waiting:
            return
        try:
            future = ended.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        waiting.discard(future)
        try:
            result = future.result()
        except KilledWorker as error:
            raise _given_up(error.allowed_failures + 1) from None
        except (ImportError, RuntimeError) as error:
            raise _foreign(error) from None
        yield result


def _ray(scheduler: str, jobs: int, work: Callable[..., Any], tasks: Tasks) -> Results:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of GPUs
    import ray

    place: dict[str, Any] = {"address": scheduler or "local"}
    if not scheduler:
        place |= {"num_cpus": jobs or joblib.cpu_count(), "include_dashboard": False}
        place["object_store_memory"] = 100_000_000
    where = f"{scheduler}, for a token with RAY_AUTH_MODE=token" if scheduler else "this machine"
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**place, log_to_driver=False, logging_level=logging.CRITICAL)
    except OSError as error:
        raise Lost(f"no Ray at {where} ({_first_line(error)})") from None
    except (RuntimeError, ValueError) as error:  # of another version, say
        raise BuildError(f"Ray at {where}: {_first_line(error)}") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own in the place of ours
    waiting: list[Any] = []
    most = jobs if scheduler else 0
    try:
        task_of = ray.remote(num_cpus=1, max_retries=3)(work)
        while True:
            room = (most or int(ray.cluster_resources().get("CPU", 0)) + AHEAD) - len(waiting)
            waiting += [task_of.remote(*task) for task in islice(tasks, max(0, room))]
            if not waiting:
                return
            done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            for reference in done:
                yield _ray_result(ray.get, reference)
    except (ray.exceptions.RaySystemError, ConnectionError) as error:
        raise Lost(f"Ray is gone ({_first_line(error)})") from None
    except SystemError as error:  # what a signal raised inside of Ray's compiled code
        raise error.__cause__ or error from None
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _ray_result(get: Callable[[Any], Any], reference: Any) -> Any:
    """What a task returned. What it raised is raised without Ray's copy of the traceback."""
    from ray import exceptions

    try:
        return get(reference)
    except exceptions.RayTaskError as error:
        cause = error.cause
        raise (_foreign(cause) if isinstance(cause, ImportError) else cause) from None
    except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError) as error:
        raise _given_up(4, f" ({_first_line(error)})") from None


def _given_up(workers: int, why: str = "") -> Lost:
    died = f"a shard was given up after {workers} workers died of it"
    return Lost(f"{died}, perhaps for lack of memory{why}")


def _deafen() -> None:
    """Leave Ctrl-C to the driver; run in the main thread of each process of a local cluster."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _foreign(error: BaseException) -> BaseException:
    """A BuildError if a worker cannot import us; any other error as it is."""
    chain, cause = str(error), error.__cause__
    while cause is not None:
        chain, cause = f"{chain}: {cause}", cause.__cause__
    if "No module named" not in chain:
        return error
    missing = chain.rpartition("No module named")[2].split()[0].strip("'\".:")
    return BuildError(
        f"the cluster has no module {missing!r}: install kamim, of this version, where its "
        "scheduler and workers run, and start them again"
    )


def _address(scheduler: str) -> str:
    """The address meant: itself, or what a Dask scheduler file (.json) says."""
    if not scheduler.endswith(".json"):
        return scheduler
    try:
        return str(json.loads(Path(scheduler).read_bytes())["address"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--scheduler {scheduler} is no scheduler file of Dask's") from None


def _knock(backend: str, address: str) -> None:
    """UserError unless something listens at `address`, [PROTOCOL://]HOST:PORT."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--scheduler {address} is not HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        start = {"dask": "dask scheduler", "ray": f"ray start --head --port {port}"}[backend]
        raise UserError(
            f"--scheduler {address} does not answer ({_first_line(error)}); start it with "
            f"`{start}`, or leave --scheduler out to use this machine alone"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
