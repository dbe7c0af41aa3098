"""A sampler in a few lines: the likeliest token that is allowed. No native library."""

from collections.abc import Sequence

import numpy as np

from headrace.serving.engine.base import Logits
from headrace.serving.engine.sampler import NO_TOKEN, Sampled, SampleRequest


class GreedySampler:
    """Takes masks and forbidden tokens as `Sampler` does; ignores every other rule."""

    def __init__(self) -> None:
        self.is_closed = False

    def sample(self, logits: Logits, requests: Sequence[SampleRequest]) -> list[Sampled]:
        assert len(logits) == len(requests)
        return [_choose(row, request) for row, request in zip(logits, requests, strict=True)]

    def close(self) -> None:
        self.is_closed = True


def _choose(row: Logits, request: SampleRequest) -> Sampled:
    if request.mask is None and not request.forbid:
        return Sampled(int(row.argmax()))
    allowed = np.ones(len(row), bool)
    if request.mask is not None:
        bits = np.unpackbits(request.mask.view(np.uint8), bitorder="little")[: len(row)]
        allowed[: len(bits)] = bits.astype(bool)
        allowed[len(bits) :] = False
        if not allowed.any():
            return Sampled(NO_TOKEN)
    kept = allowed.copy()
    kept[list(request.forbid)] = False
    if kept.any() or request.mask is None:
        allowed = kept
    return Sampled(int(np.where(allowed, row, -np.inf).argmax()))
