"""Domain values into the payloads of records, checked before anything is written; and back.

Messages are filled field by field: it takes half the time of keyword arguments. A price is frozen
into thousands of requests, so its message is made once.
"""

from collections.abc import Mapping
from functools import lru_cache

from headrace.serving.domain.record import Adjustment, Grant, Opening, Refused, Settlement
from headrace.serving.domain.tier import Receipt, Tier
from headrace.serving.domain.units import QUANTITY_MAX
from headrace.serving.domain.usage import CHARGE_FEMTO_MAX, Outcome, Price, Usage
from headrace.serving.errors import AmountOutOfRange, InvalidRequest
from headrace.serving.metering.meterlog.format import RECORD_BYTES_MAX
from headrace.v1 import meterlog_pb2, usage_pb2

PRICES_MAX = 256
"""Frozen prices kept: books times models times tiers that are in use at once."""
_TIERS: Mapping[Tier, usage_pb2.Tier] = {
    Tier.RESERVED: usage_pb2.TIER_RESERVED,
    Tier.PRIORITY: usage_pb2.TIER_PRIORITY,
    Tier.STANDARD: usage_pb2.TIER_STANDARD,
    Tier.FLEX: usage_pb2.TIER_FLEX,
    Tier.BATCH: usage_pb2.TIER_BATCH,
}


def epoch(name: str, *, version: str, unix_ms: int) -> bytes:
    """A frontend begins to write."""
    _check_texts(epoch=name, version=version)
    event = meterlog_pb2.MeterEvent(unix_ms=unix_ms)
    event.epoch.epoch = name
    event.epoch.version = version
    return _sound(event)


def reserve(opening: Opening, *, unix_ms: int) -> bytes:
    """A request was accepted. 4 us.

    Raises:
        AmountOutOfRange: an amount is negative or passes 64 bits.
        InvalidRequest: a text is not printable, or all of it is too long for a record.
    """
    _check_texts(
        tenant_id=opening.tenant_id,
        project_id=opening.project_id,
        key_id=opening.key_id,
        request_id=opening.request_id,
        model=opening.model,
        version=opening.version,
    )
    _check_amounts(hold_femto=opening.hold_femto, accepted_unix_ms=opening.accepted_unix_ms)
    event = meterlog_pb2.MeterEvent(unix_ms=unix_ms)
    message = event.reserve
    message.tenant_id = opening.tenant_id
    message.project_id = opening.project_id
    message.key_id = opening.key_id
    message.request_id = opening.request_id
    message.model = opening.model
    message.version = opening.version
    message.tier = opening.tier.value
    price = opening.price
    message.price.CopyFrom(_frozen(price.currency, price.version, tuple(price.rates.items())))
    message.accepted_unix_ms = opening.accepted_unix_ms
    message.hold_femto = opening.hold_femto
    message.idempotency_digest = opening.idempotency_digest
    return _sound(event)


def settle(settlement: Settlement, *, hold: int, unix_ms: int) -> bytes:
    """A request ended: a Void if nothing was used and nothing is charged, else a Settle. 4 us.

    Raises: as `reserve`.
    """
    usage = settlement.usage
    assert settlement.outcome is not Outcome.OPEN
    _check_texts(version=settlement.version)
    _check_amounts(
        charge_femto=settlement.charge_femto,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        first_token_unix_ms=settlement.first_token_unix_ms or 0,
        settled_unix_ms=settlement.settled_unix_ms,
        replicas_tried=settlement.replicas_tried,
    )
    event = meterlog_pb2.MeterEvent(unix_ms=unix_ms)
    used = usage.prompt_tokens or usage.completion_tokens or settlement.charge_femto
    message = event.settle if used else event.void
    message.reserve = hold
    message.tenant_id = settlement.tenant_id
    message.request_id = settlement.request_id
    message.outcome = settlement.outcome.value
    message.settled_unix_ms = settlement.settled_unix_ms
    message.replicas_tried = settlement.replicas_tried
    if settlement.receipt is not None:
        _fill_receipt(message.receipt, settlement.receipt)
    if isinstance(message, meterlog_pb2.Settle):
        fill_usage(message.usage, usage)
        message.charge_femto = settlement.charge_femto
        message.version = settlement.version
        message.first_token_unix_ms = settlement.first_token_unix_ms or 0
    return _sound(event)


def checkpoint(usage: Usage, *, hold: int, unix_ms: int) -> bytes:
    """What was delivered so far. 1 us; `usage` was checked by `check_usage`."""
    event = meterlog_pb2.MeterEvent(unix_ms=unix_ms)
    event.checkpoint.reserve = hold
    fill_usage(event.checkpoint.usage, usage)
    return event.SerializeToString()


def expire(reserved: meterlog_pb2.Reserve, *, hold: int, unix_ms: int) -> bytes:
    """The frontend of a hold died before anything was delivered."""
    event = meterlog_pb2.MeterEvent(unix_ms=unix_ms)
    event.expire.reserve = hold
    event.expire.tenant_id = reserved.tenant_id
    event.expire.request_id = reserved.request_id
    event.expire.settled_unix_ms = unix_ms
    return event.SerializeToString()


def refuse(refused: Refused, *, unix_ms: int) -> bytes:
    """A request was refused before it was accepted.

    Raises: as `reserve`.
    """
    _check_texts(
        tenant_id=refused.tenant_id,
        project_id=refused.project_id,
        key_id=refused.key_id,
        request_id=refused.request_id,
        model=refused.model,
        currency=refused.price.currency,
        price_version=refused.price.version,
    )
    event = meterlog_pb2.MeterEvent(unix_ms=unix_ms)
    message = event.refuse
    message.tenant_id = refused.tenant_id
    message.project_id = refused.project_id
    message.key_id = refused.key_id
    message.request_id = refused.request_id
    message.model = refused.model
    message.tier = refused.tier.value
    message.outcome = refused.outcome.value
    message.currency = refused.price.currency
    message.price_version = refused.price.version
    if refused.receipt is not None:
        _fill_receipt(message.receipt, refused.receipt)
    return _sound(event)


def adjust(adjustment: Adjustment, *, unix_ms: int) -> bytes:
    """A correction; its amount may be negative.

    Raises: as `reserve`.
    """
    texts = {
        "adjustment_id": adjustment.adjustment_id,
        "tenant_id": adjustment.tenant_id,
        "project_id": adjustment.project_id,
        "request_id": adjustment.request_id,
        "currency": adjustment.currency,
        "reason": adjustment.reason,
        "actor": adjustment.actor,
    }
    _check_texts(**texts)
    _check_amounts(amount_femto=abs(adjustment.amount_femto))
    message = meterlog_pb2.Adjust(amount_femto=adjustment.amount_femto, **texts)
    return _sound(meterlog_pb2.MeterEvent(unix_ms=unix_ms, adjust=message))


def grant(granted: Grant, *, unix_ms: int) -> bytes:
    """Credit, or a slice of a budget.

    Raises: as `reserve`.
    """
    texts = {
        "grant_id": granted.grant_id,
        "tenant_id": granted.tenant_id,
        "project_id": granted.project_id,
        "budget_id": granted.budget_id,
        "currency": granted.currency,
        "reason": granted.reason,
        "actor": granted.actor,
    }
    _check_texts(**texts)
    _check_amounts(amount_femto=granted.amount_femto, expires_unix_ms=granted.expires_unix_ms)
    message = meterlog_pb2.Grant(
        amount_femto=granted.amount_femto, expires_unix_ms=granted.expires_unix_ms, **texts
    )
    return _sound(meterlog_pb2.MeterEvent(unix_ms=unix_ms, grant=message))


def check_usage(usage: Usage) -> None:
    """Whether a checkpoint can hold it.

    Raises:
        AmountOutOfRange: it passes 64 bits.
    """
    if usage.prompt_tokens > QUANTITY_MAX or usage.completion_tokens > QUANTITY_MAX:
        _check_amounts(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)


def usage_of(message: usage_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
        reasoning_tokens=message.reasoning_tokens,
        cache_write_tokens=message.cache_write_tokens,
    )


def price_of(message: meterlog_pb2.FrozenPrice) -> Price:
    return Price(
        currency=message.currency, version=message.version, rates=dict(message.rates.items())
    )


def fill_usage(message: usage_pb2.Usage, usage: Usage) -> None:
    message.prompt_tokens = usage.prompt_tokens
    message.completion_tokens = usage.completion_tokens
    # Most often zero, which need not be said.
    if usage.cached_tokens:
        message.cached_tokens = usage.cached_tokens
    if usage.reasoning_tokens:
        message.reasoning_tokens = usage.reasoning_tokens
    if usage.cache_write_tokens:
        message.cache_write_tokens = usage.cache_write_tokens


def _fill_receipt(message: usage_pb2.Receipt, receipt: Receipt) -> None:
    message.tier_asked = _TIERS[receipt.tier_asked]
    message.tier_served = _TIERS[receipt.tier_served]
    message.ttft_us = receipt.ttft_us or 0
    message.itl_p50_us = receipt.itl_p50_us or 0
    message.itl_p99_us = receipt.itl_p99_us or 0
    message.verdict = receipt.verdict.value
    message.missed.extend(receipt.missed)


@lru_cache(PRICES_MAX)
def _frozen(
    currency: str, version: str, rates: tuple[tuple[str, int], ...]
) -> meterlog_pb2.FrozenPrice:
    units = {f"rate of {unit}": rate for unit, rate in rates}
    _check_texts(currency=currency, price_version=version, units=" ".join(units))
    _check_amounts(**units)
    return meterlog_pb2.FrozenPrice(currency=currency, version=version, rates=dict(rates))


def _sound(event: meterlog_pb2.MeterEvent) -> bytes:
    payload = event.SerializeToString()
    if len(payload) > RECORD_BYTES_MAX:
        raise InvalidRequest(
            f"The {event.WhichOneof('kind')} record takes {len(payload):,} bytes.",
            why=f"A record of the meter log takes at most {RECORD_BYTES_MAX:,}.",
            fix="Use shorter ids and names.",
        )
    return payload


def _check_texts(**texts: str) -> None:
    if "".join(texts.values()).isprintable():
        return
    name = next(name for name, text in texts.items() if not text.isprintable())
    raise InvalidRequest(
        f"The {name} {texts[name][:64]!r} has characters that cannot be printed.",
        why="Records are read by people and by other programs.",
        fix="Use letters, digits and punctuation.",
        field=name,
    )


def _check_amounts(**amounts: int) -> None:
    for name, amount in amounts.items():
        if not 0 <= amount <= CHARGE_FEMTO_MAX:
            raise AmountOutOfRange(
                f"The {name} of {amount:,} cannot be recorded.",
                why=f"Amounts are whole numbers from 0 to {CHARGE_FEMTO_MAX:,}.",
                fix="Check the arithmetic of the caller.",
                field=name,
            )
