"""What a log's record may say: checks on the way from its messages to the ledger's values.

Whoever wrote the log checked it, too. A value that is out of range here was not written by us, or
not by this version; it is refused, and nothing after it is applied.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache

from headrace.serving.domain import units
from headrace.serving.domain.tier import Tier, Verdict
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import AmountOutOfRange, MeterLogDamaged, UnknownUnit
from headrace.serving.metering.ledger.source import Logged
from headrace.v1 import meterlog_pb2 as pb
from headrace.v1 import usage_pb2

INT64_MAX = (1 << 63) - 1
UNIX_MS_MAX = 253_402_300_799_999
"""The last millisecond of the year 9999."""
_DAY_MS = 86_400_000

TIERS: Mapping[int, str] = {
    usage_pb2.TIER_RESERVED: Tier.RESERVED.value,
    usage_pb2.TIER_PRIORITY: Tier.PRIORITY.value,
    usage_pb2.TIER_STANDARD: Tier.STANDARD.value,
    usage_pb2.TIER_FLEX: Tier.FLEX.value,
    usage_pb2.TIER_BATCH: Tier.BATCH.value,
}


def damaged(logged: Logged, why: str) -> MeterLogDamaged:
    return MeterLogDamaged(
        f"Record {logged.seq:,} of log {logged.log_id} cannot be applied: {why}.",
        why="A ledger applies every record of a log in order, or none after the one it cannot.",
        fix="Check the log with `headrace meterlog verify`, and restore it from its copy.",
    )


def text(logged: Logged, value: str, name: str) -> str:
    """A name that any database can hold and any terminal can show."""
    if not value.isprintable():
        raise damaged(logged, f"its {name} has characters that cannot be printed")
    return value


def named(logged: Logged, value: str, name: str) -> str:
    """A text that is not empty."""
    if not value:
        raise damaged(logged, f"it has no {name}")
    return text(logged, value, name)


def whole(logged: Logged, value: int, name: str) -> int:
    """A quantity, an amount or a time: from 0 to the largest of 64 bits.

    Raises:
        AmountOutOfRange: it is negative or too large.
    """
    if not 0 <= value <= INT64_MAX:
        raise AmountOutOfRange(
            f"Record {logged.seq:,} of log {logged.log_id} has {name} {value:,}.",
            why=f"It lies between 0 and {INT64_MAX:,}.",
            fix="Correct it by an adjustment in a sound log; this record is not applied.",
            field=name,
        )
    return value


def moment(logged: Logged, unix_ms: int, name: str) -> int:
    """A time at which a month can be told."""
    if whole(logged, unix_ms, name) > UNIX_MS_MAX:
        raise damaged(logged, f"its {name} lies beyond the year 9999")
    return unix_ms


def month_of(unix_ms: int) -> int:
    """The UTC month, as a number like 202611. 0.1 us for a day that was asked for lately."""
    return _month_of_day(unix_ms // _DAY_MS)


@lru_cache(maxsize=64)
def _month_of_day(day: int) -> int:
    date = datetime.fromtimestamp(day * (_DAY_MS // 1000), UTC)
    return date.year * 100 + date.month


def usage(logged: Logged, message: usage_pb2.Usage) -> Usage:
    for field in ("prompt", "cached", "completion", "reasoning", "cache_write"):
        whole(logged, getattr(message, f"{field}_tokens"), f"{field}_tokens")
    if message.cached_tokens + message.cache_write_tokens > message.prompt_tokens:
        raise damaged(logged, "it reads and writes more of the cache than the prompt has")
    if message.reasoning_tokens > message.completion_tokens:
        raise damaged(logged, "it has more reasoning than completion")
    return Usage(
        prompt_tokens=message.prompt_tokens,
        cached_tokens=message.cached_tokens,
        completion_tokens=message.completion_tokens,
        reasoning_tokens=message.reasoning_tokens,
        cache_write_tokens=message.cache_write_tokens,
    )


def quantities(logged: Logged, tokens: Usage, others: Mapping[str, int]) -> dict[str, int]:
    """By unit, text and other work together; units of zero are left out."""
    counted = dict(tokens.quantities())
    for unit, quantity in others.items():
        if unit in units.TEXT_UNITS:
            raise damaged(logged, f"it counts {unit} twice")
        checked_unit(logged, unit)
        if whole(logged, quantity, unit):
            counted[unit] = quantity
    return counted


def rates(logged: Logged, given: Mapping[str, int]) -> dict[str, int]:
    return {
        checked_unit(logged, unit): whole(logged, rate, f"rate of {unit}")
        for unit, rate in sorted(given.items())
    }


def checked_unit(logged: Logged, unit: str) -> str:
    try:
        return units.check_unit(unit)
    except UnknownUnit as error:
        raise damaged(logged, f"nothing is counted in {unit[:64]!r}") from error


def tier(logged: Logged, name: str) -> str:
    """Unset is standard: what a log says that knows no tiers."""
    if name and name not in _TIER_NAMES:
        raise damaged(logged, f"there is no tier {name[:32]!r}")
    return name or Tier.STANDARD.value


def outcome(logged: Logged, name: str) -> str:
    if name not in _ENDS:
        raise damaged(logged, f"{name[:32]!r} is no way in which a request ends")
    return name


def verdict(logged: Logged, name: str) -> str:
    if name not in _VERDICTS:
        raise damaged(logged, f"{name[:32]!r} is no verdict")
    return name


def same_request(
    logged: Logged, end: pb.Settle | pb.Void | pb.Expire, *, key: tuple[str, str]
) -> None:
    """An end names the tenant and the request that its hold was made for.

    Raises:
        MeterLogDamaged: it names others: nobody ends, or pays for, another tenant's request.
    """
    if (end.tenant_id, end.request_id) != key:
        raise damaged(
            logged,
            f"it ends {end.request_id[:64]!r} of tenant {end.tenant_id[:64]!r}, but its hold is of"
            f" {key[1]!r} of {key[0]!r}",
        )


_TIER_NAMES = frozenset(each.value for each in Tier)
_ENDS = frozenset(each.value for each in Outcome if each is not Outcome.OPEN)
_VERDICTS = frozenset(each.value for each in Verdict)
