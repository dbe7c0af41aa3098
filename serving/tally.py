"""Counts what a request's caller has, token by token."""

from headrace.serving.domain.generate import Chunk, Generate
from headrace.serving.domain.request import Delta
from headrace.serving.domain.usage import Usage


class Tally:
    """Usage that arrived, and the part of it that was delivered.

    The prompt counts once, with the first delta of the request: `n` answers share it, and what a
    failover computes again was counted already. So do the prompt's cached and written tokens, which
    the first replica's prefix cache decided.
    """

    def __init__(self, request: Generate) -> None:
        self.usage = Usage()
        """What the caller has."""
        self._prompt_tokens = len(request.prompt_ids)
        self._cached_tokens: int | None = None
        self._cache_write_tokens = 0
        self._completion_tokens = 0
        self._reasoning_tokens = 0
        self._marks = request.reasoning_token_ids
        self._is_thinking = [_starts_thinking(request)] * request.n

    def after(self, index: int, delta: Delta) -> Usage:
        """The usage once `delta` of answer `index` is delivered. Call once, in order."""
        if self._cached_tokens is None:
            self._cached_tokens = min(delta.cached_tokens, self._prompt_tokens)
            fresh = self._prompt_tokens - self._cached_tokens
            self._cache_write_tokens = min(delta.cache_write_tokens, fresh)
        self._completion_tokens += len(delta.token_ids)
        if self._marks is not None:
            self._count_reasoning(index, delta)
        return Usage(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            cache_write_tokens=self._cache_write_tokens,
            completion_tokens=self._completion_tokens,
            reasoning_tokens=self._reasoning_tokens,
        )

    def delivered(self, chunk: Chunk) -> None:
        self.usage = chunk.usage

    def _count_reasoning(self, index: int, delta: Delta) -> None:
        assert self._marks is not None
        opens, closes = self._marks
        for token_id in delta.token_ids:
            if token_id == opens:
                self._is_thinking[index] = True
            elif token_id == closes:
                self._is_thinking[index] = False
            elif self._is_thinking[index]:
                self._reasoning_tokens += 1


def _starts_thinking(request: Generate) -> bool:
    """Whether the prompt ends inside a thinking section, as some chat templates make it."""
    if request.reasoning_token_ids is None:
        return False
    opens, closes = request.reasoning_token_ids
    for token_id in reversed(request.prompt_ids):
        if token_id in (opens, closes):
            return token_id == opens
    return False
