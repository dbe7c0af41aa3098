"""What is charged, and when: one row for every way in which a request can end.

Everybody who turns usage into money asks here: the pipeline when it settles, recovery when it
closes what a dead frontend left, `reconcile` when it computes every charge again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from headrace.serving.domain.usage import Countable, Outcome, Price

GRACE_STEPS = 1
"""Engine steps that may still run once a caller is gone: the abort is ordered at once and the step
in flight cannot be called back. Tokens beyond it are ours to bear."""


class Charged(StrEnum):
    """How much of a request is charged."""

    DELIVERED = "delivered"
    """Everything that the caller got."""
    DELIVERED_TO_ABORT = "delivered_to_abort"
    """What the caller got until the engine confirmed the abort, at most GRACE_STEPS after it was
    ordered; before the first token that is nothing, the prompt included."""
    NOTHING = "nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table."""

    charged: Charged
    is_waived: bool = False
    """Whether the cost of what was delivered is kept as waived: a fault of ours, which SLA
    statistics count and no invoice shows."""
    why: str


RULES: Mapping[Outcome, Rule] = {
    Outcome.OK: Rule(charged=Charged.DELIVERED, why="The answer was delivered whole."),
    Outcome.BUDGET: Rule(
        charged=Charged.DELIVERED,
        why="The tenant's own hard budget ended it; what had been delivered is theirs.",
    ),
    Outcome.CANCELLED: Rule(
        charged=Charged.DELIVERED_TO_ABORT,
        why="The caller had the tokens, and left by choice or by a broken connection.",
    ),
    Outcome.DEADLINE: Rule(
        charged=Charged.DELIVERED_TO_ABORT,
        why="The deadline is the caller's; what arrived before it is theirs.",
    ),
    Outcome.RECOVERED: Rule(
        charged=Charged.DELIVERED,
        why="The frontend died; what its last checkpoint saw had been delivered. Never more.",
    ),
    Outcome.FAILED: Rule(
        charged=Charged.NOTHING,
        is_waived=True,
        why="A fault of ours is free, even after part of the answer was delivered.",
    ),
    Outcome.REJECTED: Rule(charged=Charged.NOTHING, why="It was refused before any work."),
    Outcome.EXPIRED: Rule(
        charged=Charged.NOTHING,
        why="The frontend died, or the job was never run, before anything was delivered.",
    ),
}
"""Every outcome but OPEN, which is not an end."""


def charge_femto(price: Price, work: Countable, outcome: Outcome) -> int:
    """What work that ended so is charged, by the price frozen when it was accepted.

    Raises:
        UnknownUnit, AmountOutOfRange: as `Price.charge_femto`.
    """
    return 0 if RULES[outcome].charged is Charged.NOTHING else price.charge_femto(work)


def waived_femto(price: Price, work: Countable, outcome: Outcome) -> int:
    """What work that ended so would have cost, where the rule keeps that; else 0.

    Raises:
        UnknownUnit, AmountOutOfRange: as `Price.charge_femto`.
    """
    return price.charge_femto(work) if RULES[outcome].is_waived else 0
