"""The TensorRT library that builds: which one is here, and whether it can build at all."""

from importlib import import_module
from typing import Any

from headrace.serving.errors import UnsupportedModel

RTX = "tensorrt_rtx"
TENSORRT = "tensorrt"

_INSTALL = {
    RTX: "pip install 'headrace[rtx]'",
    TENSORRT: "pip install tensorrt-cu13 (11.4) on the machine with the GPU",
}


def open_library(name: str) -> Any:
    """Import a library and answer its module.

    Raises:
        UnsupportedModel: it is not installed.
    """
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing.
        raise UnsupportedModel(
            f"The library {name} cannot be imported.",
            why=f"{error}.",
            fix=f"Install it: {_INSTALL[name]}.",
        ) from error


def library_version(name: str) -> str:
    """The version that a plan built here will demand.

    Raises:
        UnsupportedModel: the library is not installed.
    """
    return str(open_library(name).__version__)
