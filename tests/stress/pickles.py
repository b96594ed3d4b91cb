"""Programs dressed as data: pickles in checkpoints, objects in arrays, code in shards.

Each file must be refused in one line with nothing of it run.
"""

import io
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stress.cases import Case
from stress.forked import call, kamim
from stress.kills import LIMIT
from stress.watch import spawn_watched

TRAIN = ("--recipe", "tiny", "--batch", 4, "--epochs", 1, "--device", "cpu", "--resume")


class Payload:
    """Whoever unpickles it creates the canary file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.canary}'",)


def checkpoints(arena: Path, built: Path) -> Case:
    """Every command that reads weights, on every way to hide a program in them."""
    case = Case("archives", "pickles in checkpoints and weights")
    canary, place = arena / "canary", arena / "weights"
    place.mkdir()
    call(_write_weights, str(place), str(canary), log=arena / "weights.log")
    for path in sorted(place.iterdir()):
        run = arena / f"run-{path.stem}"
        (run / "checkpoints").mkdir(parents=True)
        shutil.copyfile(path, run / "checkpoints" / "step-00000001.pt")
        lines: list[list[object]] = [
            ["export", path, arena / "x.safetensors"],
            ["export-hf", path, arena / "y.safetensors"],
            ["probe", path, built, built, "--out", arena / "p"],
            ["analyse", path, built, "--out", arena / "a"],
            ["finetune", path, built, built, "--out", arena / "f"],
            ["pretrain", built, "--out", run, *TRAIN],
        ]
        for line in lines:
            log = arena / "pickle.log"
            process = spawn_watched(kamim, *line, log=log, secret=canary, allowed=[arena])
            flaw = refused(process.wait(LIMIT), process.text(), log.with_suffix(".deeds"), canary)
            case.trial(f"{line[0]} {path.name}: {flaw}" if flaw else "")
    return case


def _write_weights(folder: str, canary: str) -> None:
    import torch

    payload, place = Payload(Path(canary)), Path(folder)
    recipe = {"model": "vit_tiny_patch16_224", "size": 96, "options": {}}
    state = {"version": 1, "step": 1, "run": {"recipe": recipe}, "optimizer": {}}
    torch.save(state | {"model": payload}, place / "whole.pt")
    torch.save(state | {"model": {"encoder.x": payload}}, place / "tensor.bin")
    torch.save(
        state | {"model": {}, "run": payload},
        place / "facts.pt",
        _use_new_zipfile_serialization=False,
    )
    (place / "plain.pt").write_bytes(pickle.dumps({"model": payload}))
    (place / "named.safetensors").write_bytes(pickle.dumps(payload))
    (place / "old.bin").write_bytes(pickle.dumps(payload, protocol=0))


def refused(status: int | None, text: str, deeds: Path, canary: Path) -> str:
    """What is wrong with how a hostile file was met."""
    if canary.exists():
        canary.unlink()
        return "the payload ran"
    done = [line for line in deeds.read_text().splitlines() if "secret" in line or "system" in line]
    if done:
        return done[0]
    lines = [line for line in text.strip().splitlines() if line.startswith("kamim: ")]
    if status in (None, 0, 70) or len(lines) != 1 or "Traceback" in text:
        return f"status {status}: {text[-300:]}"
    return ""


def arrays(arena: Path, built: Path) -> Case:
    """Object arrays, and members that are code, in sets whose hashes are right."""
    case = Case("archives", "object arrays, .pyd and other members in foreign shards")
    canary = arena / "canary"
    for number, (name, spoil) in enumerate(_spoils(canary).items()):
        for source in (False, True):
            folder = arena / f"spoiled{number}"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(built, folder)
            spoil(folder)
            lines: list[list[object]] = [
                ["shards", "verify", folder, "--level", "decode"],
                ["pretrain", folder, "--out", arena / f"r{number}", *TRAIN],
            ]
            if source:  # the same tar as somebody's images: its pictures, and nothing else
                tar = folder / "shard-000000.tar"
                lines = [["shards", "build", tar, folder / "out", "--max-rejected", 1, "--jobs", 1]]
            for line in lines:
                log = arena / "array.log"
                process = spawn_watched(kamim, *line, log=log, secret=canary, allowed=[arena])
                status, deeds = process.wait(LIMIT), log.with_suffix(".deeds")
                flaw = refused(
                    2 if source and status == 0 else status,
                    "kamim: built" if source and status == 0 else process.text(),
                    deeds,
                    canary,
                )
                case.trial(f"{line[:2]}, {name}: {flaw}" if flaw else "")
    return case


def _spoils(canary: Path) -> dict[str, Callable[[Path], None]]:
    """Ways to put a program into a finished set, by name."""
    objects = io.BytesIO()
    np.save(objects, np.array([Payload(canary)], object), allow_pickle=True)
    program = objects.getvalue()

    def index(folder: Path) -> None:
        _reseal(folder, {"index.npy": program})

    def member(suffix: str, data: bytes) -> Callable[[Path], None]:
        def spoil(folder: Path) -> None:
            tar = folder / "shard-000000.tar"
            work = folder / "unpacked"
            work.mkdir()
            subprocess.run(["tar", "xf", tar, "-C", work], check=True)
            (work / f"000000000.{suffix}").write_bytes(data)
            names = sorted(path.name for path in work.iterdir())
            line = ["tar", "cf", tar, "-C", work, "--format=ustar", *names]
            subprocess.run(line, check=True)
            shutil.rmtree(work)
            _reseal(folder, {tar.name: tar.read_bytes()})

        return spoil

    return {
        "objects in index.npy": index,
        "objects in a density": member("fast.density.npy", program),
        "objects in frame.npy": member("frame.npy", program),
        "a pickle for a label": member("cls", pickle.dumps(Payload(canary))),
        ".pyd": member("pyd", pickle.dumps(Payload(canary))),
        ".pth": member("pth", pickle.dumps(Payload(canary))),
    }


def _reseal(folder: Path, changed: dict[str, bytes]) -> None:
    """Write files of a set, and a manifest that agrees with them."""
    from shards import spec

    manifest = spec.load(folder)
    rows = {file.name: file for file in [*manifest.shards, manifest.index]}
    for name, data in changed.items():
        rows[name] = spec.write_file(folder / name, data, rows[name].count)
    shards = [rows[file.name] for file in manifest.shards]
    spec.write(folder, replace(manifest, shards=shards, index=rows["index.npy"]))
