"""One answer with several readers: each gets it from its beginning, the engine makes it once.

The fastest reader sets the pace: the next chunk is asked for when one of them has sent all there
is, so a chunk still counts as delivered when somebody came back for the next. What has been made
is kept for those who come later, within bounds. Past the bounds nobody may attach any more, and the
slowest reader sets the pace, so that at most one chunk is kept.

Owned by the event loop.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Self

from headrace.serving.errors import IdempotencyInFlight
from headrace.v1 import inference_pb2 as pb

READERS_MAX = 64
"""Of one answer. Each is a call that waits; more than a few is a client in a loop."""
ANSWER_BYTES_MAX = 2 << 20
"""Of one answer: 16 choices of 8 Ki tokens are 1 MB without logprobs. A replay sends a choice as
one message, and gRPC clients take 4 MiB by default."""
KEPT_BYTES_MAX = 64 << 20
"""Of all answers that run: 1,000 streams of 500 tokens take 40 MB."""
_CHUNK_BYTES = 100
"""What keeping a chunk costs beside its own bytes."""
RETRY_AFTER_MS = 1_000


class KeptBytes:
    """The bound over all answers that one frontend keeps."""

    def __init__(self, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self.held = 0

    def take(self, size: int) -> bool:
        """Whether there is room; if so it is taken."""
        fits = self.held + size <= self._bytes_max
        self.held += size if fits else 0
        return fits

    def give(self, size: int) -> None:
        self.held -= size
        assert self.held >= 0


class SharedRun:
    """What of an answer there is, and who reads it."""

    def __init__(
        self, fingerprint: bytes, *, kept: KeptBytes, on_abandoned: Callable[[], object]
    ) -> None:
        """`on_abandoned` is called when the last reader leaves and what runs is to be cancelled."""
        self.fingerprint = fingerprint
        self.request_id = ""
        self.is_replay = False
        """It had been answered before this run began."""
        self.keeps = True
        """Everything from the first chunk on is here."""
        self.is_over = False
        self.may_be_abandoned = False
        """Something runs that nobody needs without a reader."""
        self.began = asyncio.Event()
        """It is known whether there will be an answer."""
        self.num_taken = 0
        """Chunks that some reader came back from, or has."""
        self._kept = kept
        self._on_abandoned = on_abandoned
        self._chunks: deque[bytes] = deque()
        self._first = 0
        self._bytes = 0
        self._readers: set[Reader] = set()
        self._wanted = asyncio.Event()
        self.error: Exception | None = None

    @property
    def has_readers(self) -> bool:
        return bool(self._readers)

    @property
    def end(self) -> int:
        """Number of the next chunk."""
        return self._first + len(self._chunks)

    def attach(self) -> "Reader":
        """A reader of everything from the first chunk on. Leave it, or use it as a context.

        Raises:
            IdempotencyInFlight: what was sent so far is not kept, or it has too many readers.
        """
        if not self.keeps or len(self._readers) >= READERS_MAX:
            why = (
                f"{READERS_MAX} calls wait for its answer already."
                if self.keeps
                else "Its answer is longer than what is kept of running ones."
            )
            raise in_flight(self.request_id, why)
        reader = Reader(self)
        self._readers.add(reader)
        return reader

    def begin(self, request_id: str, *, is_replay: bool = False) -> None:
        self.request_id = request_id
        self.is_replay = is_replay
        self.may_be_abandoned = not is_replay
        self.began.set()

    def put(self, chunk: pb.GenerateChunk) -> None:
        raw = chunk.SerializeToString()
        size = len(raw) + _CHUNK_BYTES
        self._chunks.append(raw)
        self._bytes += size
        if self.keeps and not (self._bytes <= ANSWER_BYTES_MAX and self._kept.take(size)):
            self._kept.give(self._bytes - size)
            self.keeps = False
        self._wanted.clear()
        self._wake()

    async def wanted(self) -> None:
        """Wait until the next chunk is."""
        self.look()
        await self._wanted.wait()

    def finish(self, error: Exception | None = None) -> None:
        """Nothing more comes: readers end, with the error if there is one. The first call counts.

        What is kept stays for the readers that are behind, and goes with the last of them.
        """
        if not self.is_over:
            self.error = error
            self.is_over = True
            self.began.set()
            self._wake()
            if not self._readers:
                self._drop()

    def whole(self) -> list[pb.GenerateChunk]:
        """Every chunk so far; only while `keeps`."""
        assert self.keeps
        return [pb.GenerateChunk.FromString(raw) for raw in self._chunks]

    def chunk(self, number: int) -> pb.GenerateChunk:
        return pb.GenerateChunk.FromString(self._chunks[number - self._first])

    def look(self) -> None:
        """Notice that a reader waits, or left."""
        waiting = [reader.waits for reader in self._readers]
        if any(waiting) if self.keeps else bool(waiting) and all(waiting):
            self.num_taken = self.end
            self._wanted.set()
        if not self.keeps:
            self._trim()

    def leave(self, reader: "Reader") -> None:
        if reader not in self._readers:
            return
        self._readers.discard(reader)
        if self.is_over:
            if not self._readers:
                self._drop()
        elif self._readers:
            self.look()
        elif self.may_be_abandoned:
            self._on_abandoned()

    def _trim(self) -> None:
        """Let go of what every reader has."""
        slowest = min((reader.position for reader in self._readers), default=self.end)
        while self._first < slowest:
            self._bytes -= len(self._chunks.popleft()) + _CHUNK_BYTES
            self._first += 1

    def _drop(self) -> None:
        if self.keeps:
            self._kept.give(self._bytes)
            self.keeps = False
        self._chunks.clear()
        self._bytes = 0

    def _wake(self) -> None:
        for reader in self._readers:
            # Not when it runs: until then it would look as if it had nothing to send.
            reader.waits = False
            reader.wake.set()


class Reader(AsyncIterator[pb.GenerateChunk]):
    """One caller's place in the answer. Belongs to that caller's task."""

    def __init__(self, run: SharedRun) -> None:
        self._run = run
        self.position = 0
        self.wake = asyncio.Event()
        self.waits = False

    @property
    def is_replay(self) -> bool:
        return self._run.is_replay

    @property
    def request_id(self) -> str:
        return self._run.request_id

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Read no more. Idempotent."""
        self._run.leave(self)

    async def begun(self) -> None:
        """Wait until it is known whether there will be an answer.

        Raises:
            ServingError: there will be none.
        """
        await self._run.began.wait()
        if self._run.error is not None:
            raise self._run.error

    async def __anext__(self) -> pb.GenerateChunk:
        run = self._run
        while self.position == run.end:
            if run.error is not None:
                raise run.error
            if run.is_over:
                raise StopAsyncIteration
            self.waits = True
            self.wake.clear()
            run.look()
            try:
                await self.wake.wait()
            finally:
                self.waits = False
        chunk = run.chunk(self.position)
        self.position += 1
        return chunk


def in_flight(request_id: str, why: str) -> IdempotencyInFlight:
    named = f" as request {request_id!r}" if request_id else ""
    return IdempotencyInFlight(
        f"The first call with this idempotency key still runs{named}.",
        why=why,
        fix="Retry after the time given, under the same key: its answer is kept for 24 hours.",
        retry_after_ms=RETRY_AFTER_MS,
    )
