"""The libraries themselves, on a machine without a GPU: refused in time, heard, not flooded."""

import importlib.util
import logging
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from headrace.serving.domain.artifact import TensorRt
from headrace.serving.engine.tensorrt_library import LINES_MAX, library_log, open_library
from headrace.serving.errors import ArtifactTampered, DeviceUnsuitable
from headrace.serving.testing.fake_artifact import fake_manifest, write_fake_artifact
from headrace.serving.testing.fake_device import FakeDevice
from headrace.serving.testing.fake_tensorrt import FakeTensorRt, Severity
from headrace.serving.testing.signing import trust_key

WITHOUT_DRIVER = """
import sys
from pathlib import Path
from headrace.serving.engine.loader import load_engine
from headrace.serving.errors import ServingError
try:
    load_engine(Path(sys.argv[1]), trust=Path(sys.argv[2]))
except ServingError as error:
    print(type(error).__name__, "|", error.what, "|", error.why, "|", error.fix)
    print([name for name in sys.modules if name.startswith("tensorrt")])
"""

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13",
)


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "headrace")


def facts(**changes: str) -> TensorRt:
    found = fake_manifest().tensorrt
    assert found is not None
    return replace(found, **changes)


@needs_rtx
def test_without_a_driver_a_plan_is_refused_before_its_library_is_touched(tmp_path: Path) -> None:
    """A Runtime made without a driver ends the process when it is used; so none is made, and the
    library is not even imported. In a process of its own, which must survive."""
    manifest = fake_manifest()
    installed = facts(library="tensorrt_rtx", version=import_module("tensorrt_rtx").__version__)
    write_fake_artifact(tmp_path, replace(manifest, tensorrt=installed))
    trust = trust_key(tmp_path / "trust")

    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DRIVER, tmp_path, trust],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    refusal, modules = done.stdout.splitlines()
    kind, what, why, fix = refusal.split(" | ")
    assert (kind, what) == ("DeviceUnsuitable", "No NVIDIA GPU answers on this machine.")
    assert why
    assert "headrace[gpu]" in fix
    assert modules == "[]"


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        pytest.param({"library": "os"}, ArtifactTampered, "read with tensorrt or", id="another"),
        pytest.param(
            {"library": "tensorrt_rtx", "version": "1.0"},
            DeviceUnsuitable,
            r"built with tensorrt_rtx 1\.0; [\d.]+ is installed.*pip install tensorrt-rtx-cu13==1",
            id="another version",
            marks=needs_rtx,
        ),
        pytest.param(
            {"library": "tensorrt"},
            DeviceUnsuitable,
            "tensorrt 11.* cannot be imported.*pip install tensorrt-cu13==11",
            id="not installed",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed"
            ),
        ),
    ],
)
def test_a_library_that_did_not_write_the_plan_is_refused(
    changes: dict[str, str], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        open_library(facts(**changes))


@needs_rtx
def test_the_real_librarys_errors_reach_our_log(caplog: pytest.LogCaptureFixture) -> None:
    """Our logger is one that TensorRT accepts; its builder works without a GPU."""
    library = import_module("tensorrt_rtx")
    said = library_log(library)
    builder = library.Builder(said)
    network = builder.create_network(0)

    assert builder.build_serialized_network(network, builder.create_builder_config()) is None

    lines = [each for each in caplog.records if each.message == "library_said"]
    assert any(each.levelno == logging.ERROR for each in lines)
    assert "Error Code" in said.because("nothing")
    assert said.because("It gave no reason.") == "It gave no reason."


def test_a_library_that_warns_for_ever_is_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    said = library_log(FakeTensorRt(FakeDevice()))

    for number in range(LINES_MAX * 3):
        said.add(Severity.WARNING, f"warning {number}")
        said.add(Severity.VERBOSE, "chatter")
    said.add(Severity.ERROR, "Error Code 7: too late.")

    assert len(caplog.records) == LINES_MAX + 1
    assert said.because("") == "Error Code 7: too late."
