"""Both devices do the same: the fake one, and CUDA's over a driver of host memory in C."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.serving.testing.fake_device import FakeDevice

HERE = Path(__file__).parent

WANTED = {
    "name": "Fake GPU",
    "capability": "9.0",
    "aligned": [0, 0],
    "taken": 1300,
    "total": 1 << 20,
    "copied": [1, 2, 3],
    "replayed": [7, 0, 9],
    "DoesNotFit": True,
    "EngineFault": True,
    "left": 0,
}


def test_the_fake_device_does_what_a_device_does() -> None:
    spec = importlib.util.spec_from_file_location("device_story", HERE / "device_story.py")
    assert spec is not None
    assert spec.loader is not None
    story = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(story)

    told = story.told(FakeDevice(total_bytes=1 << 20))

    assert json.loads(json.dumps(told)) == WANTED


def test_the_cuda_device_does_what_a_device_does(tmp_path: Path) -> None:
    """Through the real bindings, which find our libcuda.so.1 as they would find NVIDIA's."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed: pip install 'headrace[gpu]'")
    library = tmp_path / "libcuda.so.1"
    command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(
        [*command, "-o", library, HERE / "fake_libcuda.c", "-ldl"], check=True, timeout=60
    )

    done = subprocess.run(
        [sys.executable, HERE / "device_story.py"],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == WANTED
