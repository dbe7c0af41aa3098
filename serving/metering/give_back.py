"""Gives back what a request was charged whose result nobody has.

Two callers need it: a key's attempt that a later, whole one replaced, and a batch line whose result
was lost with its process. A correction never changes what was written: it is an adjustment of its
own, and its id follows from the request's, so that asking twice gives back once.
"""

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Protocol

from headrace.serving import log
from headrace.serving.domain.record import Adjustment, UsageRecord
from headrace.serving.domain.usage import Outcome, nano_of

ACTOR = "headrace"
"""Who makes these corrections: a rule, not a person."""


Adjust = Callable[[Adjustment], Awaitable[None]]
"""Makes a correction durable, once for each id.

Raises:
    MeterUnavailable: it cannot be written; ask again.
"""

FindRecord = Callable[[str, str], UsageRecord | None]
"""Tenant and request id to the usage record; None only when it is certain that there is none.

Blocks. Raises:
    MeterUnavailable, LedgerUnavailable: the records cannot be read.
"""


class GivenBack(Enum):
    DONE = "done"
    """Nothing is charged for the request any more."""
    NEVER_RAN = "never ran"
    """Nothing ever was: it has no record, or the id is another request's."""
    LATER = "later"
    """It is not settled yet; ask again."""


class GiveBack(Protocol):
    async def __call__(
        self, *, tenant_id: str, request_id: str, reason: str, opened_under: bytes = b""
    ) -> GivenBack:
        """Reverse whatever the request was charged; the same request is given back once.

        `opened_under` is the digest of its idempotency key: a caller chooses its request ids, so
        an attempt's may be that of another, paid request.

        Raises:
            MeterUnavailable: it can be neither read nor written; ask again.
        """
        ...


class ChargeReversal:
    """Implements GiveBack over usage records and whatever writes adjustments."""

    def __init__(self, find: FindRecord, adjust: Adjust) -> None:
        self._find = find
        self._adjust = adjust

    async def __call__(
        self, *, tenant_id: str, request_id: str, reason: str, opened_under: bytes = b""
    ) -> GivenBack:
        record = await asyncio.to_thread(self._find, tenant_id, request_id)
        if record is None or record.idempotency_digest != opened_under:
            return GivenBack.NEVER_RAN
        if record.outcome is Outcome.OPEN:
            return GivenBack.LATER
        amount_femto = record.charge_femto
        if amount_femto:
            await self._adjust(
                Adjustment(
                    adjustment_id=f"give-back/{request_id}",
                    tenant_id=tenant_id,
                    project_id=record.project_id,
                    request_id=request_id,
                    amount_femto=-amount_femto,
                    currency=record.currency,
                    reason=reason,
                    actor=ACTOR,
                )
            )
            log.given_back(
                tenant_id=tenant_id,
                request_id=request_id,
                amount_nano=nano_of(amount_femto),
                why=reason,
            )
        return GivenBack.DONE
