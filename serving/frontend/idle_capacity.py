"""How much work may start that must not be in anybody's way.

Pure arithmetic over what the replicas said with their last step. A row in four stays free, so that
a request that comes now gets one at once; where anything waits, nothing starts.
"""

from collections.abc import Sequence

from headrace.serving.router.endpoint import Endpoint
from headrace.serving.router.picker import Ask, refusal

ROWS_KEPT_SHARE = 4
"""One row in so many stays free for those who cannot wait."""


def idle_rows(endpoints: Sequence[Endpoint], model: str, *, now_ms: float) -> int:
    """Rows of `model` that may be taken: of 32 rows with 5 busy, 32 - 8 - 5 = 19."""
    ask = Ask(model=model, prompt_tokens=0, chain=())
    idle = 0
    for endpoint in endpoints:
        load = endpoint.load
        if refusal(endpoint, ask, now_ms=now_ms) is None and not load.waiting:
            kept = load.rows_max // ROWS_KEPT_SHARE
            idle += max(0, load.rows_max - kept - load.running - endpoint.sent_sequences)
    return idle
