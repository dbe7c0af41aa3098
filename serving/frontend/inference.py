"""The Inference service: parse, delegate, render."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import grpc.aio

from headrace.serving import log
from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.admission.permit import check_model, check_tier
from headrace.serving.admission.quota import Quota
from headrace.serving.admission.tiers import TierDesk
from headrace.serving.channel.fleet import ReplicaFleet
from headrace.serving.clock import Clock
from headrace.serving.domain import generate
from headrace.serving.domain.record import Caller
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Outcome, Price
from headrace.serving.domain.verdict import Measured
from headrace.serving.endings import Refusal, outcome_of
from headrace.serving.engine import structured
from headrace.serving.errors import DeadlineExceeded, LimitExceeded, ServingError, UnknownUnit
from headrace.serving.frontend import convert, replay, rules
from headrace.serving.frontend.convert import Acceptance, ChunkWriter
from headrace.serving.frontend.gate import Gate
from headrace.serving.frontend.idempotency import REPLAYED, Answering, Idempotency
from headrace.serving.frontend.idempotency_key import has_key, key_of
from headrace.serving.frontend.interceptors import caller
from headrace.serving.frontend.model_shelf import ModelShelf
from headrace.serving.frontend.quota_metadata import quota_metadata
from headrace.serving.frontend.shared_run import Reader
from headrace.serving.idempotency.claims import Claim
from headrace.serving.observe import Metrics
from headrace.serving.pipeline import Pipeline
from headrace.serving.receipts import receipt_of
from headrace.serving.request_run import is_late
from headrace.serving.tracing import Span, SpanStart, Tracer
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc

INLINE_CHARS_MAX = 8 << 10
"""Tokenising this much takes about 3 ms; more would make other streams wait."""

RETRY_AFTER_MS = 1_000

TRACE_KEYS = ("traceparent", "tracestate")
"""What a tracer sees of a call's metadata: never the key."""


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """See inference.proto for what each method promises."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        fleet: ReplicaFleet,
        shelf: ModelShelf,
        authenticator: Authenticator,
        price_for: Callable[[str, Tier], Price],
        tiers: TierDesk,
        quota: Quota,
        executor: Executor,
        gate: Gate,
        idempotency: Idempotency,
        metrics: Metrics,
        tracer: Tracer,
        clock: Clock,
    ) -> None:
        self._pipeline = pipeline
        self._fleet = fleet
        self._shelf = shelf
        self._authenticator = authenticator
        self._price_for = price_for
        self._tiers = tiers
        self._quota = quota
        self._executor = executor
        self._gate = gate
        self._idempotency = idempotency
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        if has_key(context.invocation_metadata()):
            await self._generate_once(request, context)
            return
        accepted = await self._accept(request, context)
        try:
            with self._metrics.stream():
                async with (
                    self._telling_limits(accepted.caller, request, context) as tell,
                    aclosing(self._streamed(accepted, request, context)) as messages,
                ):
                    async for message in messages:
                        await tell()
                        await context.write(message)
        finally:
            self._gate.leave()

    async def GenerateUnary(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        if has_key(context.invocation_metadata()):
            return await self._answer_once(request, context)
        accepted = await self._accept(request, context)
        try:
            with self._metrics.stream():
                span = self._start_span(accepted, request, context, stream=False)
                async with self._telling_limits(accepted.caller, request, context) as tell:
                    chunks, settled = await self._pipeline.answer(accepted, span=span)
                    await tell()
            return convert.response_to_wire(accepted.request_id, accepted.n, chunks, settled)
        finally:
            self._gate.leave()

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> pb.CountTokensResponse:
        rules.check_model_name(request.model)
        rules.check_input(request)
        check_model(caller(), request.model)
        deadline_ms = self._deadline_ms(context, self._clock.monotonic_ms())
        served = await self._fleet.find(request.model, deadline_ms=deadline_ms)
        model = await self._shelf.get(served.newest)
        ids = await self._off_loop(
            convert.text_chars(request), lambda: convert.prompt_ids(request, model)
        )
        return pb.CountTokensResponse(tokens=len(ids))

    async def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListModelsResponse:
        scope = caller().scope
        models = [
            convert.model_to_wire(served, self._price_for(served.name, Tier.STANDARD))
            for served in self._fleet.models()
            if scope.allows_model(served.name)
        ]
        return pb.ListModelsResponse(models=models)

    async def GetModel(
        self, request: pb.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> pb.Model:
        rules.check_model_name(request.model)
        check_model(caller(), request.model)
        deadline_ms = self._deadline_ms(context, self._clock.monotonic_ms())
        served = await self._fleet.find(request.model, deadline_ms=deadline_ms)
        return convert.model_to_wire(served, self._price_for(served.name, Tier.STANDARD))

    async def prepare(
        self,
        message: pb.GenerateRequest,
        by: Caller,
        *,
        request_id: str,
        deadline_ms: float | None,
        tier: Tier,
    ) -> generate.Generate:
        """What the pipeline runs for `message`, whoever brings it: checked, tokenised, priced.

        Args:
            message: its own request_id is left out of account.
            by: who is charged.
            request_id: unique within the tenant.
            deadline_ms: on our monotonic clock.
            tier: of the price and of the place in every queue.

        Raises:
            InvalidRequest, PermissionDenied, ModelNotFound, Overloaded, DeadlineExceeded,
                EngineFault: it cannot be run, or not now.
        """
        now_ms, now_unix_ms = self._clock.monotonic_ms(), self._clock.unix_ms()
        rules.check_request(message)
        check_model(by, message.model)
        check_tier(by, tier)
        served = await self._fleet.find(message.model, deadline_ms=deadline_ms)
        acceptance = Acceptance(
            caller=by,
            request_id=request_id,
            price=self._price_for(message.model, tier),
            terms=self._tiers.terms(by.tenant_id, model=message.model, tier=tier),
            cache_salt=self._authenticator.cache_salt(by.tenant_id),
            accepted_unix_ms=now_unix_ms,
            accepted_ms=now_ms,
            deadline_ms=deadline_ms,
        )
        model = await self._shelf.get(served.newest)
        grammar = convert.grammar_of(message)
        if grammar is not None:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._executor, structured.validate, grammar)
        ids = await self._off_loop(
            convert.text_chars(message), lambda: convert.prompt_ids(message, model)
        )
        return convert.generate_from_wire(
            message, ids=ids, model=model, served=served, acceptance=acceptance
        )

    async def _accept(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> generate.Generate:
        """Everything before the pipeline; the caller leaves the gate after it returned."""
        by = caller()
        async with self._entered(message, by, context):
            return await self.prepare(
                message,
                by,
                request_id=_checked_id(message) or uuid.uuid4().hex,
                deadline_ms=self._deadline_ms(context, self._clock.monotonic_ms()),
                tier=convert.tier_from_wire(message.tier, by),
            )

    @asynccontextmanager
    async def _entered(
        self, message: pb.GenerateRequest, by: Caller, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[None]:
        """The gate, which the caller leaves unless this block raises.

        A request that ends in this block leaves a record all the same: it had a tenant.
        """
        came_ms = self._clock.monotonic_ms()
        try:
            self._gate.enter()
            try:
                yield
            except BaseException:
                self._gate.leave()
                raise
        except (ServingError, asyncio.CancelledError) as error:
            is_cancelled = isinstance(error, asyncio.CancelledError)
            valid_id = rules.valid_request_id(message.request_id)
            ending = _ending_of_leaver(context) if is_cancelled else outcome_of(error)
            model, tier = message.model, convert.tier_from_wire(message.tier, by)
            refusal = Refusal(
                caller=by,
                request_id=message.request_id if valid_id else "",
                model=model[: rules.MODEL_CHARS_MAX],
                price=self._shown_price(model, tier),
                ending=ending,
                tier=tier,
                receipt=receipt_of(
                    self._tiers.terms(by.tenant_id, model=model, tier=tier),
                    Measured(elapsed_us=round((self._clock.monotonic_ms() - came_ms) * 1000)),
                    ending,
                    None if isinstance(error, asyncio.CancelledError) else error,
                ),
            )
            if not is_cancelled:
                log.request_refused(
                    reason=error.reason,
                    request_id=refusal.request_id or None,
                    tenant_id=by.tenant_id,
                )
            await self._pipeline.refuse(refusal)
            raise

    async def _generate_once(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Generate under an idempotency key."""
        reader = await self._join(message, context, stream=True)
        also = REPLAYED if reader.is_replay else ()
        try:
            with self._metrics.stream(), reader:
                async with self._telling_limits(caller(), message, context, also) as tell:
                    async for chunk in reader:
                        await tell()
                        await context.write(chunk)
        finally:
            self._gate.leave()

    async def _answer_once(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        """GenerateUnary under an idempotency key."""
        reader = await self._join(message, context, stream=False)
        also = REPLAYED if reader.is_replay else ()
        try:
            with self._metrics.stream(), reader:
                async with self._telling_limits(caller(), message, context, also) as tell:
                    chunks = [chunk async for chunk in reader]
                    await tell()
                return replay.whole(chunks)
        finally:
            self._gate.leave()

    async def _join(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext, *, stream: bool
    ) -> Reader:
        """Run the call's request, or attach to what its key stands for; then leave the gate."""
        by = caller()
        async with self._entered(message, by, context):
            key = key_of(context.invocation_metadata())
            _checked_id(message)
            rules.check_request(message)
            tier = convert.tier_from_wire(message.tier, by)
            # Before it is known whether anything runs: an answer is not for who may not ask.
            check_model(by, message.model)
            check_tier(by, tier)
            deadline_ms = self._deadline_ms(context, self._clock.monotonic_ms())

            async def start(claim: Claim) -> Answering:
                accepted = await self.prepare(
                    message,
                    by,
                    request_id=claim.request_id,
                    deadline_ms=deadline_ms,
                    tier=tier,
                )
                # Each caller has a deadline of its own, at which it leaves.
                shared = replace(accepted, deadline_ms=None, idempotency_digest=claim.digest)
                answer = self._streamed if stream else self._at_once
                return answer(shared, message, context)

            return await self._idempotency.join(message, key=key, by=by, start=start)

    async def _streamed(
        self,
        accepted: generate.Generate,
        message: pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
    ) -> AsyncGenerator[pb.GenerateChunk]:
        """The messages of an answer, each valid until the next."""
        writer = ChunkWriter(accepted.request_id)
        span = self._start_span(accepted, message, context, stream=True)
        async with aclosing(self._pipeline.generate(accepted, span=span)) as events:
            async for event in events:
                is_last = isinstance(event, generate.Settled)
                yield writer.done(event) if is_last else writer.chunk(event)

    async def _at_once(
        self,
        accepted: generate.Generate,
        message: pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """The one message of an answer: nothing is delivered, or charged, before it is whole."""
        span = self._start_span(accepted, message, context, stream=False)
        chunks, settled = await self._pipeline.answer(accepted, span=span)
        yield convert.response_to_wire(accepted.request_id, accepted.n, chunks, settled)

    def _shown_price(self, model: str, tier: Tier) -> Price:
        """For the record of a refusal, which charges nothing: no rates where the book has none."""
        try:
            return self._price_for(model, tier)
        except UnknownUnit:
            return Price(version="", rates={})

    @asynccontextmanager
    async def _telling_limits(
        self,
        by: Caller,
        message: pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
        also: Sequence[tuple[str, str]] = (),
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Gives a function that sends the caller's limits, and `also`, as initial metadata, once.

        To be called before the first chunk; the refusal of a limit sends them by itself.
        """
        was_told = False

        async def tell() -> None:
            nonlocal was_told
            if not was_told:
                was_told = True
                tier = convert.tier_from_wire(message.tier, by)
                currency = self._shown_price(message.model, tier).currency
                pairs = (*quota_metadata(self._quota, by, message.model, currency), *also)
                if pairs:
                    await context.send_initial_metadata(pairs)

        try:
            yield tell
        except LimitExceeded:
            await tell()
            raise

    def _start_span(
        self,
        accepted: generate.Generate,
        message: pb.GenerateRequest,
        context: grpc.aio.ServicerContext,
        *,
        stream: bool,
    ) -> Span:
        sampling = accepted.sampling
        start = SpanStart(
            model=accepted.model,
            request_id=accepted.request_id,
            tenant_id=accepted.caller.tenant_id,
            operation="chat" if message.WhichOneof("input") == "chat" else "text_completion",
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            choices=accepted.n,
            stream=stream,
        )
        metadata = {
            key: value
            for key, value in context.invocation_metadata() or ()
            if key in TRACE_KEYS and isinstance(value, str)
        }
        return self._tracer.start(start, metadata)

    async def _off_loop(self, chars: int, work: Callable[[], Sequence[int]]) -> Sequence[int]:
        """Short text is tokenised at once; long text in a thread, which costs a hand-over."""
        if chars <= INLINE_CHARS_MAX:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _deadline_ms(self, context: grpc.aio.ServicerContext, now_ms: float) -> float | None:
        left_s = context.time_remaining()
        if left_s is None:
            return None
        if left_s <= 0:
            raise DeadlineExceeded(
                "The deadline had passed before the request was read.",
                why="It waited in a queue, or was sent with too little time.",
                fix="Allow more time.",
            )
        return now_ms + left_s * 1000


def _checked_id(message: pb.GenerateRequest) -> str:
    """The caller's request_id, if it is not one of a batch: those name lines that we run."""
    if rules.is_of_batch(message.request_id):
        raise rules.refused(
            "request_id",
            f"The request_id {message.request_id!r} is that of a batch's line.",
            why="Ids of the form batch_….line are given to the lines of batches.",
            fix="Send a UUID, or leave it empty and the server chooses one.",
        )
    return message.request_id


def _ending_of_leaver(context: grpc.aio.ServicerContext) -> Outcome:
    """How a call ended whose caller went before it was accepted."""
    left_s = context.time_remaining()
    deadline_ms = None if left_s is None else left_s * 1000
    return Outcome.DEADLINE if is_late(deadline_ms, now_ms=0) else Outcome.CANCELLED
