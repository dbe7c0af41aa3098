"""Who goes first: slack, and which promises give way. Pure functions of numbers.

The slack of a job is what is left of the time until its first token is due once the time to
compute it has passed. As long as there is slack the earliest due time goes first, over all tiers,
so that a tier gets no more capacity than its promises need. Four rules keep an overload from
spreading:

* a promise at stake (slack down to a share of the time that was given, for itself or for the whole
  queue before it) goes before everything that may be relegated, the stronger tier first;
* a first token that is late is not saved by being served: it waits for those that can be in time,
  but for one turn in eight (`tier_queue.py`), so that it does not wait for ever;
* rows that decode without a promise pause while a step with them would break another row's;
* batch runs on what nobody else wants.

Goodput under overload is what these are for: plain earliest-deadline-first serves everybody a
little too late.
"""

from math import inf
from typing import NamedTuple

from headrace.serving.domain.tier import Tier
from headrace.serving.engine.job import Job
from headrace.serving.engine.step_time import StepTimeModel

AT_STAKE, ON_TIME, LATE, IDLE = range(4)

STAKE_SHARE = (1.0, 0.75, 0.5)
"""Of the time that was given for the first token, by rank: with less slack than this share the
promise is at stake. Reserved always is. Simulated at 1.5 times the capacity, on two stretches of
the Azure trace and a burstier synthetic one: with 0.25 priority keeps 96, 96 and 88 % of its
promises, with 0.5 100, 100 and 97, with 0.75 100, 100 and 99, and 1 is no better. For standard 0.25
to 0.95 are within 4 points of each other."""
NO_PROMISE_LEFT_MS = (0.0, 500.0, 5_000.0, 30_000.0, inf)
"""What stands for the time left of a job that nothing was promised, by rank; it never runs down."""
PREEMPTIONS_MAX = 3
"""A flex job that lost its blocks this often is scheduled as standard from then on..."""
FLEX_WAIT_MS_MAX = 120_000.0
"""...and so is one that waits this long after it came: being relegated ends."""
CHUNK_TOKENS_MIN = 16
"""Prompt tokens of a step whatever was promised: first tokens must come too."""
ITL_SHARE = 0.95
"""Of a promised gap between tokens, what a step may take: the rest is delivery. How much steps vary
is kept apart, by the model of their times."""

_BATCH = Tier.BATCH.rank
_STANDARD = Tier.STANDARD.rank


class Urgency(NamedTuple):
    """Compares: the smallest is served first.

    Slack decides the state; the order inside a state is that of the due times. By slack, which
    counts a job's own prompt, a long one that cannot be in time would go before short ones that
    can, and prompts under way would take turns.
    """

    state: int
    rank: int
    """0 where tiers are compared by slack alone."""
    left_ms: float
    """Until the first token is due; what cannot be in time comes last."""
    arrival: int


def urgency(job: Job, now_ms: float, wait_ms: float, queue_ms: float) -> Urgency:
    """How soon `job` must get tokens.

    Args:
        job: waiting, or with a prompt under way.
        now_ms: on the clock of its promise.
        wait_ms: what its own prompt takes to compute.
        queue_ms: what all that waits in its tier and in stronger ones takes.
    """
    rank = job.rank
    if rank == _BATCH:
        return Urgency(IDLE, rank, 0.0, job.arrival)
    is_protected = rank <= _STANDARD
    if job.has_begun:
        # Its caller waits in the middle of an answer.
        if is_protected:
            return Urgency(AT_STAKE, rank, 0.0, job.arrival)
        return Urgency(ON_TIME, 0, 0.0, job.arrival)
    due_ms = job.promise.due_ms
    if due_ms is None:
        return Urgency(ON_TIME, 0, NO_PROMISE_LEFT_MS[rank], job.arrival)
    slack_ms = due_ms - now_ms - wait_ms
    given_ms = due_ms - job.queued_ms
    left_ms = due_ms - now_ms
    if slack_ms < 0:
        if rank >= _STANDARD and not job.block_ids:
            return Urgency(LATE, rank, 0.0, job.arrival)
        # A strong tier is not put off, and a prompt under way holds blocks as long as it waits:
        # these follow those of their tier that are in time, and nobody else.
        left_ms = inf
    if is_protected and min(slack_ms, given_ms - queue_ms) < STAKE_SHARE[rank] * given_ms:
        return Urgency(AT_STAKE, rank, left_ms, job.arrival)
    return Urgency(ON_TIME, 0, left_ms, job.arrival)


def is_late(job: Job, now_ms: float, wait_ms: float) -> bool:
    """Whether the first token can no longer be in time."""
    due_ms = job.promise.due_ms
    return due_ms is not None and due_ms < now_ms + wait_ms and not job.has_begun


def promoted_rank(job: Job, now_ms: float) -> int:
    """Where `job` stands after what it has given way to."""
    if job.rank != Tier.FLEX.rank:
        return job.rank
    has_waited = now_ms - job.queued_ms > FLEX_WAIT_MS_MAX
    return _STANDARD if has_waited or job.preemptions >= PREEMPTIONS_MAX else job.rank


def chunk_tokens(times: StepTimeModel, *, rows: int, itl_ms: float | None, most: int) -> int:
    """Prompt tokens of a step in which `rows` decode and the least promised gap is `itl_ms`."""
    if itl_ms is None:
        return most
    fit = times.tokens_within(ITL_SHARE * itl_ms, rows)
    return min(most, max(CHUNK_TOKENS_MIN, fit))


def rows_within(times: StepTimeModel, itl_ms: float) -> int:
    """Rows that may decode beside the smallest chunk within the promised gap."""
    prompts_ms = CHUNK_TOKENS_MIN * times.token_ms
    return int((times.sure_ms(ITL_SHARE * itl_ms) - times.base_ms - prompts_ms) / times.row_ms)
