"""A user's own detector: `module:function` in, its checked points or map of an image out.

A function takes uint8 RGB [H, W, 3] and gives points float32 [N, 2], (x, y) from pixel centres,
or a map float32 [h, w] of any size above 2 columns, 0 to 1. Its keyword arguments with a default
are its options. Only names and hashes go from process to process: each imports for itself.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from preprocess import BuildError
from preprocess.decode import Rejected
from preprocess.detectors import MODELS
from shards.errors import UserError
from shards.spec import Detector, Plugin

FAILED, WRONG = "detector-failed", "detector-output"  # reasons of the ledger
VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_hashes: dict[str, str] = {}  # of modules, as they were when this process imported them


def described(function: str) -> tuple[Plugin, dict[str, Any]]:
    """What the manifest says of `module:function`, and its options with their defaults.

    Raises UserError if there is no such module or function.
    """
    module = function.partition(":")[0]
    path = _file_of(function)
    chosen = _imported(function, _sha256(path))
    try:
        parameters = inspect.signature(chosen).parameters.values()
    except ValueError:  # compiled code may have none
        raise UserError(
            f"{function} does not say its arguments; call it in a function of your own"
        ) from None
    bare = [p.name for p in [*parameters][1:] if p.default is p.empty and p.kind not in VARIABLE]
    if bare:
        names = ", ".join(bare)
        raise UserError(f"{function} is called with an image alone; give {names} a default")
    options = {
        each.name: each.default
        for each in parameters
        if isinstance(each.default, (bool, int, float))
    }
    return Plugin(function, _version_of(module), _sha256(path)), options


def found(detector: Detector, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Points [N, 2] or map [h, w] that the plug-in finds in `rgb`, float32.

    Raises Rejected, naming the function, if it raises or returns anything else; BuildError if the
    function here is not the one that the settings name.
    """
    function, name = loaded(detector), detector.plugin and detector.plugin.function
    try:
        result = function(rgb.copy(), **detector.options)  # it may draw on what it is shown
    except (Exception, SystemExit) as error:
        raise Rejected(FAILED, f"{name}: {type(error).__name__}: {error}"[:300]) from None
    return checked(str(name), result, rgb.shape[:2])


def loaded(detector: Detector) -> Callable[..., Any]:
    """The function of a plug-in, imported. Raises BuildError as `found`."""
    assert detector.plugin is not None
    return _loaded(detector.plugin.function, detector.plugin.sha256)


def checked(name: str, result: object, size: tuple[int, ...]) -> NDArray[np.float32]:
    """`result` of function `name` for an image of `size` (height, width), or Rejected."""
    if not isinstance(result, np.ndarray):
        raise Rejected(WRONG, f"{name} returned {type(result).__name__}, not a NumPy array")
    if result.ndim != 2 or result.dtype.kind != "f" or result.shape[1] == 0:
        shape = list(result.shape)
        raise Rejected(
            WRONG,
            f"{name} returned {result.dtype} {shape}; points are float32 [N, 2], maps [h, w]",
        )
    if result.shape[1] != 2 and len(result) == 0:
        raise Rejected(WRONG, f"{name} returned a map without rows")
    if not np.isfinite(result).all():
        raise Rejected(WRONG, f"{name} returned a value that is not finite")
    if result.shape[1] == 2:
        most = np.array([size[1], size[0]]) - 0.5
        if ((result < -0.5) | (result > most)).any():
            raise Rejected(WRONG, f"{name} returned points outside of {size[1]} x {size[0]} px")
    elif result.min() < 0 or result.max() > 1:
        span = f"{result.min():g} to {result.max():g}"
        raise Rejected(WRONG, f"{name} returned a map of {span}; give 0 to 1")
    return np.ascontiguousarray(result, np.float32)


@lru_cache(maxsize=16)
def _loaded(function: str, sha256: str) -> Callable[..., Any]:
    """The function, imported once per process, if its file is the one that was hashed."""
    try:
        here = _sha256(_file_of(function))
        if here == sha256:
            return _imported(function, here)
    except UserError as error:
        raise BuildError(f"a process of this build cannot import it: {error}") from None
    raise BuildError(
        f"the file of {function} is not the one of these shards (sha256 {here[:8]} here, "
        f"{sha256[:8]} there): the densities could differ; restore it, or build into a new folder"
    )


def _file_of(function: str) -> Path:
    """The source file of `module:function`, found without importing it. UserError if none is."""
    module, colon, name = function.partition(":")
    if module in MODELS:
        if not Path(name).is_file():
            raise UserError(
                f"there is no file {name!r}; name {module}'s network, {module}:FILE.onnx"
            )
        return Path(name)
    if not (colon and name.isidentifier()):
        raise UserError(f"{function!r} is not MODULE:FUNCTION")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # as for python -m; at the end, so that it hides nothing
    importlib.invalidate_caches()
    try:
        with redirect_stdout(sys.stderr):  # stdout is for our results
            spec = importlib.util.find_spec(module)
    except (Exception, SystemExit) as error:  # it imports what the module lies in
        words = f"{type(error).__name__}: {error}"
        raise UserError(f"there is no module {module!r} for {function!r}: {words}") from None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise UserError(
            f"there is no module {module!r} for {function!r}: install it, or run in its folder"
        )
    return Path(spec.origin)


def _imported(function: str, sha256: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    if module in MODELS:
        return _network(module, name)
    try:
        with redirect_stdout(sys.stderr):
            home = importlib.import_module(module)
        if _hashes.setdefault(module, sha256) != sha256:  # edited since, as in a notebook
            home = importlib.reload(home)
            _hashes[module] = sha256
    except (Exception, SystemExit) as error:  # whatever a person's module does
        raise UserError(f"importing {module} failed: {type(error).__name__}: {error}") from None
    chosen = getattr(home, name, None)
    if not callable(chosen):
        raise UserError(f"{module} has no function {name!r}")
    return chosen


def _network(model: str, path: str) -> Callable[..., Any]:
    """What finds points by a network of OpenCV's, in the file `path`."""
    create = getattr(cv2, f"{MODELS[model]}_create", None)
    if create is None:
        raise UserError(
            f"OpenCV {cv2.__version__} has no {model}; version 5 has: type pip install "
            "'opencv-python-headless>=5'"
        )
    try:
        network = create(path)
    except cv2.error as error:
        raise UserError(f"{path} is no network for {model}: {error.err}") from None

    def points(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        found = network.detect(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        return np.asarray(cv2.KeyPoint_convert(found), np.float32).reshape(-1, 2)

    return points


def _version_of(module: str) -> str:
    if module in MODELS:
        return cv2.__version__
    top = module.partition(".")[0]
    for distribution in importlib.metadata.packages_distributions().get(top, []):
        return importlib.metadata.version(distribution)
    return str(getattr(importlib.import_module(module), "__version__", ""))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
