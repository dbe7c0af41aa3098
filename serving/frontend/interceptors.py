"""What every public call passes: authentication, error mapping, and the last line for defects."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from headrace.serving import log
from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.domain.record import Caller
from headrace.serving.errors import InvalidRequest, ServingError, Unauthenticated
from headrace.serving.frontend.status import abort_as_defect, abort_with
from headrace.serving.observe import Metrics

SERVICE_PREFIX = "/headrace.v1."

_KEY = "authorization"
_SCHEME = "bearer "

_caller: ContextVar[Caller] = ContextVar("caller")

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


def caller() -> Caller:
    """Who makes the call that the current task handles."""
    return _caller.get()


class Edge(grpc.aio.ServerInterceptor):
    """Guards the methods of our own services; health and reflection are open."""

    def __init__(self, *, authenticator: Authenticator, metrics: Metrics) -> None:
        self._authenticator = authenticator
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler = await continuation(handler_call_details)
        # grpc answers an unknown method by itself when there is no handler.
        if handler is None or not handler_call_details.method.startswith(SERVICE_PREFIX):
            return handler
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded(handler.unary_stream, handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                self._guarded(handler.stream_unary, handler.request_deserializer, _each_parsed),
                response_serializer=handler.response_serializer,
            )
        assert handler.unary_unary is not None, "no service streams in both directions"
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(handler.unary_unary, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, behaviour: Any, parse: Any, parsed: Any = None) -> Any:
        # Without a deserializer grpc hands over the bytes. It would answer bytes that are no
        # message with UNKNOWN and our class names, and log a traceback for each.
        read = parsed or _parsed

        async def guarded(raw: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                _caller.set(self._authenticate(context))
                return await behaviour(read(raw, parse), context)
            except ServingError as error:
                self._metrics.rejected(error.reason)
                await abort_with(context, error)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                raise
            except Exception as error:
                # The root of a call's task: a defect of ours is logged here, and only here.
                log.crashed(during="serving a call", error=error)
                await abort_as_defect(context)

        return guarded

    def _authenticate(self, context: grpc.aio.ServicerContext) -> Caller:
        presented = ""
        for key, value in context.invocation_metadata() or ():
            if key == _KEY and isinstance(value, str):
                presented = value
        if presented[: len(_SCHEME)].lower() != _SCHEME:
            error = Unauthenticated(
                "The call carries no key.",
                why="Every call needs metadata `authorization: Bearer hr_…`.",
                fix="Add it; `headrace keys demo` shows the demo key.",
            )
            log.request_refused(reason=error.reason)
            raise error
        try:
            return self._authenticator.authenticate(presented[len(_SCHEME) :].strip())
        except Unauthenticated as error:
            log.request_refused(reason=error.reason)
            raise


def _parsed(raw: bytes, parse: Callable[[bytes], Message]) -> Message:
    try:
        return parse(raw)
    except DecodeError as error:
        raise InvalidRequest(
            "The message cannot be read.",
            why="Its bytes are not what our protos describe, or a string is not UTF-8.",
            fix="Generate the client from protos/headrace/v1/.",
        ) from error


async def _each_parsed(
    raw: AsyncIterator[bytes], parse: Callable[[bytes], Message]
) -> AsyncIterator[Message]:
    async for each in raw:
        yield _parsed(each, parse)
