"""A limit as a value: whose, of what, how much. All limits that apply to a request must pass.

| metric | counts | unit of `limit` |
|---|---|---|
| `requests_per_min` | requests that begin | requests |
| `input_tokens_per_min` | prompt tokens; cached ones are given back | tokens |
| `output_tokens_per_min` | delivered tokens | tokens |
| `concurrent_requests` | requests that run | requests |
| `kv_tokens` | prompt and most output of what runs | tokens |
| `budget_nano_per_day`, `_per_month`, `_total` | money, by UTC calendar | nano-currency |
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from headrace.serving.domain.record import Caller
from headrace.serving.domain.units import QUANTITY_MAX
from headrace.serving.errors import InvalidRequest

LIMIT_MAX = QUANTITY_MAX
"""What a signed 64-bit column holds: 9.2 billion units of currency, for a budget."""
MODEL_CHARS_MAX = 128

_NAME = r"[0-9A-Za-z_.:-]{1,64}"
_SUBJECT = re.compile(rf"organisation:{_NAME}|project:{_NAME}/{_NAME}|key:{_NAME}")
_MODEL = re.compile(rf"[0-9A-Za-z_.:/-]{{1,{MODEL_CHARS_MAX}}}")
_CURRENCY = re.compile(r"[A-Z]{3}")


class Metric(StrEnum):
    """What is limited. Low cardinality: a label of metrics."""

    REQUESTS = "requests_per_min"
    INPUT_TOKENS = "input_tokens_per_min"
    OUTPUT_TOKENS = "output_tokens_per_min"
    CONCURRENCY = "concurrent_requests"
    KV_TOKENS = "kv_tokens"
    BUDGET_DAY = "budget_nano_per_day"
    BUDGET_MONTH = "budget_nano_per_month"
    BUDGET_TOTAL = "budget_nano_total"

    @property
    def is_rate(self) -> bool:
        """Refills with time."""
        return self in (Metric.REQUESTS, Metric.INPUT_TOKENS, Metric.OUTPUT_TOKENS)

    @property
    def is_budget(self) -> bool:
        """Money: spent for good, within its period."""
        return self in (Metric.BUDGET_DAY, Metric.BUDGET_MONTH, Metric.BUDGET_TOTAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit of one subject. Its fields are also the keys of `limits:` in config.yaml."""

    subject: str
    """`organisation:acme`, `project:acme/search` or `key:<key id>`."""
    metric: Metric
    limit: int = field(metadata={"low": 1, "high": LIMIT_MAX})
    """In the metric's unit. At least 1: to allow nothing, revoke the key."""
    model: str | None = None
    """Counts this model's requests only; unset, those of all models together."""
    burst: int | None = field(default=None, metadata={"low": 1, "high": LIMIT_MAX})
    """Of a rate: how much may be taken at once after a pause. Unset: a minute's worth."""
    hard: bool = False
    """Of a budget: work stops where the money ends. Soft: it goes on, with a warning. Rates and
    numbers in use are always enforced."""
    currency: str = "USD"
    """Of a budget: that of the price book. What is priced in another one is not compared."""

    @property
    def name(self) -> str:
        """Identifies it: one limit for each subject, model and metric (and currency)."""
        name = f"{self.subject}|{self.model or '*'}|{self.metric}"
        return f"{name}|{self.currency}" if self.metric.is_budget else name

    @property
    def burst_or_limit(self) -> int:
        return self.limit if self.burst is None else self.burst


def subjects_of(caller: Caller) -> tuple[str, str, str]:
    """Whose limits apply to a caller's requests: key, project, organisation."""
    return (
        f"key:{caller.key_id}",
        f"project:{caller.tenant_id}/{caller.project_id}",
        f"organisation:{caller.tenant_id}",
    )


def check_limit(limit: Limit) -> Limit:
    """`limit`, if it means something.

    Raises:
        InvalidRequest: it names nobody, its number is out of range, or a field does not go with
            its metric.
    """
    if not _SUBJECT.fullmatch(limit.subject):
        raise _refusal(
            "subject",
            limit.subject,
            why="A limit belongs to an organisation, a project or a key.",
            fix="Write it like organisation:acme, project:acme/search or key:3fk2m8qa.",
        )
    if limit.model is not None and not _MODEL.fullmatch(limit.model):
        raise _refusal(
            "model",
            limit.model,
            why=f"A model's name has 1 to {MODEL_CHARS_MAX} letters, digits or _ . : / - in it.",
            fix="See `headrace models`; leave it out for all models together.",
        )
    for name, number in (("limit", limit.limit), ("burst", limit.burst_or_limit)):
        if not 1 <= number <= LIMIT_MAX:
            raise _refusal(
                name,
                number,
                why=f"It is a whole number from 1 to {LIMIT_MAX:,}.",
                fix="Choose one; to allow nothing, revoke the key.",
            )
    if limit.burst is not None and not limit.metric.is_rate:
        raise _refusal(
            "burst",
            limit.burst,
            why=f"Only a rate refills, and {limit.metric} is none.",
            fix="Leave it out.",
        )
    if not _CURRENCY.fullmatch(limit.currency):
        raise _refusal(
            "currency",
            limit.currency,
            why="It is three capital letters of ISO 4217.",
            fix="Write that of the price book, for example USD.",
        )
    return limit


def _refusal(name: str, value: object, *, why: str, fix: str) -> InvalidRequest:
    shown = repr(value)[:80]
    return InvalidRequest(f"The limit's {name} is {shown}.", why=why, fix=fix, field=name)
