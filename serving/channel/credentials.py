"""The cluster token: how replicas, frontends and the directory know each other.

Their ports belong on a private network; the token keeps out whoever is on it all the same.
"""

import hmac
from collections.abc import Sequence

import grpc.aio

_KEY = "authorization"
_SCHEME = "Bearer "


def token_metadata(cluster_token: str) -> Sequence[tuple[str, str]]:
    """What a caller inside the cluster sends with each call."""
    return ((_KEY, _SCHEME + cluster_token),)


async def require_token(context: grpc.aio.ServicerContext, cluster_token: str) -> None:
    """End the call with UNAUTHENTICATED unless it carries the token; compares in constant time."""
    presented = ""
    for key, value in context.invocation_metadata() or ():
        if key == _KEY and isinstance(value, str):
            presented = value
    expected = _SCHEME + cluster_token
    if not hmac.compare_digest(presented.encode(), expected.encode()):
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED,
            "The cluster token is missing or wrong. Replicas, frontends and the directory share "
            "one. Give them the same cluster_token file.",
        )
