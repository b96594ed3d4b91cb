"""Arrays out of CIFAR's pickles without running anything of them.

Plain containers and arrays of bytes come out. Whatever else a pickle asks for is refused by name;
not even NumPy's own unpickling runs.
"""

import io
import pickle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError


class _Dtype:
    """Stands in for numpy.dtype: keeps its name."""

    __slots__ = ("name",)

    def __init__(self, name: str = "", *flags: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        pass  # byte order and alignment, which single bytes have none of


class _Array:
    """Stands in for numpy.ndarray and for what makes one: keeps shape, type and bytes."""

    __slots__ = ("state",)

    def __init__(self, *arguments: object) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, by which Python 3 writes bytes for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes as {encoding}")
    return text.encode("latin1")


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle._Unpickler):
    """The one in Python: the memo of that in C has as many places as a pickle says."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return ALLOWED[module, name]


def load_dictionary(data: bytes, where: str) -> dict[str, Any]:
    """The dictionary that the pickle `data` holds, its arrays as uint8; text keys either way.

    Raises UserError, calling the pickle `where`, at anything but plain containers and bytes.
    """
    try:
        found = _Unpickler(io.BytesIO(data), encoding="latin1").load()
        return {_text(key): _plain(value) for key, value in found.items()}
    except Exception as error:  # hostile bytes raise anything
        words = " ".join(str(error).split())[:200]
        raise UserError(f"{where} is not one of CIFAR's pickles and is not read: {words}") from None


def _text(key: object) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        _, shape, dtype, fortran, raw = value.state
        if not isinstance(dtype, _Dtype) or dtype.name not in {"u1", "|u1"} or fortran:
            raise pickle.UnpicklingError("it holds an array of something else than bytes")
        raw = raw.encode("latin1") if isinstance(raw, str) else raw
        array: NDArray[np.uint8] = np.frombuffer(raw, np.uint8).reshape(shape)
        return array
    if isinstance(value, list):
        return [_text(item) if isinstance(item, bytes) else item for item in value]
    return value
