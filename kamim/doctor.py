"""What this machine can do: a line for each part, and what to type for what is missing.

Nothing is installed or changed.
"""

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Callable

from shards.errors import FFCV

FFCV_PACKAGES = "libopencv-dev libturbojpeg0-dev pkg-config g++"
Row = tuple[str, str, str]


def examine() -> list[Row]:
    """Every part in turn; the third column is empty where nothing is missing."""
    rows = [("Python", platform.python_version(), "")]
    rows += [_package(*part) for part in (
        ("torch", "torch", "pip install '.[train]'"),
        ("timm", "timm", "pip install '.[train]'"),
        ("demo photographs", "skimage", "pip install '.[demo]'"),
        ("webdataset library", "webdataset", "pip install webdataset (our reader needs it not)"),
        ("Weights & Biases", "wandb", "pip install wandb (only for --wandb)"),
        ("Dask", "distributed", "pip install '.[dask]'"),
        ("Ray", "ray", "pip install '.[ray]'"),
        ("S3", "s3fs", "pip install '.[remote]'"),
        ("Google storage", "gcsfs", "pip install '.[remote]'"),
        ("Parquet", "pyarrow", "pip install '.[parquet]'"),
    )]  # fmt: skip
    return [*rows, _checked("CUDA", _cuda), _opencv(), _checked("FFCV", _ffcv)]


def _package(part: str, module: str, hint: str) -> Row:
    if importlib.util.find_spec(module) is None:
        return part, "missing", hint
    for distribution in importlib.metadata.packages_distributions().get(module, []):
        return part, importlib.metadata.version(distribution), ""
    return part, "there", ""


def _checked(part: str, check: Callable[[], tuple[str, str]]) -> Row:
    """A row from a check that imports things; a broken installation is a finding, not a crash."""
    try:
        return part, *check()
    except Exception as error:
        return part, f"broken: {type(error).__name__}: {error}".splitlines()[0][:120], ""


def _cuda() -> tuple[str, str]:
    if importlib.util.find_spec("torch") is None:
        return "missing", "install torch first"
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})", ""
    return "no device; training runs on the CPU", "install an NVIDIA driver, if there is a GPU"


def _opencv() -> Row:
    wheels = [
        name
        for name in ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")
        if _installed(name)
    ]
    if not _installed("opencv-python-headless"):
        return "OpenCV", f"not the headless wheel: {wheels}", "pip install opencv-python-headless"
    state = f"{importlib.metadata.version('opencv-python-headless')} (headless)"
    if not wheels:
        return "OpenCV", state, ""
    hint = f"pip uninstall -y {' '.join(wheels)} opencv-python-headless && "
    hint += "pip install opencv-python-headless"
    return "OpenCV", f"{state}, and {', '.join(wheels)} in the same cv2 folder", hint


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _ffcv() -> tuple[str, str]:
    if importlib.util.find_spec("ffcv") is None:
        missing = [tool for tool in ("g++", "pkg-config") if not shutil.which(tool)]
        if "pkg-config" not in missing:
            for library in ("opencv4", "libturbojpeg"):
                found = subprocess.run(["pkg-config", "--exists", library], check=False)
                missing += [] if found.returncode == 0 else [library]
        first = f"apt-get install {FFCV_PACKAGES}; then " if missing else ""
        return "missing", f"{first}{FFCV}"
    import ffcv.loader  # noqa: F401

    return importlib.metadata.version("ffcv"), ""
