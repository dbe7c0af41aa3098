"""How the ranks of one replica reach each other while a step runs.

Inside a stage TensorRT's own collectives use a communicator; between stages only hidden states
pass. Both are made by whoever starts the ranks, handed to their engines, and closed by these.
"""

from typing import Protocol


class Communicator(Protocol):
    """The ranks of one stage. All of them enqueue the same steps in the same order."""

    @property
    def capsule(self) -> object:
        """The `ncclComm_t` as a PyCapsule without a name, as TensorRT takes it."""
        ...

    def close(self) -> None:
        """After every context that was given the capsule is gone. Idempotent."""
        ...


class HiddenChannel(Protocol):
    """A rank's ends to the same rank of the stages before and after its own.

    What one side sends the other receives, in that order; sizes are the same on both. The calls
    return at once: memory is read or written when the stream comes to it.
    """

    def receive(self, address: int, num_bytes: int, stream: int) -> None:
        """Fill memory with what the stage before sends. Never called on the first stage."""
        ...

    def send(self, address: int, num_bytes: int, stream: int) -> None:
        """Give memory to the stage after. Never called on the last stage."""
        ...

    def close(self) -> None:
        """After everything on its streams has run. Idempotent."""
        ...
