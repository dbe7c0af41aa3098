"""What a batch of log records does to the ledger: worked out in memory, written in one go.

Pure: takes records and the requests they go on with, gives rows. Whatever a batch does to one
request becomes one row, so that a stream's forty checkpoints cost what one does.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import AmountOutOfRange, UnknownUnit
from headrace.serving.metering import outcomes
from headrace.serving.metering.ledger import record_fields as check
from headrace.serving.metering.ledger import schema
from headrace.serving.metering.ledger.database import Value
from headrace.serving.metering.ledger.source import Logged
from headrace.v1 import meterlog_pb2 as pb
from headrace.v1 import usage_pb2

UNIT_FEMTO = 10**15
"""Femto of one unit of currency."""

BalanceKey = tuple[str, str, str, int]
"""Tenant, project, currency and month."""


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """A row of `request`, as far as the log has told. Field for field the columns."""

    log_no: int
    seq: int
    tenant_id: str
    project_id: str
    key_id: str
    request_id: str
    model: str
    tier: str
    price_id: str
    hold_femto: int
    accepted_unix_ms: int
    idempotency_digest: str
    """Hexadecimal."""
    version: str
    outcome: str = Outcome.OPEN.value
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    charge_femto: int = 0
    waived_femto: int = 0
    first_token_unix_ms: int | None = None
    settled_unix_ms: int | None = None
    settled_seq: int | None = None
    month: int | None = None
    replicas_tried: int = 0
    tier_served: str | None = None
    ttft_us: int | None = None
    itl_p50_us: int | None = None
    itl_p99_us: int | None = None
    verdict: str | None = None
    missed: str | None = None

    def row(self) -> Sequence[Value]:
        return _ROW(self)

    @property
    def is_open(self) -> bool:
        return self.outcome == Outcome.OPEN.value

    def uses(self, usage: Usage) -> None:
        self.prompt_tokens = usage.prompt_tokens
        self.cached_tokens = usage.cached_tokens
        self.cache_write_tokens = usage.cache_write_tokens
        self.completion_tokens = usage.completion_tokens
        self.reasoning_tokens = usage.reasoning_tokens


_ROW = attrgetter(*schema.REQUEST)


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen price and its name."""

    price_id: str
    price: Price

    @classmethod
    def of(cls, *, currency: str, version: str, rates: Mapping[str, int]) -> "Frozen":
        price = Price(currency=currency, version=version, rates=rates)
        return cls(schema.price_id(currency=currency, version=version, rates=_text(rates)), price)

    def row(self) -> Sequence[Value]:
        price = self.price
        return (self.price_id, price.currency, price.version, _text(price.rates))


def _text(rates: Mapping[str, int]) -> str:
    return json.dumps(dict(sorted(rates.items())), separators=(",", ":"))


@dataclass(slots=True)
class Balance:
    """What a batch adds to one row of `balance`. Plain integers: they have no bound."""

    requests: int = 0
    charge: int = 0
    adjusted: int = 0
    credit: int = 0

    def row(self, key: BalanceKey) -> Sequence[Value]:
        amounts = (self.charge, self.adjusted, self.credit)
        return (
            *key,
            self.requests,
            *(part for each in amounts for part in divmod(each, UNIT_FEMTO)),
        )


@dataclass(slots=True, eq=False)
class Effects:
    """Everything that a batch does, as rows in the order of `schema`'s columns."""

    requests: dict[int, Request] = field(default_factory=dict[int, Request])
    """By the number of their record; each replaces the row that is there."""
    prices: dict[str, Frozen] = field(default_factory=dict[str, Frozen])
    quantities: list[Sequence[Value]] = field(default_factory=list[Sequence[Value]])
    adjustments: list[tuple[Value, ...]] = field(default_factory=list[tuple[Value, ...]])
    credits: list[tuple[Value, ...]] = field(default_factory=list[tuple[Value, ...]])
    epochs: list[Sequence[Value]] = field(default_factory=list[Sequence[Value]])
    balances: dict[BalanceKey, Balance] = field(default_factory=dict[BalanceKey, Balance])

    def balance(self, key: BalanceKey) -> Balance:
        return self.balances.setdefault(key, Balance())

    def ended(self, request: Request, price: Price, quantities: Mapping[str, int]) -> None:
        """`request` has just got its end: count it."""
        assert request.month is not None
        self.quantities += (
            (request.log_no, request.seq, unit, quantity) for unit, quantity in quantities.items()
        )
        key = (request.tenant_id, request.project_id, price.currency, request.month)
        balance = self.balance(key)
        balance.requests += 1
        balance.charge += request.charge_femto


def holds_of(batch: Sequence[Logged]) -> list[int]:
    """The holds that a batch goes on with without having made them itself."""
    made = {each.seq for each in batch if each.event.HasField("reserve")}
    named = (_hold(each.event) for each in batch)
    return sorted({hold for hold in named if hold is not None and hold not in made})


def _hold(event: pb.MeterEvent) -> int | None:
    kind = event.WhichOneof("kind")
    if kind in ("checkpoint", "settle", "void", "expire"):
        return getattr(event, kind).reserve
    return None


@dataclass(slots=True, eq=False)
class Fold:
    """One batch on its way to its effects."""

    log_no: int
    known: dict[int, Request]
    """Earlier requests that the batch goes on with, by hold."""
    frozen: dict[str, Frozen]
    """Their prices, by name."""
    effects: Effects = field(default_factory=Effects)

    def apply(self, logged: Logged) -> None:
        """Take the next record.

        Raises:
            MeterLogDamaged: it contradicts what the log said before.
            AmountOutOfRange: it has an amount that is negative or too large.
        """
        event = logged.event
        match event.WhichOneof("kind"):
            case "reserve":
                self._reserve(logged, event.reserve)
            case "checkpoint":
                self._checkpoint(logged, event.checkpoint)
            case "settle":
                self._settle(logged, event.settle)
            case "void":
                self._void(logged, event.void)
            case "expire":
                self._expire(logged, event.expire)
            case "refuse":
                self._refuse(logged, event.refuse)
            case "adjust":
                self._adjust(logged, event.adjust)
            case "grant":
                self._grant(logged, event.grant)
            case "epoch":
                epoch = check.text(logged, event.epoch.epoch, "epoch")
                self.effects.epochs.append((self.log_no, logged.seq, epoch))
            case "carry" | "seal":
                pass  # For the log's own recovery and proof; nothing in them is owed.
            case _:
                raise check.damaged(logged, "it is of a kind that this version does not know")

    def _reserve(self, logged: Logged, reserve: pb.Reserve) -> None:
        frozen = Frozen.of(
            currency=check.named(logged, reserve.price.currency, "currency"),
            version=check.named(logged, reserve.price.version, "price version"),
            rates=check.rates(logged, reserve.price.rates),
        )
        self.frozen[frozen.price_id] = self.effects.prices[frozen.price_id] = frozen
        self.known[logged.seq] = self.effects.requests[logged.seq] = Request(
            log_no=self.log_no,
            seq=logged.seq,
            tenant_id=check.named(logged, reserve.tenant_id, "tenant_id"),
            project_id=check.text(logged, reserve.project_id, "project_id"),
            key_id=check.text(logged, reserve.key_id, "key_id"),
            request_id=check.named(logged, reserve.request_id, "request_id"),
            model=check.text(logged, reserve.model, "model"),
            version=check.text(logged, reserve.version, "version"),
            tier=check.tier(logged, reserve.tier),
            price_id=frozen.price_id,
            hold_femto=check.whole(logged, reserve.hold_femto, "hold_femto"),
            accepted_unix_ms=check.moment(logged, reserve.accepted_unix_ms, "accepted_unix_ms"),
            idempotency_digest=reserve.idempotency_digest.hex(),
        )

    def _checkpoint(self, logged: Logged, checkpoint: pb.Checkpoint) -> None:
        request = self._held(logged, checkpoint.reserve)
        if request.is_open:
            request.uses(check.usage(logged, checkpoint.usage))

    def _settle(self, logged: Logged, settle: pb.Settle) -> None:
        request = self._ending(logged, settle)
        usage = check.usage(logged, settle.usage)
        request.uses(usage)
        request.version = check.text(logged, settle.version, "version") or request.version
        first = check.moment(logged, settle.first_token_unix_ms, "first_token_unix_ms")
        request.first_token_unix_ms = first or None
        request.replicas_tried = check.whole(logged, settle.replicas_tried, "replicas_tried")
        request.charge_femto = check.whole(logged, settle.charge_femto, "charge_femto")
        counted = check.quantities(logged, usage, settle.quantities)
        price = self.frozen[request.price_id].price
        outcome = check.outcome(logged, settle.outcome)
        request.waived_femto = _waived(price, counted, Outcome(outcome))
        self._receipt(logged, request, settle)
        self._end(logged, request, outcome, settle.settled_unix_ms, counted)

    def _void(self, logged: Logged, void: pb.Void) -> None:
        request = self._ending(logged, void)
        request.uses(Usage())
        request.replicas_tried = check.whole(logged, void.replicas_tried, "replicas_tried")
        self._receipt(logged, request, void)
        self._end(logged, request, check.outcome(logged, void.outcome), void.settled_unix_ms, {})

    def _expire(self, logged: Logged, expire: pb.Expire) -> None:
        request = self._ending(logged, expire)
        request.uses(Usage())
        self._end(logged, request, Outcome.EXPIRED.value, expire.settled_unix_ms, {})

    def _refuse(self, logged: Logged, refuse: pb.Refuse) -> None:
        frozen = Frozen.of(
            currency=check.text(logged, refuse.currency, "currency"),
            version=check.text(logged, refuse.price_version, "price version"),
            rates={},
        )
        self.frozen[frozen.price_id] = self.effects.prices[frozen.price_id] = frozen
        unix_ms = check.moment(logged, logged.event.unix_ms, "unix_ms")
        request = self.effects.requests[logged.seq] = Request(
            log_no=self.log_no,
            seq=logged.seq,
            tenant_id=check.text(logged, refuse.tenant_id, "tenant_id"),
            project_id=check.text(logged, refuse.project_id, "project_id"),
            key_id=check.text(logged, refuse.key_id, "key_id"),
            request_id=check.text(logged, refuse.request_id, "request_id"),
            model=check.text(logged, refuse.model, "model"),
            version="",
            tier=check.tier(logged, refuse.tier),
            price_id=frozen.price_id,
            hold_femto=0,
            accepted_unix_ms=unix_ms,
            idempotency_digest="",
        )
        self._receipt(logged, request, refuse)
        self._end(logged, request, check.outcome(logged, refuse.outcome), unix_ms, {})

    def _adjust(self, logged: Logged, adjust: pb.Adjust) -> None:
        unix_ms = check.moment(logged, logged.event.unix_ms, "unix_ms")
        self.effects.adjustments.append(
            (
                check.named(logged, adjust.tenant_id, "tenant_id"),
                check.named(logged, adjust.adjustment_id, "adjustment_id"),
                check.text(logged, adjust.project_id, "project_id"),
                check.text(logged, adjust.request_id, "request_id"),
                adjust.amount_femto,
                check.named(logged, adjust.currency, "currency"),
                check.text(logged, adjust.reason, "reason"),
                check.text(logged, adjust.actor, "actor"),
                unix_ms,
                check.month_of(unix_ms),
                self.log_no,
                logged.seq,
            )
        )

    def _grant(self, logged: Logged, grant: pb.Grant) -> None:
        unix_ms = check.moment(logged, logged.event.unix_ms, "unix_ms")
        self.effects.credits.append(
            (
                check.named(logged, grant.tenant_id, "tenant_id"),
                check.named(logged, grant.grant_id, "grant_id"),
                check.text(logged, grant.budget_id, "budget_id"),
                check.whole(logged, grant.amount_femto, "amount_femto"),
                check.named(logged, grant.currency, "currency"),
                check.whole(logged, grant.expires_unix_ms, "expires_unix_ms"),
                check.text(logged, grant.actor, "actor"),
                unix_ms,
                check.month_of(unix_ms),
                self.log_no,
                logged.seq,
                check.text(logged, grant.project_id, "project_id"),
                check.text(logged, grant.reason, "reason"),
            )
        )

    def _held(self, logged: Logged, hold: int) -> Request:
        request = self.known.get(hold)
        if request is None:
            raise check.damaged(logged, f"it names hold {hold:,}, which no record made")
        self.effects.requests[hold] = request
        return request

    def _ending(self, logged: Logged, end: pb.Settle | pb.Void | pb.Expire) -> Request:
        request = self._held(logged, end.reserve)
        if not request.is_open:
            raise check.damaged(
                logged, f"hold {end.reserve:,} had ended before, as {request.outcome}"
            )
        check.same_request(logged, end, key=(request.tenant_id, request.request_id))
        return request

    def _end(
        self,
        logged: Logged,
        request: Request,
        outcome: str,
        settled_unix_ms: int,
        quantities: Mapping[str, int],
    ) -> None:
        request.outcome = outcome
        request.settled_unix_ms = check.moment(logged, settled_unix_ms, "settled_unix_ms")
        request.settled_seq = logged.seq
        request.month = check.month_of(settled_unix_ms)
        self.effects.ended(request, self.frozen[request.price_id].price, quantities)

    def _receipt(
        self, logged: Logged, request: Request, end: pb.Settle | pb.Void | pb.Refuse
    ) -> None:
        if not end.HasField("receipt"):
            return
        receipt: usage_pb2.Receipt = end.receipt
        request.tier_served = check.TIERS.get(receipt.tier_served, request.tier)
        request.ttft_us = check.whole(logged, receipt.ttft_us, "ttft_us") or None
        request.itl_p50_us = check.whole(logged, receipt.itl_p50_us, "itl_p50_us") or None
        request.itl_p99_us = check.whole(logged, receipt.itl_p99_us, "itl_p99_us") or None
        request.verdict = check.verdict(logged, receipt.verdict)
        request.missed = check.text(logged, ",".join(receipt.missed), "missed objectives")


@dataclass(frozen=True, slots=True)
class Counted:
    """Quantities as the `Countable` that prices take."""

    by_unit: Mapping[str, int]

    def quantities(self) -> Mapping[str, int]:
        return self.by_unit


def _waived(price: Price, counted: Mapping[str, int], outcome: Outcome) -> int:
    """For statistics; work of ours that no rate covers or no number holds is waived at 0."""
    try:
        return outcomes.waived_femto(price, Counted(counted), outcome)
    except (UnknownUnit, AmountOutOfRange):
        return 0
