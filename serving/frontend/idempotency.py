"""One key, one result, one charge: joins a call to what its idempotency key stands for.

A call with a key claims it, or attaches to the one that runs here, or is answered with the result
that there is. The run belongs to nobody's task: it goes on for as long as somebody reads it. Order
at the end: the record is settled, the result is stored, the final message goes out.
"""

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.domain.record import Caller
from headrace.serving.errors import (
    AlreadyServed,
    IdempotencyConflict,
    IdempotencyUnavailable,
    MeterUnavailable,
    Overloaded,
    ServingError,
)
from headrace.serving.frontend import convert, replay
from headrace.serving.frontend.idempotency_key import Secrets
from headrace.serving.frontend.shared_run import (
    ANSWER_BYTES_MAX,
    KeptBytes,
    Reader,
    SharedRun,
    in_flight,
)
from headrace.serving.idempotency.claims import (
    ATTEMPTS_MAX,
    SWEEP_ROWS,
    Answer,
    Ask,
    Claim,
    ClaimStore,
    Conflicting,
    Elsewhere,
    Exhausted,
    unavailable,
)
from headrace.serving.metering.give_back import GiveBack, GivenBack
from headrace.v1 import inference_pb2 as pb

REPLAYED = (("x-idempotent-replay", "true"),)
"""Initial metadata of an answer that was given before."""
ROWS_MAX = 1_000_000
"""Keys of the last 24 h: 0.4 GB. Beyond it calls with a key are refused, never run unguarded."""
STORED_BYTES_MAX = 1 << 30
"""Of all stored answers; beyond it the oldest go and only the fact stays."""
LATE_MAX = 256
"""Answers that wait for a store that does not answer."""
UNSURE_MAX = 10_000
"""Keys of which the store has to be told that nothing runs them. Beyond it the oldest are left to
their time: other frontends refuse them until then."""
HOUSEKEEPING_S = 5.0
"""How often leases are renewed, debts given back, and expired keys forgotten."""
ROUNDS_MAX = 20
"""Sweeps of one round: 20,000 rows, a thousand expired keys a second for 20 s."""
RETRY_AFTER_MS = 1_000
GIVE_BACK_REASON = "idempotency: a later attempt of the key was whole"

Answering = AsyncGenerator[pb.GenerateChunk | pb.GenerateResponse]
"""A stream that ends with `done`, or one message."""
Start = Callable[[Claim], Awaitable[Answering]]
"""Accepts the request under the claim's request_id; refuses by raising."""


class Idempotency:
    """The keys of one frontend. Owned by its event loop."""

    def __init__(
        self,
        store: ClaimStore,
        *,
        secrets: Secrets,
        clock: Clock,
        keep_answers: bool = True,
        keep_ms: int = 24 * 3_600_000,
        give_back: GiveBack | None = None,
        kept: KeptBytes | None = None,
    ) -> None:
        """Nothing runs before the first call; `store` is closed by its owner, after `close`.

        Args:
            store: of all frontends that share it.
            secrets: of this installation.
            clock: of expiries.
            keep_answers: False stores only that there was an answer, and its usage.
            keep_ms: how long after its end a key is remembered.
            give_back: reverses the charges of replaced attempts. None leaves them in the store
                as debts, for a frontend that can.
            kept: the bound of what is kept of running answers.
        """
        self._store = store
        self._secrets = secrets
        self._clock = clock
        self._keep_answers = keep_answers
        self._keep_ms = keep_ms
        self._give_back = give_back
        self._kept = kept or KeptBytes()
        self._runs: dict[bytes, SharedRun] = {}
        self._late: OrderedDict[bytes, tuple[Claim, Answer]] = OrderedDict()
        self._unsure: OrderedDict[bytes, None] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_full = False

    async def join(
        self, message: pb.GenerateRequest, *, key: str, by: Caller, start: Start
    ) -> Reader:
        """A reader of the key's answer, once it is known that there will be one. Leave it.

        Args:
            message: what is asked for; it has passed `check_request`.
            key: of the call.
            by: whose key it is.
            start: called at most once, if the request is to be run.

        Raises:
            IdempotencyConflict: the key came with another request.
            IdempotencyInFlight: it runs where this call cannot attach to it.
            AlreadyServed: it was answered, and the answer is not kept.
            IdempotencyUnavailable: the store does not answer.
            ServingError: as `start`.
        """
        digest = self._secrets.digest(tenant_id=by.tenant_id, key=key)
        fingerprint = self._secrets.fingerprint(message)
        run = self._runs.get(digest)
        if run is not None and run.fingerprint != fingerprint:
            raise _conflict(run.request_id)
        if run is None:
            reader = self._begin(message, digest, fingerprint, by, start)
        else:
            reader = run.attach()
            log.request_replayed(
                request_id=run.request_id, tenant_id=by.tenant_id, attempt="attached"
            )
        try:
            await reader.begun()
        except BaseException:
            reader.leave()
            raise
        return reader

    async def keep_house(self) -> None:
        """One round of what has to be done now and then: call it every HOUSEKEEPING_S.

        A store that does not answer is logged by the first line of it; the next round comes.
        """
        try:
            await self._store.renew()
            for digest in list(self._late):
                await self._store_late(digest)
            for digest in list(self._unsure):
                if digest not in self._runs:
                    await self._store.end_ours(digest)
                self._unsure.pop(digest, None)
            await self._pay_debts()
            for _ in range(ROUNDS_MAX):
                swept = await self._store.sweep(
                    now_unix_ms=self._clock.unix_ms(), answer_bytes_max=STORED_BYTES_MAX
                )
                if swept < SWEEP_ROWS:
                    break
            self._is_full = (await self._store.extent()).rows >= ROWS_MAX
        except ServingError as error:
            log.refused(error, during="keeping idempotency keys")

    async def close(self) -> None:
        """Wait until every run has ended and is noted; its readers must have left."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _begin(
        self,
        message: pb.GenerateRequest,
        digest: bytes,
        fingerprint: bytes,
        by: Caller,
        start: Start,
    ) -> Reader:
        """Claim the key, in a task of its own; until it has begun, others can attach."""
        now_unix_ms = self._clock.unix_ms()
        retry_id = uuid.uuid4().hex
        ask = Ask(
            digest=digest,
            tenant_id=by.tenant_id,
            fingerprint=fingerprint,
            request_id=message.request_id or retry_id,
            retry_id=retry_id,
            now_unix_ms=now_unix_ms,
            expires_unix_ms=now_unix_ms + self._keep_ms,
        )
        run = SharedRun(fingerprint, kept=self._kept, on_abandoned=lambda: work.cancel())
        reader = run.attach()
        self._runs[digest] = run
        work = self._soon(self._run(run, ask, start))
        return reader

    def _soon(self, work: Coroutine[None, None, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run(self, run: SharedRun, ask: Ask, start: Start) -> None:
        """From the claim to the end; every end is noted in the store and told to the readers."""
        try:
            claim = await self._claim(run, ask)
            if claim is not None:
                await self._carry_out(run, claim, ask, start)
            run.finish()
        except asyncio.CancelledError:
            # Its last reader left; whoever comes now claims the key anew.
            run.finish(in_flight(run.request_id, "It is being cancelled: its callers have gone."))
        except Exception as error:  # The task's root: its readers raise what happened.
            if not (run.has_readers or isinstance(error, ServingError)):
                log.crashed(during="an answer under a key", error=error)
            run.finish(error)
        finally:
            del self._runs[ask.digest]

    async def _claim(self, run: SharedRun, ask: Ask) -> Claim | None:
        """The claim; None when it was answered before, and `run` holds that answer."""
        await self._store_late(ask.digest)
        if self._is_full:
            raise unavailable(f"{ROWS_MAX:,} keys of the last day are stored, which is the bound")
        try:
            verdict = await self._store.claim(ask)
        except IdempotencyUnavailable:
            self._be_unsure(ask.digest)  # It may be claimed.
            raise
        match verdict:
            case Claim() as claim:
                return claim
            case Answer() as answer:
                self._replay(run, ask, answer)
            case Elsewhere(request_id):
                raise in_flight(request_id, "Another frontend runs it.")
            case Conflicting(request_id):
                raise _conflict(request_id)
            case Exhausted():
                raise _exhausted()
        return None

    def _replay(self, run: SharedRun, ask: Ask, answer: Answer) -> None:
        plain = answer.sealed and self._secrets.vault.open(answer.sealed, bound_to=ask.digest)
        if not plain:
            raise _answered(answer)
        for chunk in replay.streamed(pb.GenerateResponse.FromString(plain)):
            run.put(chunk)
        if not run.keeps:
            raise Overloaded(
                "Too many answers are being given again.",
                why="What they occupy together is bounded.",
                fix="Retry after the time given, with jitter.",
                retry_after_ms=RETRY_AFTER_MS,
            )
        log.request_replayed(
            request_id=answer.request_id, tenant_id=ask.tenant_id, attempt="answered"
        )
        run.begin(answer.request_id, is_replay=True)

    async def _carry_out(self, run: SharedRun, claim: Claim, ask: Ask, start: Start) -> None:
        run.request_id = claim.request_id
        try:
            # Until it runs it is not cancelled, but looks whether anybody is still there.
            events = await start(claim) if run.has_readers else None
        except BaseException:
            await self._note(claim, self._store.release(claim))
            raise
        if events is None or not run.has_readers:
            await self._note(claim, self._store.release(claim))
            raise asyncio.CancelledError
        run.begin(claim.request_id)
        try:
            last = await self._stream(run, events)
        except BaseException as error:
            run.may_be_abandoned = False
            await self._note(claim, self._end_of(run, claim, error))
            raise
        run.may_be_abandoned = False
        await self._keep(run, claim, last)
        if claim.attempt > 1:
            self._soon(self._pay_debts())
        run.put(last)

    def _end_of(self, run: SharedRun, claim: Claim, error: BaseException) -> Awaitable[None]:
        """How the store is told of an attempt that was cut short."""
        if isinstance(error, ServingError) and error.left_no_record:
            # A limit, or no room: its retry is the first attempt.
            return self._store.release(claim)
        # Another refusal before the first chunk charged nothing; of the rest we are not sure: a
        # settlement that failed may be found in the log.
        was_refused = isinstance(error, ServingError) and not isinstance(error, MeterUnavailable)
        return self._store.end(claim, owes=run.num_taken > 0 or not was_refused)

    async def _note(self, claim: Claim, noting: Awaitable[None]) -> None:
        """Tell the store of an end; if it does not answer, once it does."""
        try:
            await noting
        except IdempotencyUnavailable as error:
            self._be_unsure(claim.digest)
            log.refused(error, during="noting the end of an attempt")

    def _be_unsure(self, digest: bytes) -> None:
        self._unsure[digest] = None
        while len(self._unsure) > UNSURE_MAX:
            self._unsure.popitem(last=False)

    async def _stream(self, run: SharedRun, events: Answering) -> pb.GenerateChunk:
        """Hand on every chunk but the last, at the pace of the readers; the last one.

        Raises:
            asyncio.CancelledError: the last reader left.
        """
        async with aclosing(events):
            async for event in events:
                if isinstance(event, pb.GenerateResponse):
                    *chunks, last = replay.streamed(event)
                    for chunk in chunks:
                        run.put(chunk)
                    return last
                if event.HasField("done"):
                    last = pb.GenerateChunk()
                    last.CopyFrom(event)
                    return last
                run.put(event)
                await run.wanted()
        raise AssertionError("an answer ends with `done`")

    async def _keep(self, run: SharedRun, claim: Claim, last: pb.GenerateChunk) -> None:
        """Store the result, which is charged by now.

        Raises:
            IdempotencyUnavailable: it could not be stored; it waits here until it can be, and
                the key's next call gets it then.
        """
        sealed: bytes | None = None
        if self._keep_answers and run.keeps:
            plain = replay.whole([*run.whole(), last]).SerializeToString()
            if len(plain) <= ANSWER_BYTES_MAX:
                sealed = self._secrets.vault.seal(plain, bound_to=claim.digest)
        usage = convert.usage_from_wire(last.done.usage)
        answer = Answer(request_id=claim.request_id, usage=usage, sealed=sealed)
        self._late[claim.digest] = (claim, answer)
        while len(self._late) > LATE_MAX:
            # It will be run again, and its charge given back.
            self._be_unsure(self._late.popitem(last=False)[0])
        try:
            await self._store_late(claim.digest)
        except IdempotencyUnavailable as error:
            raise IdempotencyUnavailable(
                "The answer is whole and charged, but could not be stored for replays.",
                why=error.what,
                fix="Retry under the same key: you get this answer, and are not charged again.",
                retry_after_ms=RETRY_AFTER_MS,
            ) from error

    async def _store_late(self, digest: bytes) -> None:
        """Store an answer that waits for it, if it still does."""
        if waiting := self._late.get(digest):
            expires_unix_ms = self._clock.unix_ms() + self._keep_ms
            await self._store.finish(*waiting, expires_unix_ms=expires_unix_ms)
            self._late.pop(digest, None)

    async def _pay_debts(self) -> None:
        """Give back what replaced attempts were charged. What cannot be now stays owed."""
        if self._give_back is None:
            return
        for debt in await self._store.debts():
            try:
                done = [
                    await self._give_back(
                        tenant_id=debt.tenant_id,
                        request_id=request_id,
                        reason=GIVE_BACK_REASON,
                        opened_under=debt.digest,
                    )
                    for request_id in debt.request_ids
                ]
            except ServingError as error:
                log.refused(error, during="giving back")
                return
            if GivenBack.LATER not in done:
                await self._store.settled(debt)


def _conflict(request_id: str) -> IdempotencyConflict:
    return IdempotencyConflict(
        "This idempotency key came with another request before.",
        why=f"A key stands for one request; this one's was {request_id!r}.",
        fix="Send a fresh key with a changed request, or the request as it was.",
    )


def _answered(answer: Answer) -> AlreadyServed:
    usage = answer.usage
    return AlreadyServed(
        f"This idempotency key was answered as request {answer.request_id!r}: "
        f"{usage.prompt_tokens} prompt tokens, {usage.cached_tokens} of them cached, and "
        f"{usage.completion_tokens} completion tokens.",
        why="The answer itself is not kept, and running it again would charge it twice.",
        fix="Send a fresh key to run it again.",
    )


def _exhausted() -> AlreadyServed:
    return AlreadyServed(
        f"This idempotency key was run {ATTEMPTS_MAX} times without a whole answer.",
        why="Each attempt is remembered until its charge is given back; so many are kept.",
        fix="Send a fresh key, and see with `headrace usage` how the attempts ended.",
    )
