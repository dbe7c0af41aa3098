"""Corrections and credits that people write: what may be written, and each id once.

A repetition is told from a clash by the ledger that has caught up with this log, so that within one
frontend the answer is certain. Where two frontends are given one id at the same moment, each writes
its record; a ledger applies the first that reaches it.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from headrace.serving.clock import Clock
from headrace.serving.domain.record import Adjustment, Grant
from headrace.serving.domain.usage import CHARGE_FEMTO_MAX, FEMTO_PER_NANO
from headrace.serving.errors import AmountOutOfRange, CorrectionExists, InvalidRequest, Overloaded
from headrace.serving.metering.ledger.booked import Booked

ID_CHARS_MAX = 200
"""The id of an SLA credit has a model's name in it, of at most 128."""
REASON_CHARS_MAX = 200
"""A line of a statement."""
CALLS_MAX = 64
"""That wait for their turn; each takes a lookup and a flush, some milliseconds."""
EXPIRES_UNIX_MS_MAX = 1 << 53


class Meter(Protocol):
    """The part of the meter log that this needs; see `MeterLog`."""

    @property
    def log_id(self) -> str: ...
    async def adjust(self, adjustment: Adjustment) -> int: ...
    async def grant(self, granted: Grant) -> int: ...


class Corrections:
    """Writes what people correct and give, to one meter log. Belongs to one event loop."""

    def __init__(
        self,
        meter: Meter,
        *,
        find: Callable[[Adjustment | Grant], Booked | None],
        currency: Callable[[], str],
        clock: Clock,
    ) -> None:
        """Prepare.

        Args:
            meter: the log.
            find: what is durable under the id of this one. Blocks; called in a thread.
            currency: of the price book in force.
            clock: says what has expired.
        """
        self._meter, self._find, self._currency = meter, find, currency
        self._clock = clock
        self._turn = asyncio.Lock()
        self._num_calls = 0

    async def write(self, correction: Adjustment | Grant) -> Booked:
        """Make it durable, once for each id of its tenant; answers where its record is.

        The same again, by whomever, answers the record that is there. A caller that is cancelled
        does not know whether it was written, and asks again with the same id.

        Raises:
            InvalidRequest: a text is empty, too long or not printable, the amount is zero, or
                negative where money is given, the currency is another one, or it has expired.
            AmountOutOfRange: the amount passes the log's 64 bits.
            CorrectionExists: the id is taken by something else.
            Overloaded: too many wait.
            MeterUnavailable, LedgerUnavailable: it cannot be written, or not be looked up.
        """
        self._check(correction)
        if self._num_calls >= CALLS_MAX:
            raise Overloaded(
                f"{self._num_calls} corrections are waiting to be written.",
                why="They are written one after the other, so that each id is written once.",
                fix="Retry after the time given, with jitter.",
                retry_after_ms=1_000,
            )
        self._num_calls += 1
        try:
            async with self._turn:
                return await self._write_once(correction)
        finally:
            self._num_calls -= 1

    async def _write_once(self, correction: Adjustment | Grant) -> Booked:
        known = await asyncio.to_thread(self._find, correction)
        if known is not None:
            if replace(known.correction, actor=correction.actor) != correction:
                raise _taken(correction, known)
            return known
        if isinstance(correction, Adjustment):
            seq = await self._meter.adjust(correction)
        else:
            seq = await self._meter.grant(correction)
        return Booked(correction=correction, log_id=self._meter.log_id, seq=seq)

    def _check(self, correction: Adjustment | Grant) -> None:
        if isinstance(correction, Adjustment):
            _check_text("adjustment_id", correction.adjustment_id, ID_CHARS_MAX)
            _check_text("request_id", correction.request_id or "-", ID_CHARS_MAX)
        else:
            _check_text("grant_id", correction.grant_id, ID_CHARS_MAX)
            self._check_expiry(correction.expires_unix_ms)
        _check_text("reason", correction.reason, REASON_CHARS_MAX)
        _check_amount(correction)
        if correction.currency != (expected := self._currency()):
            raise InvalidRequest(
                f"The currency is {correction.currency[:16]!r}, and the price book's {expected}.",
                why="What is owed is kept in the currency of the price book in force.",
                fix=f"Give the amount in {expected}.",
                field="currency",
            )

    def _check_expiry(self, expires_unix_ms: int) -> None:
        now = self._clock.unix_ms()
        if expires_unix_ms and not now < expires_unix_ms < EXPIRES_UNIX_MS_MAX:
            raise InvalidRequest(
                f"expires_unix_ms is {expires_unix_ms}, and it is {now} now.",
                why="Credit expires later than it is given, in milliseconds since 1970.",
                fix="Give a later time, or 0 for never.",
                field="expires_unix_ms",
            )


def _check_amount(correction: Adjustment | Grant) -> None:
    femto = correction.amount_femto
    if femto == 0 or (femto < 0 and isinstance(correction, Grant)):
        raise InvalidRequest(
            f"The amount is {femto // FEMTO_PER_NANO:,} nano.",
            why="A correction changes what is owed, and what is given is more than nothing.",
            fix="Give an amount above zero; take credit back with an adjustment.",
            field="amount_nano",
        )
    if abs(femto) > CHARGE_FEMTO_MAX:
        most = CHARGE_FEMTO_MAX // FEMTO_PER_NANO
        raise AmountOutOfRange(
            f"The amount is {femto // FEMTO_PER_NANO:,} nano.",
            why=f"A record holds 64 bits of femto-currency: {most:,} nano.",
            fix="Write it as several, each with an id of its own.",
            field="amount_nano",
        )


def _check_text(name: str, text: str, chars_max: int) -> None:
    if not (0 < len(text) <= chars_max and text.isprintable()):
        raise InvalidRequest(
            f"{name} has {len(text)} characters, or one that cannot be printed.",
            why=f"It has 1 to {chars_max} characters on one line.",
            fix="Correct it.",
            field=name,
        )


def _taken(correction: Adjustment | Grant, known: Booked) -> CorrectionExists:
    is_adjustment = isinstance(correction, Adjustment)
    name = correction.adjustment_id if is_adjustment else correction.grant_id
    return CorrectionExists(
        f"{name!r} of {correction.tenant_id!r} is record {known.seq:,} of log {known.log_id}, and"
        " says something else.",
        why="An id is applied once, and what was written is never changed.",
        fix="Correct it by another one with an id of its own.",
        field="adjustment_id" if is_adjustment else "grant_id",
    )
