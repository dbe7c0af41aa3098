"""What a frontend and the quota authority say to each other: claims and grants.

A lease is an account between one life of a frontend (its epoch) and the authority, for one limit in
one period. Every amount in it is a total since it was opened, and only grows:

    granted    what the authority has let the holder have, slice by slice; debited before it is said
    returned   what the holder has given back of that
    spent      what is gone for good (money that was charged, tokens that were used)

so a message that is lost, late, repeated or overtaken changes nothing: whoever hears a total keeps
the larger one. Only the wish for more is not idempotent; it counts in the newest message alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

LEASE_MS = 30_000
"""How long a slice may be spent after its holder last asked. A frontend that is cut off serves on
within its slice for this long; a dead one's concurrency is free again after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a holder knows and wants of one limit. Money is femto-currency."""

    limit_name: str
    lease_id: str = ""
    """Empty when it has none yet. A lease whose period is over is answered with a new one."""
    returned: int = 0
    spent: int = 0
    need: int = 0
    """Least that helps. What is left is granted down to this, and nothing below it."""
    desired: int = 0
    """What a few seconds of traffic take; at least `need`. 0 asks for nothing."""
    closes: bool = False
    """The lease is drained: all that is not spent goes back, and nothing more will be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One message of a holder."""

    holder: str
    """Names the frontend over all its lives, so that a successor can be told from a stranger."""
    epoch: str
    """Names this life of it."""
    seq: int
    """Grows with each message of the epoch."""
    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The answer to one claim."""

    limit_name: str
    lease_id: str = ""
    """Empty when there is no such limit."""
    granted: int = 0
    expires_in_ms: int = 0
    """From when the ask was sent. Slices are not spent after it; what is held by then may be."""
    left: int = 0
    """What the authority could still grant to anybody; negative when a soft budget is overspent."""
    wait_ms: int | None = None
    """When `need` was not granted: how long until a rate has refilled so far."""
    is_closed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLease:
    """A budget's lease of a frontend that died. Money is femto-currency."""

    lease_id: str
    limit_name: str
    """`subject|model or *|metric|currency`: whose requests its meter log has to be asked for."""
    period: str
    """`2026-11`, `2026-11-27`, or empty: of the requests that were accepted in it."""
    epoch: str
    """The life that spent it: the meter log's epoch."""
    granted: int
    spent: int
    """As far as it was reported."""


class Authority(Protocol):
    """Where leases come from: in this process, or over gRPC."""

    async def lease(self, ask: Ask) -> Sequence[Grant]:
        """A grant for each claim, in any order.

        Raises:
            QuotaUnavailable: the authority does not answer, or cannot write.
        """
        ...
