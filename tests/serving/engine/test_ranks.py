"""What passes between ranks: NCCL's calls, and that both channels keep the order of a stream."""

import json
import os
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np

from headrace.serving.testing.fake_device import FakeDevice
from headrace.serving.testing.fake_ranks import FakeChannel

HERE = Path(__file__).parent

NCCL_STORY = """
import ctypes, json
from headrace.serving.engine.nccl import NcclChannel, NcclCommunicator, new_group_id
from headrace.serving.errors import EngineFault

group = new_group_id()
stage = NcclCommunicator(group, ranks=4, rank=3)
capsule = stage.capsule
held = ctypes.pythonapi.PyCapsule_GetPointer
held.restype, held.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
channel = NcclChannel(NcclCommunicator(group, ranks=3, rank=1), stage=1)
channel.receive(0x7f0000000100, 512, 0x10)
channel.send(0x7f0000000200, 512, 0x10)
channel.close()
stage.close()
stage.close()
try:
    NcclCommunicator(group, ranks=2, rank=2)
except EngineFault as error:
    refused = error.why
library = ctypes.CDLL("libnccl.so.2")
library.said.restype = ctypes.c_char_p
print(json.dumps({
    "held": held(capsule, None) is not None,
    "kind": type(capsule).__name__,
    "refused": refused,
    "said": library.said().decode(),
}))
"""


def test_nccl_is_called_as_its_header_says(tmp_path: Path) -> None:
    """A stand-in in C notes every argument as the C side receives it."""
    library = tmp_path / "libnccl.so.2"
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libnccl.so.2", "-o", library]
    subprocess.run([*command, HERE / "fake_libnccl.c"], check=True, timeout=60)

    done = subprocess.run(
        [sys.executable, "-c", NCCL_STORY],
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "held": True,
        "kind": "PyCapsule",
        "refused": "NCCL says: unhandled system error.",
        "said": "join 3/4 xxx;join 1/3 xxx;"
        "receive 512 x1 at 0x7f0000000100 from 0 on 0x10;"
        "send 512 x1 at 0x7f0000000200 to 2 on 0x10;"
        "leave;leave;join 2/2 xxx;",
    }


def test_a_channel_reads_and_writes_when_the_streams_come_to_it() -> None:
    """What is written to the memory after `send`, on the same stream, is not what was sent."""
    link: deque[bytes] = deque()
    first, second = FakeDevice(), FakeDevice()
    ends = FakeChannel(first, after=link), FakeChannel(second, before=link)
    for device in (first, second):
        device.make_current()
    streams = first.open_stream(), second.open_stream()
    source, target = first.allocate(256), second.allocate(256)
    host = second.allocate_host(256)

    first.zero(source, 256, streams[0])
    ends[0].send(source, 256, streams[0])
    first.put(streams[0], lambda: first.bytes_at(source, 256).fill(9))
    ends[1].receive(target, 256, streams[1])
    second.copy_to_host(host, target, streams[1])
    first.synchronize(streams[0])
    second.synchronize(streams[1])

    assert (host == np.zeros(256, np.uint8)).all()
