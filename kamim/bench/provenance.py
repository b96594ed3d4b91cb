"""What every number travels with: its spread, date, commit, hardware, library versions."""

import json
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shards.errors import UserError

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "bench"
PACKAGES = (
    "numpy",
    "numba",
    "opencv-python-headless",
    "simplejpeg",
    "joblib",
    "torch",
    "timm",
    "ffcv",
    "torchvision",
    "webdataset",
    "litdata",
    "safetensors",
    "atheris",
)


def provenance() -> dict[str, Any]:
    """Date, commit, machine and versions of this run."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
    }


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median, least and most."""
    names = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in names.items()}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """The spread of the quotients of figures taken in turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def check_checkout() -> None:
    """UserError unless there is a place for results: they are kept in a checkout alone."""
    if not RESULTS.is_dir():
        raise UserError(
            f"results are kept in a checkout of kamim, and there is no {RESULTS}; run "
            "`python -m kamim bench --save` in one, or leave --save out"
        )


def append(name: str, rows: list[dict[str, Any]]) -> Path:
    """Append `rows`, each with its provenance, to results/`name`.jsonl; returns the path."""
    path, origin = RESULTS / f"{name}.jsonl", provenance()
    with path.open("a") as file:
        file.writelines(json.dumps({**row, **origin}, sort_keys=True) + "\n" for row in rows)
    return path


def _git(*arguments: str) -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
