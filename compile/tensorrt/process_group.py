"""Ranks that exchange tensors on one machine's CPU, in place of GPUs and NCCL.

One process a rank; torch's Gloo over loopback carries the tensors, and a file is where they find
each other. Every wait has a limit. Each rank notes in a shared file whether it computes or waits,
so that when one does not come, the others can say which.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from headrace.serving.errors import EngineFault

COLLECTIVE_TIMEOUT_S = 120.0
"""How long a rank waits for the others: they read their weights between two meetings."""

_COMPUTING, _WAITING, _DONE = 0, 1, 2


class PeerLost(EngineFault):
    """Another rank did not come; what happened to that one is the better error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What a rank must know to find the others."""

    rank: int
    ranks: int
    folder: Path
    """Of this run alone; the same for every rank."""
    timeout_s: float


def prepare(folder: Path, ranks: int) -> None:
    """Make what the ranks of a run share; before the first starts."""
    (folder / "states").write_bytes(bytes(ranks))


class Peers:
    """One rank among the others. A process has one at a time, and one thread uses it."""

    def __init__(self, meeting: Meeting) -> None:
        """Meet the others.

        Raises:
            PeerLost: they did not all come.
        """
        self.rank, self.ranks = meeting.rank, meeting.ranks
        self._timeout_s = meeting.timeout_s
        self._states = np.memmap(meeting.folder / "states", np.uint8, mode="r+")
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        # The machine's name may have no address; all ranks are here.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        with self._waiting():
            dist.init_process_group(
                "gloo",
                init_method=(meeting.folder / "store").as_uri(),
                rank=meeting.rank,
                world_size=meeting.ranks,
                timeout=timedelta(seconds=meeting.timeout_s),
            )

    def communicator(self, members: Sequence[int]) -> "Communicator":
        """The communicator of these ranks, in which each is numbered by its place among them."""
        return Communicator(self, members)

    def all_gather(self, tensor: torch.Tensor, members: tuple[int, ...]) -> list[torch.Tensor]:
        """The tensor of each member, in their order.

        Raises:
            PeerLost: one of them did not come.
        """
        # As bytes: Gloo does not know every type, and only carries these.
        sent = tensor.contiguous().reshape(-1).view(torch.uint8)
        received = [torch.empty_like(sent) for _ in members]
        with self._waiting():
            dist.all_gather(received, sent, group=self._group(members))
        return [each.view(tensor.dtype).reshape(tensor.shape) for each in received]

    def send(self, tensor: torch.Tensor, *, to: int) -> None:
        """Hand a tensor to one rank, which receives it.

        Raises:
            PeerLost: it did not come.
        """
        with self._waiting():
            dist.send(tensor.contiguous().reshape(-1).view(torch.uint8), to)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, *, source: int) -> torch.Tensor:
        """Take the tensor that `source` sends, of this shape and type.

        Raises:
            PeerLost: it did not come.
        """
        received = torch.empty(tuple(shape), dtype=dtype)
        with self._waiting():
            dist.recv(received.reshape(-1).view(torch.uint8), source)
        return received

    def close(self) -> None:
        """Part from the others, who are not waited for."""
        self._states[self.rank] = _DONE
        dist.destroy_process_group()

    def _group(self, members: tuple[int, ...]) -> dist.ProcessGroup:
        if members not in self._groups:
            # Only the members meet to make it; ranks of other stages know nothing of it.
            group = dist.new_group(
                list(members),
                timeout=timedelta(seconds=self._timeout_s),
                use_local_synchronization=True,
            )
            assert isinstance(group, dist.ProcessGroup)
            self._groups[members] = group
        return self._groups[members]

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._states[self.rank] = _WAITING
        try:
            yield
        except RuntimeError as error:  # Gloo's only kind; its text names sockets.
            elsewhere = np.flatnonzero(self._states != _WAITING).tolist()
            raise PeerLost(
                f"Rank {self.rank} waited in vain for the others.",
                why=f"Ranks that were not there: {elsewhere}; the limit is {self._timeout_s:g} s."
                if elsewhere
                else f"All {self.ranks} wait, each for another: their networks differ.",
                fix="Look for what stopped or slowed those ranks, then run it again.",
            ) from error
        self._states[self.rank] = _COMPUTING


class Communicator:
    """A stage's ranks, numbered from 0: what the collective layers of its networks speak of."""

    def __init__(self, peers: Peers, members: Sequence[int]) -> None:
        self._peers, self._members = peers, tuple(members)

    @property
    def rank(self) -> int:
        return self._members.index(self._peers.rank)

    def all_gather(self, tensor: torch.Tensor, group: Sequence[int]) -> Sequence[torch.Tensor]:
        return self._peers.all_gather(tensor, tuple(self._members[each] for each in group))
