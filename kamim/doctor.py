"""What this machine can do: a line for each part, and what to type for what is missing.

Nothing is installed or changed.
"""

import importlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable

from shards.errors import install
from train.request import compiler_missing

Row = tuple[str, str, str]
# What is called what, the module, and when it is needed; what to type is said by install.
PACKAGES = {
    "torch": "torch",
    "timm": "timm",
    "demo photographs": "skimage",
    "webdataset library": "webdataset",
    "Weights & Biases": "wandb",
    "Dask": "distributed",
    "Ray": "ray",
    "S3": "s3fs",
    "Google storage": "gcsfs",
    "Parquet": "pyarrow",
}
# Nothing but these needs them.
FOR = {"webdataset": "only to read our shards without us", "wandb": "only for --wandb"}


def examine() -> list[Row]:
    """Every part; the third column is empty if nothing is missing."""
    rows = [("Python", platform.python_version(), "")]
    known = importlib.metadata.packages_distributions()  # reads the lists of all that is installed
    rows += [_package(part, module, known.get(module, [])) for part, module in PACKAGES.items()]
    return [
        *rows,
        _checked("CUDA", _cuda),
        _compiling(),
        _opencv(),
        _checked("Detectors", _detectors),
        _checked("FFCV", _ffcv),
        _checked("numba", _numba),
        _checked("libturbojpeg", _turbojpeg),
    ]


def _package(part: str, module: str, distributions: list[str]) -> Row:
    if importlib.util.find_spec(module) is None:
        wanted = f" ({FOR[module]})" if module in FOR else ""
        return part, "missing", install(module) + wanted
    for distribution in distributions:
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
        return "missing", "needs torch"
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})", ""
    return "no device; training runs on the CPU", "install an NVIDIA driver, if there is a GPU"


def _compiling() -> Row:
    hint = compiler_missing()
    return "compiling on CUDA", "missing" if hint else "C compiler and Python.h", hint


def _opencv() -> Row:
    wheels = [
        name
        for name in ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")
        if _installed(name)
    ]
    if not _installed("opencv-python-headless"):
        return (
            "OpenCV",
            f"not the headless wheel: {wheels}",
            "type: pip install opencv-python-headless",
        )
    state = f"{importlib.metadata.version('opencv-python-headless')} (headless)"
    if not wheels:
        return "OpenCV", state, ""
    hint = f"type: pip uninstall -y {' '.join(wheels)} opencv-python-headless && "
    hint += "pip install opencv-python-headless"
    return "OpenCV", f"{state}, and {', '.join(wheels)} in the same cv2 folder", hint


def _detectors() -> tuple[str, str]:
    import cv2

    from preprocess.detectors import CREATE

    there = [name for name, made_by in CREATE.items() if hasattr(cv2, f"{made_by}_create")]
    lacking = ", ".join(name for name in CREATE if name not in there)
    return ", ".join(there) + (f"; only OpenCV 4 has {lacking}" if lacking else ""), ""


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _ffcv() -> tuple[str, str]:
    if importlib.util.find_spec("ffcv") is None:
        return "missing", install("ffcv")
    import ffcv.loader  # noqa: F401

    return importlib.metadata.version("ffcv"), ""


def _numba() -> tuple[str, str]:
    if importlib.util.find_spec("numba") is None:
        return "missing", f"{install('numba')} (with it raw frames load 1.5 times as fast or more)"
    import numba

    return numba.__version__, ""


def _turbojpeg() -> tuple[str, str]:
    from shards import turbojpeg, vectored

    if turbojpeg.library() is None:
        return "missing", (
            "type: apt-get install libturbojpeg0 (or conda install libjpeg-turbo; with it and "
            "numba many threads load JPEG frames faster)"
        )
    if vectored.compiled() and turbojpeg.compiled() is None:  # by numba's fault, neither is
        return "of other pixels, not used", "take libjpeg-turbo 2.1 or newer"
    return "there", ""
