"""When a request's first token would come from a replica: what admission decides by.

    ttft = tokens of its tier that wait there / rate at which that tier is admitted lately
         + its own prompt / rate at which prompts are computed

The first rate is measured where it happens, so whatever limits admission (rows, blocks, stronger
tiers) is in it. A tier that nobody of waits for is as fast as its prompt.
"""

from headrace.serving.domain.tier import Tier
from headrace.serving.router.endpoint import ReplicaLoad

QUEUE_SHARE_MIN = 0.01
"""Of the replica's prompt rate: a tier whose turn has not come lately is not taken for dead."""


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
