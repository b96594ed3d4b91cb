"""The error that a person can mend, and what to type for a package that is missing."""

# Packages, as they are imported, by the extra that installs them.
EXTRAS = {
    "demo": "skimage",
    "train": "torch torchvision timm safetensors tensorboard matplotlib sklearn",
    "remote": "fsspec s3fs gcsfs aiohttp huggingface_hub",
    "parquet": "pyarrow",
    "dask": "dask distributed",
    "ray": "ray",
}


class UserError(ValueError):
    """A request that cannot be carried out: one line with the value, the rule and the next step."""


# FFCV is source only, and asks for opencv-python, a second cv2: hence --no-deps.
FFCV = (
    "type, in the folder of kamim's sources: make ffcv; or: apt-get install libopencv-dev "
    "libturbojpeg0-dev pkg-config g++, pip install '.[ffcv]', pip install --no-deps ffcv==1.0.2"
)


def install(module: str) -> str:
    """What to type for the package of `module`."""
    if module == "ffcv":
        return FFCV
    package = module.partition(".")[0]
    for extra, packages in EXTRAS.items():
        if package in packages.split():
            return f"type, in the folder of kamim's sources: pip install '.[{extra}]'"
    return f"type: pip install {package}"
