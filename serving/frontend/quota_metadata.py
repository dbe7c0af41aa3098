"""What an answer's initial metadata says about its caller's limits."""

from collections.abc import Sequence

from headrace.serving.admission.quota import Quota
from headrace.serving.domain.limit import Metric
from headrace.serving.domain.record import Caller

_KINDS = {
    "requests": (Metric.REQUESTS,),
    "tokens": (Metric.INPUT_TOKENS, Metric.OUTPUT_TOKENS),
}
WARNINGS_MAX = 4
"""Soft budgets named: metadata is bounded."""


def quota_metadata(
    quota: Quota, caller: Caller, model: str, currency: str
) -> Sequence[tuple[str, str]]:
    """`x-ratelimit-…` of the tightest rate of each kind, `x-budget-warning` of spent soft budgets.

    Empty for who has no limits. `reset` is in seconds, to the millisecond: when everything is
    there again if no more is taken.
    """
    pairs: list[tuple[str, str]] = []
    for kind, metrics in _KINDS.items():
        tightest = quota.allowance(caller, model, metrics)
        if tightest is not None:
            reset_ms = -(-tightest.reset_ns // 1_000_000)
            pairs += [
                (f"x-ratelimit-limit-{kind}", str(tightest.limit)),
                (f"x-ratelimit-remaining-{kind}", str(tightest.remaining)),
                (f"x-ratelimit-reset-{kind}", f"{reset_ms // 1000}.{reset_ms % 1000:03d}s"),
            ]
    for limit in quota.warnings(caller, model, currency)[:WARNINGS_MAX]:
        pairs.append(("x-budget-warning", f"{limit.subject} {limit.metric} {limit.limit} is spent"))
    return pairs
