"""Whether a request got what its tier promises: a pure function of what was measured.

| how it ended | verdict |
|---|---|
| answered, or ended by the caller's budget | every objective is held against it |
| the caller left, or its deadline passed | a miss if a promise was broken by then, else excluded |
| refused or failed, and the reason was ours | a miss of `availability` |
| refused for a reason of the caller's | excluded |
"""

from dataclasses import dataclass

from headrace.serving.domain.tier import Objective, Verdict
from headrace.serving.domain.usage import Outcome

TTFT, ITL, DEADLINE, AVAILABILITY = "ttft", "itl", "deadline", "availability"
OBJECTIVES = (TTFT, ITL, DEADLINE, AVAILABILITY)

_OURS = frozenset({Outcome.FAILED, Outcome.RECOVERED, Outcome.EXPIRED})
_ANSWERED = frozenset({Outcome.OK, Outcome.BUDGET})


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Times of one request at the gateway's edge, in microseconds."""

    ttft_us: int | None = None
    """None: no chunk was sent."""
    itl_p50_us: int | None = None
    itl_p99_us: int | None = None
    """None: fewer than two chunks of one answer."""
    elapsed_us: int = 0
    """From acceptance to the end."""


def judge(
    objective: Objective, measured: Measured, outcome: Outcome, *, is_ours: bool = False
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and which objectives were missed.

    Args:
        objective: what was promised.
        measured: what was got.
        outcome: how the request ended.
        is_ours: of a request that was refused, whether the reason was ours.
    """
    if outcome in _OURS or (outcome is Outcome.REJECTED and is_ours):
        return Verdict.MISSED, (AVAILABILITY,)
    if outcome is Outcome.REJECTED:
        return Verdict.EXCLUDED, ()
    first_us = measured.elapsed_us if measured.ttft_us is None else measured.ttft_us
    checks = (
        (TTFT, objective.ttft_ms_max, first_us),
        (ITL, objective.itl_ms_max, measured.itl_p99_us),
        (DEADLINE, objective.deadline_ms_max, measured.elapsed_us),
    )
    missed = tuple(
        name
        for name, ms_max, us in checks
        if ms_max is not None and us is not None and us > ms_max * 1000
    )
    if missed:
        return Verdict.MISSED, missed
    return (Verdict.MET if outcome in _ANSWERED else Verdict.EXCLUDED), ()
