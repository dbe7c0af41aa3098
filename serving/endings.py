"""How requests end: the label of an error, and what is kept of one that never ran."""

from dataclasses import dataclass

from headrace.serving.domain.record import Caller
from headrace.serving.domain.tier import Receipt, Tier
from headrace.serving.domain.usage import Outcome, Price
from headrace.serving.errors import DeadlineExceeded, EngineFault, ServingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that ended before it was opened.

    Its record's id is the request_id with a suffix that no caller can send: the request_id itself
    stays unused, so that the retry a refusal asks for is not taken for a replay.
    """

    caller: Caller
    request_id: str
    """As far as it was valid; empty otherwise."""
    model: str
    price: Price
    ending: Outcome
    tier: Tier = Tier.STANDARD
    """As asked."""
    receipt: Receipt | None = None


def outcome_of(error: ServingError) -> Outcome:
    """The label of a request that ended with `error`."""
    match error:
        case DeadlineExceeded():
            return Outcome.DEADLINE
        case EngineFault():
            return Outcome.FAILED
        case _ if type(error) is ServingError:
            return Outcome.FAILED
        case _:
            return Outcome.REJECTED


def exhausted(tried: int, why: str) -> EngineFault:
    return EngineFault(
        f"The request was lost by {tried} replica{'s' if tried > 1 else ''}.",
        why=f"The last one: {why}." if why else "None is left to go on with it.",
        fix="Send it again with a new request_id; this one was not charged.",
    )
