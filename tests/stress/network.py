"""A network between us and servers of other processes: cut, slow, refused, in reads and writes.

A proxy stands before moto's S3 server and Python's HTTP server. It closes connections that are
opened, resets them or ends them in the middle of an answer, and waits. Survived means that each
batch read, and each set written, is what it is without a fault.
"""

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from stores import BUCKET, HttpStore, S3Store

from stress.cases import Case
from stress.forked import Process, call, kamim, spawn
from stress.kills import LIMIT
from stress.material import SMALL, files, make_source

READS, WRITES = 500, 200  # faults that are made, at least
SHARE = 0.25  # of answers that meet a fault
FAULTS = ("refused", "reset", "cut", "slow")
SLOW = 0.3  # seconds
WINDOW = 4  # shards
ROOM = 700_000  # bytes of the cache: half of the set
SECONDS = 1800  # that a half of the section may take


class Proxy:
    """A process that passes bytes to `port` of this machine, and does not always."""

    def __init__(self, port: int, seed: int, folder: Path) -> None:
        self.log, told = folder / f"proxy-{port}.log", folder / f"proxy-{port}.port"
        self.log.touch()
        self.process = spawn(_pass_on, told, port, seed, self.log, log=folder / "proxy.out")
        while not told.exists() or not told.read_text():
            assert self.process.poll() is None, self.process.text()
            time.sleep(0.02)
        self.port = int(told.read_text())

    @property
    def faults(self) -> Counter[str]:
        return Counter(line for line in self.log.read_text().split() if line in FAULTS)


def _pass_on(told: Path, to: int, seed: int, log: Path) -> None:
    rng = random.Random(seed)

    def note(fault: str) -> str:
        if fault:
            with log.open("a") as file:
                file.write(f"{fault}\n")
        return fault

    def met() -> str:
        return note(rng.choice(FAULTS[1:]) if rng.random() < SHARE else "")

    async def pipe(source: asyncio.StreamReader, to: asyncio.StreamWriter, faulty: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                fault = met() if faulty else ""
                if fault == "slow":
                    await asyncio.sleep(SLOW)
                elif fault in ("reset", "cut"):
                    to.write(data[: rng.randint(0, len(data) - 1)])
                    await to.drain()
                    if fault == "reset":  # what is closed with this set is not ended but reset
                        linger = struct.pack("ii", 1, 0)
                        taken = to.get_extra_info("socket")
                        taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    break
                to.write(data)
                await to.drain()
        to.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if rng.random() < SHARE / 4:
            note("refused")
            writer.close()
            return
        there, back = await asyncio.open_connection("127.0.0.1", to)
        await asyncio.gather(pipe(reader, back, False), pipe(there, writer, True))

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        told.write_text(str(server.sockets[0].getsockname()[1]))
        await server.serve_forever()

    asyncio.run(run())


def run(arena: Path, scale: float, seed: int) -> Iterator[Case]:
    """A case of reads from S3, one from HTTP, one of writes."""
    source = make_source(arena / "source", 96, seed)
    process = spawn(
        kamim,
        "shards",
        "build",
        source,
        arena / "set",
        *SMALL,
        "--shard-size",
        4,
        log=arena / "log",
    )
    assert process.wait(LIMIT) == 0, process.text()
    for number, kind in enumerate((S3Store, HttpStore)):
        store = kind(arena / "set", arena / f"{kind.__name__}.log")
        proxy = Proxy(store.port, seed + number, arena)
        try:
            yield reads(store, proxy, arena, round(READS * scale / 2))
            if kind is S3Store:
                yield writes(store, proxy, arena, round(WRITES * scale))
        finally:
            proxy.process.kill()
            store.kill()


def through(store: S3Store, proxy: Proxy) -> dict[str, str]:
    """The environment of a client of S3 behind the proxy."""
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    place = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    return keys | place


def rounds(case: Case, proxy: Proxy, wanted: int, what: str) -> Iterator[int]:
    """Numbers from 0 until `wanted` faults were made, or one did harm; then the case is told."""
    begin, before, number = time.monotonic(), proxy.faults, 0
    while True:
        faults, spent = proxy.faults - before, time.monotonic() - begin
        if faults.total() >= wanted or case.lost or spent > SECONDS:
            break
        yield number
        number += 1
    kinds = ", ".join(f"{faults[kind]} {kind}" for kind in FAULTS)
    case.note = f"{faults.total()} faults ({kinds}) in {number} {what}, {spent:,.0f} s"


def reads(store: S3Store | HttpStore, proxy: Proxy, arena: Path, wanted: int) -> Case:
    """Epochs read through a cache that is too small for them, against the same from the disk."""
    s3 = isinstance(store, S3Store)
    case = Case("network", f"reads from {'S3' if s3 else 'HTTP'}")
    url = store.url if s3 else f"http://127.0.0.1:{proxy.port}"
    right = call(digests, str(arena / "set"), "", log=arena / "local.log")
    for _ in rounds(case, proxy, wanted, f"epochs of {len(right)} steps"):
        process, found = reading(url, through(store, proxy) if s3 else {}, arena)
        flaw = "" if process.status == 0 else f"status {process.status}: {process.text()[-400:]}"
        for step, digest in enumerate(right):
            wrong = flaw or ("" if found[step] == digest else f"step {step} differs")
            if not case.trial(wrong):
                break
    return case


def reading(url: str, environment: dict[str, str], arena: Path) -> tuple[Process, list[str]]:
    out = arena / "digests"
    out.unlink(missing_ok=True)

    def read() -> None:
        os.environ |= environment
        out.write_text("\n".join(digests(url, str(arena / "cache"))))

    process = spawn(read, log=arena / "read.log")
    process.wait(LIMIT)
    return process, out.read_text().split() if out.exists() else []


def digests(where: str, cache: str) -> list[str]:
    """sha256 of the frames and samples of each batch of an epoch."""
    import shards

    records = shards.open(where, cache=cache, cache_limit=ROOM) if cache else shards.open(where)
    windows = shards.Windows([shard.count for shard in records.shards], WINDOW, 0)
    plan = shards.Plan(len(records), 8, windows=windows)
    found = []
    for batch in records.loader(plan, 0, 2 * len(records) // 8):
        digest = hashlib.sha256(batch.frames.tobytes())
        digest.update(batch.samples.tobytes())
        found.append(digest.hexdigest())
    return found


def writes(store: S3Store, proxy: Proxy, arena: Path, wanted: int) -> Case:
    """Builds into the store, which end as the set on the disk, or begin again where they ended."""
    case = Case("network", "builds into S3")
    right = files(arena / "set")
    for number in rounds(case, proxy, wanted, "builds"):
        case.trial(_written(f"s3://{BUCKET}/out-{number}", store, proxy, arena, right))
    return case


def _written(url: str, store: S3Store, proxy: Proxy, arena: Path, right: dict[str, str]) -> str:
    line = ["shards", "build", arena / "source", url, *SMALL, "--shard-size", 4]
    process = spawn(_with, through(store, proxy), *line, log=arena / "build.log")
    if process.wait(LIMIT) != 0:
        return f"status {process.status}: {process.text()[-400:]}"
    back = arena / "back"
    for path in back.glob("*"):
        path.unlink()
    process = spawn(_with, store.environment, "shards", "copy", url, back, log=arena / "copy.log")
    if process.wait(LIMIT) != 0:
        return f"copied back: {process.text()[-400:]}"
    return "" if files(back) == right else "the set in the store differs"


def _with(environment: dict[str, str], *arguments: object) -> None:
    os.environ |= environment
    kamim(*arguments)
