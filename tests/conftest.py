"""What tests of the whole share: the demo model, compiled once for each machine."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from headrace.compile.store import Store
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import ArtifactTampered, ModelNotFound

DEMO_MODEL = "smollm2-135m"
TEST_HOME = Path(__file__).parent.parent / "build" / "test-home"


FIRST = ("stories/test_greedy_reference.py", "stories/test_serve.py")
"""Files of minutes. Begun last, one of them would run alone while the other core idles."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order within a file stays."""
    order = {name: index for index, name in enumerate(FIRST)}
    here = Path(__file__).parent
    items.sort(key=lambda item: order.get(item.path.relative_to(here).as_posix(), len(order)))


@pytest.fixture(scope="session")
def artifact_of() -> Callable[[Precision], Path]:
    """The demo model's artifact in a precision: pulled and compiled as a user would, once.

    It stays in HEADRACE_TEST_HOME (build/test-home) for later runs. Workers share it.
    """
    home = _test_home()

    def build(precision: Precision) -> Path:
        with _locked(home / "build.lock"):
            try:
                return Store(home).resolve(DEMO_MODEL, precision)
            except (ModelNotFound, ArtifactTampered):  # Or built before what is built now.
                _run(home, "models", "pull", DEMO_MODEL)
                _run(home, "compile", DEMO_MODEL, "--precision", precision)
        return Store(home).resolve(DEMO_MODEL, precision)

    return build


@pytest.fixture(scope="session")
def compiled_home(artifact_of: Callable[[Precision], Path]) -> Path:
    """A home whose store has the demo model in int8 and int4. Not for writing: link to it."""
    for precision in (Precision.INT8, Precision.INT4):
        artifact_of(precision)
    return _test_home()


def _test_home() -> Path:
    home = Path(os.environ.get("HEADRACE_TEST_HOME") or TEST_HOME)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return home


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(home: Path, *words: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "headrace.deploy.cli", *words],
        env={**os.environ, "HEADRACE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        pytest.fail(f"headrace {' '.join(words)} ended with {ran.returncode}: {ran.stderr}")
