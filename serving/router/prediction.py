"""When a request's first token would come from a replica: what admission decides by.

    ttft = tokens of its tier that wait there / rate at which that tier is admitted lately
         + its own prompt / rate at which prompts are computed

The first rate is measured where it happens, so whatever limits admission (rows, blocks, stronger
tiers) is in it. A tier that nobody of waits for is as fast as its prompt.
"""

from headrace.serving.domain.tier import Terms, Tier
from headrace.serving.errors import Overloaded
from headrace.serving.router.endpoint import Endpoint, ReplicaLoad
from headrace.serving.router.picker import Ask

QUEUE_SHARE_MIN = 0.01
"""Of the replica's prompt rate: a tier whose turn has not come lately is not taken for dead."""

RETRY_MS_MIN, RETRY_MS_MAX = 1_000, 60_000
"""A refused caller comes back when the excess has been worked off: within these."""


def predicted_ttft_ms(
    load: ReplicaLoad, tier: Tier, *, prompt_tokens: int, sent_tokens: int = 0
) -> float:
    """Milliseconds until the first token.

    Args:
        load: the replica's word.
        tier: that serves the request.
        prompt_tokens: what it has to compute.
        sent_tokens: prompt tokens that are on their way there and not in `load` yet.
    """
    prompts_per_s = load.prompt_tokens_per_s
    if prompts_per_s <= 0:
        return 0.0  # It has not said: an older release, or nothing has run yet.
    own_ms = 1000 * (prompt_tokens + sent_tokens) / prompts_per_s
    queue = load.tiers.get(tier)
    if queue is None:
        return own_ms
    rate = max(queue.tokens_per_s, QUEUE_SHARE_MIN * prompts_per_s)
    return own_ms + 1000 * queue.ahead_tokens / rate


def refuse_hopeless(endpoint: Endpoint, ask: Ask, terms: Terms) -> None:
    """Refuse flex and batch that could not keep their promise; everybody else is let in.

    A caller who is told at once loses nothing but the wait. The stronger tiers are never refused
    by a prediction: their promise is ours to keep.

    Raises:
        Overloaded: the first token, or the answer if that is what was promised, would be late.
    """
    if not terms.tier_served.may_be_relegated:
        return
    promised_ms = terms.objective.ttft_ms_max or terms.objective.deadline_ms_max
    if promised_ms is None:
        return
    resident = min(endpoint.prefixes.matched_tokens(ask.chain), ask.prompt_tokens)
    wait_ms = predicted_ttft_ms(
        endpoint.load,
        terms.tier_served,
        prompt_tokens=ask.prompt_tokens - resident,
        sent_tokens=endpoint.sent_tokens,
    )
    if wait_ms > promised_ms:
        raise Overloaded(
            f"The first token would come after about {wait_ms / 1000:.0f} s.",
            why=f"{terms.tier_served} promises {promised_ms / 1000:g} s, and stronger tiers and "
            "earlier requests go first.",
            fix="Retry after the time given, with jitter, or ask for a stronger tier.",
            retry_after_ms=int(min(max(wait_ms - promised_ms, RETRY_MS_MIN), RETRY_MS_MAX)),
        )
