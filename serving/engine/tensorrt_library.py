"""The TensorRT library of an artifact, and a plan read with it.

A plan is read by the very version that wrote it. The library is asked for nothing but its version
before a device has answered: without a driver `tensorrt` returns a Runtime whose use ends the
process.
"""

import logging
import mmap
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Final, cast

from headrace.serving import log
from headrace.serving.domain.artifact import TensorRt
from headrace.serving.engine.device import Device
from headrace.serving.engine.tensorrt_api import ICudaEngine, Library, Runtime, Severity
from headrace.serving.errors import ArtifactTampered, DeviceUnsuitable

LIBRARIES = ("tensorrt", "tensorrt_rtx")

LINES_MAX: Final = 200
"""Of a library's log, for each process: loading writes tens of lines, and a loop of warnings, one
for each step, would fill a disk."""

_LEVELS = {
    "INTERNAL_ERROR": logging.ERROR,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.DEBUG,
}
"""The library's INFO is about itself, hence our DEBUG; its VERBOSE is left out."""


class LibraryLog:
    """Where a library's lines go: to our log, up to `LINES_MAX` of them."""

    def __init__(self, library: str) -> None:
        self._library = library
        self._lines = 0
        self._last_error = ""

    def add(self, severity: Severity, message: str) -> None:
        """Take one line. Called by any of the library's threads; raises nothing."""
        level = _LEVELS.get(severity.name)
        if level is None:
            return
        if level >= logging.ERROR:
            self._last_error = message
        self._lines += 1
        if self._lines <= LINES_MAX:
            log.library_said(library=self._library, level=level, said=message)
        elif self._lines == LINES_MAX + 1:
            said = f"{LINES_MAX} lines were written; further ones are left out"
            log.library_said(library=self._library, level=logging.WARNING, said=said)

    def because(self, otherwise: str) -> str:
        """The reason the library gave last, as a sentence, once; this one where it gave none."""
        said, self._last_error = self._last_error, ""
        return f"{said.rstrip('.')}." if said else otherwise


def open_library(facts: TensorRt) -> Library:
    """Import the library that wrote the plan.

    Raises:
        ArtifactTampered: the manifest names something else.
        DeviceUnsuitable: it is not installed, or in another version.
    """
    if facts.library not in LIBRARIES:
        raise ArtifactTampered(
            f"The manifest names the library {facts.library!r}.",
            why=f"Plans are read with {' or '.join(LIBRARIES)}.",
            fix="Build the artifact again with `headrace compile`.",
        )
    package = facts.library.replace("_", "-")
    fix = (
        f"Install it with `pip install {package}-cu13=={facts.version}`, or compile the model "
        "again with the version that is installed."
    )
    try:
        library = cast("Library", import_module(facts.library))
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing.
        raise DeviceUnsuitable(
            f"{facts.library} {facts.version} cannot be imported.",
            why=f"{error}.",
            fix=fix,
        ) from error
    if library.__version__ != facts.version:
        raise DeviceUnsuitable(
            f"The plan was built with {facts.library} {facts.version}; {library.__version__} is "
            "installed.",
            why="A plan holds compiled kernels, which only the version that wrote them runs.",
            fix=fix,
        )
    return library


def require_capability(facts: TensorRt, device: Device) -> None:
    """Compare the device with those that the plan was made for.

    Raises:
        DeviceUnsuitable: it is none of them.
    """
    if device.compute_capability not in facts.compute_capabilities:
        wanted = ", ".join(facts.compute_capabilities)
        raise DeviceUnsuitable(
            f"The plan runs on compute capability {wanted}; {device.name} has "
            f"{device.compute_capability}.",
            why="A plan holds kernels compiled for the devices named at its build.",
            fix="Serve it on such a device, or compile the model for this one with `--target`.",
        )
    if facts.device and device.name != facts.device:
        raise DeviceUnsuitable(
            f"The plan was built on a {facts.device}; here is a {device.name}.",
            why="A plan of TensorRT is for the model of GPU that built it.",
            fix="Compile the model again on this machine.",
        )


@lru_cache(maxsize=len(LIBRARIES))
def library_log(library: Library) -> LibraryLog:
    """The library's log: one for the process, since the library keeps the first one it is given."""

    class Forwarding(LibraryLog, library.ILogger):
        def __init__(self) -> None:
            # The second base is compiled: it must be told that it is made.
            library.ILogger.__init__(self)
            LibraryLog.__init__(self, library.__name__)

        def log(self, severity: Severity, msg: str) -> None:
            self.add(severity, msg)

    return Forwarding()


def read_plan(runtime: Runtime, path: Path, said: LibraryLog) -> ICudaEngine:
    """Put a plan's weights on the device. The file is read from the page cache, not copied.

    Raises:
        ArtifactTampered: the file is missing or empty, or the library does not accept it.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            plan.madvise(mmap.MADV_SEQUENTIAL)
            engine = runtime.deserialize_cuda_engine(plan)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped.
        raise _refused(path, f"The file cannot be read: {error}.") from error
    if engine is None:
        raise _refused(path, said.because("The library gave no reason."))
    return engine


def _refused(path: Path, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"{path} is not a plan that can be run here.",
        why=why,
        fix="Fetch or build the artifact again with `headrace compile`.",
    )
