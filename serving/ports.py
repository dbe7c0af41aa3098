"""What the pipeline needs of the outside, beside the meter: replicas, and a way to choose one."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from headrace.serving.domain.generate import Generate
from headrace.serving.domain.request import SequenceSpec
from headrace.serving.inbox import Inbox


class Replica(Protocol):
    """A place where sequences run; deltas come to an inbox."""

    @property
    def replica_id(self) -> str: ...
    @property
    def version(self) -> str: ...

    def submit(self, spec: SequenceSpec, *, inbox: Inbox, index: int) -> int:
        """Start a sequence at once; its deltas go to `inbox` as answer `index`. Never waits.

        If the replica is gone already, the inbox hears so. Returns what `abort` takes.
        """
        ...

    def abort(self, sequence: int) -> None:
        """Stop it and deliver nothing more. Harmless for one that ended."""
        ...


@dataclass(frozen=True, slots=True)
class Placement:
    replica: Replica
    why: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A request that its tier has taken in."""

    request: Generate
    """As it is served: a tier that was full may have passed it on to another."""
    leave: Callable[[], None]
    """Gives back what is held for it; called once, when the request is over."""


class Tiers(Protocol):
    """The capacity that tiers hold for their tenants."""

    def enter(self, request: Generate) -> Entry:
        """Take what the request's tier holds for its tenant.

        Raises:
            TierUnavailable: it is taken, and the overflow is refused.
        """
        ...


class Fleet(Protocol):
    """The replicas this frontend can reach."""

    async def place(self, request: Generate, *, without: Collection[str] = ()) -> Placement:
        """Choose a replica, waiting a bounded while for one.

        Raises:
            ModelNotFound: no replica of this model is known.
            Overloaded: none can take the request in time, or none could keep what flex or batch
                promise; `retry_after_ms` says when that may have changed.
            DeadlineExceeded: the request's deadline comes first.
        """
        ...
