"""Ranks of one replica in one process: their communicator, and what passes between stages.

The channel is a device's memory on one side and another's on the other; what is sent is read when
the sender's stream comes to it, and kept until the receiver's does.
"""

from collections import deque

import numpy as np

from headrace.serving.testing.fake_device import FakeDevice


class FakeCommunicator:
    """Implements `Communicator`. Closed under a live context it says so."""

    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.is_closed = False

    @property
    def capsule(self) -> object:
        assert not self.is_closed
        return self

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._device.journal.append("communicator")


class FakeChannel:
    """Implements `HiddenChannel` between two stages; each rank has its own end."""

    def __init__(
        self,
        device: FakeDevice,
        *,
        before: "deque[bytes] | None" = None,
        after: "deque[bytes] | None" = None,
    ) -> None:
        """An end.

        Args:
            device: whose memory it reads and writes.
            before: what the stage before sends; shared with its end.
            after: likewise towards the stage after.
        """
        self._device, self._before, self._after = device, before, after
        self.is_closed = False

    def receive(self, address: int, num_bytes: int, stream: int) -> None:
        assert not self.is_closed
        before = self._before
        assert before is not None, "the first stage receives nothing"

        def arrive() -> None:
            sent = before.popleft()
            assert len(sent) == num_bytes, "the two ends differ in size"
            self._device.bytes_at(address, num_bytes)[:] = np.frombuffer(sent, np.uint8)

        self._device.put(stream, arrive)

    def send(self, address: int, num_bytes: int, stream: int) -> None:
        assert not self.is_closed
        after = self._after
        assert after is not None, "the last stage sends nothing"
        self._device.put(
            stream, lambda: after.append(self._device.bytes_at(address, num_bytes).tobytes())
        )

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._device.journal.append("channel")
