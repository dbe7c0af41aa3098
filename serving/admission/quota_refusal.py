"""How a limit says no: whose it is, what it counts, and when or how to come back."""

from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.usage import FEMTO_PER_NANO, Price
from headrace.serving.errors import (
    BudgetExhausted,
    ConcurrencyExceeded,
    LimitExceeded,
    QuotaExceeded,
)

RETRY_GAUGE_MS = 1_000
"""When a place will be free is not known; answers take seconds."""

_NOUNS = {
    Metric.REQUESTS: "requests a minute",
    Metric.INPUT_TOKENS: "input tokens a minute",
    Metric.OUTPUT_TOKENS: "output tokens a minute",
    Metric.CONCURRENCY: "requests at once",
    Metric.KV_TOKENS: "tokens of KV cache at once",
    Metric.BUDGET_DAY: "a day",
    Metric.BUDGET_MONTH: "a month",
    Metric.BUDGET_TOTAL: "in all",
}


def refusal_of(limit: Limit, amount: int, *, wait_ns: int | None) -> LimitExceeded:
    """A rate or a number in use that `amount` does not fit into for `wait_ns`, or ever."""
    noun = _NOUNS[limit.metric]
    whose = f"{limit.subject}{f' with {limit.model}' if limit.model else ''}"
    kind = QuotaExceeded if limit.metric.is_rate else ConcurrencyExceeded
    if wait_ns is None:
        retry_after_ms = None
        fix = "Ask for less in one request, or have the limit raised with `headrace limits set`."
    elif limit.metric.is_rate:
        # Rounded up: a retry that comes a fraction of a millisecond early would be refused again.
        retry_after_ms = max(1, -(-wait_ns // 1_000_000))
        fix = f"Retry in {retry_after_ms:,} ms, or have it raised with `headrace limits set`."
    else:
        retry_after_ms = RETRY_GAUGE_MS
        fix = "Retry when one of your requests has ended, with jitter."
    return kind(
        f"The request needs {amount:,} of the limit of {limit.limit:,} {noun}.",
        why=f"It is the limit of {whose}, and less than that is free.",
        fix=fix,
        metric=limit.metric,
        limit=limit.limit,
        subject=limit.subject,
        retry_after_ms=retry_after_ms,
    )


def short_of_budget(limit: Limit, start_femto: int) -> BudgetExhausted:
    """A hard budget that does not cover the prompt and one token."""
    start = -(-start_femto // FEMTO_PER_NANO)
    return BudgetExhausted(
        f"The budget of {limit.subject} does not cover the start of this request.",
        why=f"It is {limit.limit:,} nano-{limit.currency} {_NOUNS[limit.metric]}; the prompt and "
        f"one token may cost {start:,}, and less is left.",
        fix="Wait for the next period, send a shorter prompt, or have the budget raised with "
        "`headrace limits set`.",
        metric=limit.metric,
        limit=limit.limit,
        subject=limit.subject,
    )


def wrong_currency(limit: Limit, price: Price) -> BudgetExhausted:
    return BudgetExhausted(
        f"The budget of {limit.subject} is in {limit.currency}.",
        why=f"The price book {price.version!r} is in {price.currency}, and nothing is converted.",
        fix=f"Operator: set a budget in {price.currency} with `headrace limits set`, and remove "
        "this one.",
        metric=limit.metric,
        limit=limit.limit,
        subject=limit.subject,
    )
