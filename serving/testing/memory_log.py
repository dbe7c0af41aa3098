"""A meter log in memory: what frontends write, for whoever reads logs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.metering import outcomes
from headrace.v1 import meterlog_pb2 as pb
from headrace.v1 import usage_pb2

PRICE = Price.text(
    version="book-7",
    prompt_nano_per_mtok=1_000_000_000,
    cached_nano_per_mtok=100_000_000,
    completion_nano_per_mtok=2_000_000_000,
)
"""1, 0.1 and 2 dollars for a million tokens: 1000, 100 and 2000 nano for each."""
USED = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=5)
"""16,400 nano at PRICE: 6 * 1000 + 4 * 100 + 5 * 2000."""
NOVEMBER = 1_793_491_200_000
"""2026-11-01T00:00:00Z."""


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    log_id: str
    seq: int
    event: pb.MeterEvent


class MemoryLog:
    """Implements `Source`. Every verb writes one record, a second after the last."""

    def __init__(self, log_id: str = "log-1", *, unix_ms: int = NOVEMBER) -> None:
        self.log_id = log_id
        self.unix_ms = unix_ms
        self.records: list[MemoryRecord] = []
        self.reserved: dict[int, pb.Reserve] = {}

    def after(self, seq: int, limit: int) -> Sequence[MemoryRecord]:
        return self.records[seq : seq + limit]

    @property
    def last_seq(self) -> int:
        return len(self.records)

    def append(self, **kind: object) -> int:
        """Write one record of any kind, sound or not."""
        self.unix_ms += 1000
        event = pb.MeterEvent(unix_ms=self.unix_ms, **kind)  # pyright: ignore[reportArgumentType]
        self.records.append(MemoryRecord(self.log_id, len(self.records) + 1, event))
        return len(self.records)

    def reserves(
        self,
        request_id: str,
        *,
        tenant_id: str = "acme",
        project_id: str = "search",
        model: str = "m",
        tier: str = "standard",
        price: Price = PRICE,
    ) -> int:
        reserve = pb.Reserve(
            tenant_id=tenant_id,
            project_id=project_id,
            key_id="k1",
            request_id=request_id,
            model=model,
            version="v1",
            tier=tier,
            price=pb.FrozenPrice(
                currency=price.currency, version=price.version, rates=dict(price.rates)
            ),
            accepted_unix_ms=self.unix_ms,
            hold_femto=10**12,
        )
        hold = self.append(reserve=reserve)
        self.reserved[hold] = reserve
        return hold

    def delivers(self, hold: int, usage: Usage = USED) -> int:
        return self.append(checkpoint=pb.Checkpoint(reserve=hold, usage=_wire(usage)))

    def settles(
        self,
        hold: int,
        usage: Usage = USED,
        *,
        outcome: Outcome = Outcome.OK,
        charge_femto: int | None = None,
        quantities: Mapping[str, int] | None = None,
        receipt: usage_pb2.Receipt | None = None,
    ) -> int:
        """Charged by the frozen rates and the outcome table, unless told otherwise."""
        reserve = self.reserved[hold]
        rates = dict(reserve.price.rates)
        price = Price(currency=reserve.price.currency, version="", rates=rates)
        if charge_femto is None:
            charge_femto = outcomes.charge_femto(price, usage, outcome) + sum(
                quantity * rates[unit] for unit, quantity in (quantities or {}).items()
            )
        return self.append(
            settle=pb.Settle(
                reserve=hold,
                tenant_id=reserve.tenant_id,
                request_id=reserve.request_id,
                usage=_wire(usage),
                outcome=outcome.value,
                charge_femto=charge_femto,
                version="v2",
                first_token_unix_ms=self.unix_ms,
                settled_unix_ms=self.unix_ms,
                replicas_tried=1,
                receipt=receipt,
                quantities=quantities,
            )
        )

    def serves(self, request_id: str, usage: Usage = USED, **reserve: str) -> int:
        """A whole request; answers its hold."""
        hold = self.reserves(request_id, **reserve)  # pyright: ignore[reportArgumentType]
        self.settles(hold, usage)
        return hold

    def voids(self, hold: int, outcome: Outcome = Outcome.CANCELLED) -> int:
        reserve = self.reserved[hold]
        return self.append(
            void=pb.Void(
                reserve=hold,
                tenant_id=reserve.tenant_id,
                request_id=reserve.request_id,
                outcome=outcome.value,
                settled_unix_ms=self.unix_ms,
            )
        )

    def expires(self, hold: int) -> int:
        reserve = self.reserved[hold]
        return self.append(
            expire=pb.Expire(
                reserve=hold,
                tenant_id=reserve.tenant_id,
                request_id=reserve.request_id,
                settled_unix_ms=self.unix_ms,
            )
        )

    def refuses(self, request_id: str, *, tenant_id: str = "acme") -> int:
        return self.append(
            refuse=pb.Refuse(
                tenant_id=tenant_id,
                project_id="search",
                key_id="k1",
                request_id=request_id,
                model="m",
                tier="standard",
                outcome=Outcome.REJECTED.value,
                currency="USD",
                price_version="book-7",
            )
        )

    def adjusts(self, adjustment_id: str, femto: int, *, tenant_id: str = "acme") -> int:
        return self.append(
            adjust=pb.Adjust(
                adjustment_id=adjustment_id,
                tenant_id=tenant_id,
                project_id="search",
                amount_femto=femto,
                currency="USD",
                reason="a correction",
                actor="olga",
            )
        )

    def grants(
        self,
        grant_id: str,
        femto: int,
        *,
        tenant_id: str = "acme",
        budget_id: str = "",
        project_id: str = "",
        reason: str = "",
    ) -> int:
        return self.append(
            grant=pb.Grant(
                grant_id=grant_id,
                tenant_id=tenant_id,
                budget_id=budget_id,
                project_id=project_id,
                reason=reason,
                amount_femto=femto,
                currency="USD",
                expires_unix_ms=self.unix_ms + 86_400_000,
                actor="olga",
            )
        )


def _wire(usage: Usage) -> usage_pb2.Usage:
    return usage_pb2.Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        cache_write_tokens=usage.cache_write_tokens,
    )
