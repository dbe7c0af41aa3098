"""The native library: found beside this file, loaded once, its functions declared.

ctypes releases the GIL for the length of each call, so an engine's step never holds up the threads
that stream and serve.
"""

import ctypes
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from headrace.serving.errors import EngineFault

ABI_VERSION = 1
"""Raised together with HR_ABI_VERSION in native/api.h whenever a struct or signature changes."""

KERNELS_VARIABLE = "HEADRACE_KERNELS"
"""Environment variable: "auto" (the default), "avx512" or "portable". For tests and diagnosis."""

KERNELS = {"auto": 0, "portable": 1, "avx512": 2}


class NativeConfig(ctypes.Structure):
    """`HrConfig` in native/api.h: the facts of the model and the sizes of its pools."""

    _fields_ = (
        *(
            (name, c_int32)
            for name in (
                "layers",
                "hidden",
                "heads",
                "kv_heads",
                "head_dim",
                "ffn",
                "vocab",
                "qk_norm",
                "tied",
                "bits",
                "rows_max",
                "batch_tokens_max",
                "sequence_tokens_max",
                "kv_blocks",
                "threads",
                "kernels",
            )
        ),
        ("rms_eps", c_float),
        ("rope_scale", c_float),
    )


class NativeRow(ctypes.Structure):
    """`HrRow` in native/api.h: one sequence's share of a step, as offsets into flat arrays."""

    _fields_ = (
        ("tokens_first", c_int32),
        ("tokens", c_int32),
        ("position", c_int32),
        ("blocks_first", c_int32),
        ("blocks", c_int32),
        ("samples", c_int32),
    )


class NativeSampling(ctypes.Structure):
    """`HrSampling` in native/api.h: how one sequence's next token is chosen."""

    _fields_ = (
        ("seed", c_uint64),
        ("step", c_uint64),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("presence_penalty", c_float),
        ("frequency_penalty", c_float),
        ("top_k", c_int32),
        ("logprobs", c_int32),
        ("bias_count", c_int32),
        ("history_count", c_int32),
        ("forbid_count", c_int32),
        ("mask_words", c_int32),
        ("bias_ids", c_void_p),
        ("bias_values", c_void_p),
        ("history_ids", c_void_p),
        ("history_counts", c_void_p),
        ("forbid_ids", c_void_p),
        ("mask", c_void_p),
    )


def library_path() -> Path:
    """Where the built library lies.

    Raises:
        EngineFault: it has not been built.
    """
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        if (path := folder / f"_native{suffix}").exists():
            return path
    raise EngineFault(
        f"The native library is not in {folder}.",
        why="It is compiled when the package is installed, and this install has no such file.",
        fix="Install a C++17 compiler, then run `pip install --editable .` again.",
    )


@cache
def native_library() -> ctypes.CDLL:
    """The loaded library, with every function's types declared.

    Raises:
        EngineFault: it is missing, cannot be loaded, or was built from other sources.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineFault(
            f"The native library {path} cannot be loaded: {error}.",
            why="It was built for another machine or another C++ runtime.",
            fix="Run `pip install --editable .` again on this machine.",
        ) from error
    library.hr_abi_version.restype = c_int32
    if (found := library.hr_abi_version()) != ABI_VERSION:
        raise EngineFault(
            f"The native library {path} has interface {found}; this code needs {ABI_VERSION}.",
            why="It was built from other sources.",
            fix="Run `pip install --editable .` again.",
        )
    text = c_char_p
    signatures: dict[str, tuple[object, tuple[object, ...]]] = {
        "hr_kernels_name": (text, (c_int32,)),
        "hr_last_error": (text, ()),
        "hr_model_new": (c_void_p, (POINTER(NativeConfig),)),
        "hr_model_free": (None, (c_void_p,)),
        "hr_model_set": (
            c_int32,
            (c_void_p, text, c_int32, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64),
        ),
        "hr_model_ready": (c_int32, (c_void_p,)),
        "hr_model_bytes": (c_int64, (c_void_p, c_int32)),
        "hr_step": (
            c_int32,
            (c_void_p, c_int32, c_void_p, c_void_p, c_void_p, c_void_p),
        ),
        "hr_crew_new": (c_void_p, (c_int32, c_int32)),
        "hr_crew_free": (None, (c_void_p,)),
        "hr_sample": (
            c_int32,
            (c_void_p, c_int32, c_int32, c_int32, *(c_void_p,) * 6),
        ),
        "hr_read_bandwidth": (ctypes.c_double, (c_void_p, c_int64, c_int32)),
        "hr_int8_gop_s": (ctypes.c_double, (c_int32,)),
    }
    for name, (returns, takes) in signatures.items():
        function = getattr(library, name)
        function.restype = returns
        function.argtypes = takes
    return library


def last_error() -> str:
    """What the failed call on this thread says went wrong."""
    return native_library().hr_last_error().decode()


def kernels_wanted() -> int:
    """The kernel set that the environment asks for.

    Raises:
        EngineFault: the variable holds an unknown name.
    """
    name = os.environ.get(KERNELS_VARIABLE, "auto")
    if name not in KERNELS:
        raise EngineFault(
            f"{KERNELS_VARIABLE} is {name!r}.",
            why=f"It is one of {', '.join(KERNELS)}.",
            fix=f"Unset {KERNELS_VARIABLE}: the fastest kernels this CPU can run are the default.",
        )
    return KERNELS[name]
