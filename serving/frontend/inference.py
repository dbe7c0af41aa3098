"""The Inference service: parse, delegate, render."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing, asynccontextmanager

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
from headrace.serving.errors import (
    DeadlineExceeded,
    Draining,
    LimitExceeded,
    Overloaded,
    ServingError,
    UnknownUnit,
)
from headrace.serving.frontend import convert, rules
from headrace.serving.frontend.convert import Acceptance, ChunkWriter
from headrace.serving.frontend.interceptors import caller
from headrace.serving.frontend.model_shelf import ModelShelf
from headrace.serving.frontend.quota_metadata import quota_metadata
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


class Gate:
    """How many answers are open, and whether another may begin. Owned by the event loop."""

    def __init__(self, streams_max: int) -> None:
        self._streams_max = streams_max
        self.is_draining = False
        self.num_open = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def enter(self) -> None:
        """Take a place.

        Raises:
            Draining: this frontend is shutting down.
            Overloaded: all places are taken.
        """
        if self.is_draining:
            raise Draining(
                "This frontend is shutting down.",
                why="It finishes the answers it has and takes no new ones.",
                fix="Connect again: another frontend, or its successor, takes the request.",
                retry_after_ms=RETRY_AFTER_MS,
            )
        if self.num_open >= self._streams_max:
            raise Overloaded(
                f"{self.num_open} answers are open on this frontend.",
                why="That is its bound.",
                fix="Retry after the time given, with jitter.",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self.num_open += 1
        self._is_empty.clear()

    def leave(self) -> None:
        self.num_open -= 1
        if not self.num_open:
            self._is_empty.set()

    async def wait_empty(self) -> None:
        await self._is_empty.wait()


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """See inference.proto for what each method promises."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        quota: Quota,
        fleet: ReplicaFleet,
        shelf: ModelShelf,
        authenticator: Authenticator,
        price_for: Callable[[str, Tier], Price],
        tiers: TierDesk,
        executor: Executor,
        gate: Gate,
        metrics: Metrics,
        tracer: Tracer,
        clock: Clock,
    ) -> None:
        self._pipeline = pipeline
        self._quota = quota
        self._fleet = fleet
        self._shelf = shelf
        self._authenticator = authenticator
        self._price_for = price_for
        self._tiers = tiers
        self._executor = executor
        self._gate = gate
        self._metrics = metrics
        self._tracer = tracer
        self._clock = clock

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        accepted = await self._accept(request, context)
        try:
            with self._metrics.stream():
                writer = ChunkWriter(accepted.request_id)
                span = self._start_span(accepted, request, context, stream=True)
                async with (
                    self._telling_limits(accepted, context) as tell,
                    aclosing(self._pipeline.generate(accepted, span=span)) as events,
                ):
                    async for event in events:
                        await tell()
                        if isinstance(event, generate.Settled):
                            await context.write(writer.done(event))
                        else:
                            await context.write(writer.chunk(event))
        finally:
            self._gate.leave()

    async def GenerateUnary(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateResponse:
        accepted = await self._accept(request, context)
        try:
            with self._metrics.stream():
                span = self._start_span(accepted, request, context, stream=False)
                async with self._telling_limits(accepted, context) as tell:
                    chunks, settled = await self._pipeline.answer(accepted, span=span)
                    await tell()
            return convert.response_to_wire(accepted.request_id, accepted.n, chunks, settled)
        finally:
            self._gate.leave()

    async def CountTokens(
        self, request: pb.CountTokensRequest, context: grpc.aio.ServicerContext
    ) -> pb.CountTokensResponse:
        rules.check_model_name(request.model)
        check_model(caller(), request.model)
        rules.check_input(request)
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

    async def _accept(
        self, message: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> generate.Generate:
        """Everything before the pipeline; the caller leaves the gate after it returned.

        A request that ends here leaves a record all the same: it had a tenant.
        """
        by, came_ms = caller(), self._clock.monotonic_ms()
        try:
            self._gate.enter()
            try:
                return await self._prepare(message, by, context)
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

    def _shown_price(self, model: str, tier: Tier) -> Price:
        """For the record of a refusal, which charges nothing: no rates where the book has none."""
        try:
            return self._price_for(model, tier)
        except UnknownUnit:
            return Price(version="", rates={})

    async def _prepare(
        self, message: pb.GenerateRequest, by: Caller, context: grpc.aio.ServicerContext
    ) -> generate.Generate:
        now_ms, now_unix_ms = self._clock.monotonic_ms(), self._clock.unix_ms()
        deadline_ms = self._deadline_ms(context, now_ms)
        rules.check_request(message)
        check_model(by, message.model)
        tier = convert.tier_from_wire(message.tier, by)
        check_tier(by, tier)
        served = await self._fleet.find(message.model, deadline_ms=deadline_ms)
        acceptance = Acceptance(
            caller=by,
            request_id=message.request_id or uuid.uuid4().hex,
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

    @asynccontextmanager
    async def _telling_limits(
        self, accepted: generate.Generate, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Gives a function that sends the caller's limits as initial metadata, once.

        To be called before the first chunk; the refusal of a limit sends them by itself.
        """
        was_told = False

        async def tell() -> None:
            nonlocal was_told
            if not was_told:
                was_told = True
                pairs = quota_metadata(
                    self._quota, accepted.caller, accepted.model, accepted.price.currency
                )
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


def _ending_of_leaver(context: grpc.aio.ServicerContext) -> Outcome:
    """How a call ended whose caller went before it was accepted."""
    left_s = context.time_remaining()
    deadline_ms = None if left_s is None else left_s * 1000
    return Outcome.DEADLINE if is_late(deadline_ms, now_ms=0) else Outcome.CANCELLED
