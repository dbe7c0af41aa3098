"""The seam between a request and whatever remembers what it used."""

from typing import Protocol

from headrace.serving.domain.record import Opening, Refused, Settlement
from headrace.serving.domain.usage import Usage


class Meter(Protocol):
    """Every request is opened once and settled once, whatever its end; or refused once."""

    async def open(self, opening: Opening) -> None:
        """Record that a request begins; returns once that is durable.

        Raises:
            AlreadyServed: the tenant has used this request_id before.
            MeterUnavailable: the record cannot be written; the request must not run.
        """
        ...

    def checkpoint(self, *, tenant_id: str, request_id: str, usage: Usage) -> None:
        """Note what was delivered so far. Returns at once; the meter writes it in the background.

        A frontend that is killed settles at the last checkpoint when it starts again.
        """
        ...

    async def settle(self, settlement: Settlement) -> None:
        """Close the record; returns once that is durable. The first one wins.

        Raises:
            MeterUnavailable: the record cannot be written; the final message must not be sent.
        """
        ...

    async def refuse(self, refused: Refused) -> None:
        """Record a request that never ran; returns once that is durable. Charges nothing.

        Raises:
            MeterUnavailable: the record cannot be written.
        """
        ...
