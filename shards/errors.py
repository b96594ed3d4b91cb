"""The error that a person can correct, the word that was likely meant, and what to type for a
missing package.
"""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

# Packages, as they are imported, by the extra that installs them.
EXTRAS = {
    "demo": "skimage",
    "train": "torch torchvision timm safetensors tensorboard matplotlib sklearn",
    "remote": "fsspec s3fs gcsfs aiohttp huggingface_hub",
    "parquet": "pyarrow",
    "dask": "dask distributed",
    "ray": "ray",
    "numba": "numba",
}
# What pip calls a package that is imported by another name.
PIP = {"PIL": "pillow", "cv2": "opencv-python-headless"}
MAKEFILE = Path(__file__).parents[1] / "Makefile"  # in a checkout; a wheel has none


class UserError(ValueError):
    """A request that cannot be carried out: one line with the value, the rule and the next step."""


def nearest(word: str, words: Iterable[str]) -> str:
    """A question with the one of `words` that is nearest to `word`, or nothing if none is."""
    found = get_close_matches(word, list(words), n=1, cutoff=0.7)
    return f"; did you mean {found[0]}?" if found else ""


def install(module: str) -> str:
    """What to type for the package of `module`."""
    package = module.partition(".")[0]
    if package == "ffcv":
        return install_ffcv()
    for extra, packages in EXTRAS.items():
        if package in packages.split():
            return f"type, in the folder of kamim's sources: pip install '.[{extra}]'"
    return f"type: pip install {PIP.get(package, package)}"


def install_ffcv() -> str:
    """FFCV is source only, and asks for opencv-python, a second cv2: hence --no-deps."""
    if MAKEFILE.is_file():
        return "type, in the folder of kamim's sources: make ffcv"
    return (
        "type, in the folder of kamim's sources: apt-get install libopencv-dev libturbojpeg0-dev "
        "pkg-config g++ && pip install '.[ffcv]' && pip install --no-deps ffcv==1.0.2"
    )
