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
from headrace.serving.admission.operator_token import OperatorTokens
from headrace.serving.admission.permit import check_address, check_method
from headrace.serving.domain.permission import METHODS
from headrace.serving.domain.principal import Principal
from headrace.serving.domain.record import Caller
from headrace.serving.errors import (
    InvalidRequest,
    PermissionDenied,
    ServingError,
    Unauthenticated,
)
from headrace.serving.frontend.peer import Peers
from headrace.serving.frontend.status import abort_as_defect, abort_with
from headrace.serving.observe import Metrics

PACKAGE_PREFIX = "/headrace.v1."

_KEY = "authorization"
_SCHEME = "bearer "
_API_KEY = "hr_"

_caller: ContextVar[Caller] = ContextVar("caller")
_principal: ContextVar[Principal] = ContextVar("principal")

Behaviour = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


def caller() -> Caller:
    """Who makes the call of the data plane that the current task handles."""
    return _caller.get()


def principal() -> Principal:
    """Who makes the administrative call that the current task handles."""
    return _principal.get()


class Edge(grpc.aio.ServerInterceptor):
    """Guards the methods of our services; health and reflection are open.

    A method in `domain.permission.METHODS` is administrative: an operator's token or a key whose
    scope has it opens it, and its permission is asked for in the organisation that the request
    names. Every other method of ours takes a key whose scope has it.
    """

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        tokens: OperatorTokens,
        peers: Peers,
        metrics: Metrics,
    ) -> None:
        self._authenticator = authenticator
        self._tokens = tokens
        self._peers = peers
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
        if handler is None or not handler_call_details.method.startswith(PACKAGE_PREFIX):
            return handler
        method = handler_call_details.method.removeprefix(PACKAGE_PREFIX)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded(method, handler.unary_stream, handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        if handler.stream_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                self._guarded(method, handler.stream_unary, handler.request_deserializer),
                response_serializer=handler.response_serializer,
            )
        assert handler.unary_unary is not None, "no service of ours streams in both directions"
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(method, handler.unary_unary, handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: str, behaviour: Any, parse: Any) -> Any:
        admit = self._admit_principal if method in METHODS else self._admit_caller

        # Without a deserializer grpc hands over the bytes. It would answer bytes that are no
        # message with UNKNOWN and our class names, and log a traceback for each.
        async def guarded(raw: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                return await behaviour(admit(method, raw, parse, context), context)
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

    def _admit_caller(
        self, method: str, raw: Any, parse: Any, context: grpc.aio.ServicerContext
    ) -> Any:
        try:
            _caller.set(self._caller_of(_presented(context), method, context))
        except ServingError as error:
            log.request_refused(reason=error.reason)
            raise
        return _parsed(raw, parse) if isinstance(raw, bytes) else _each_parsed(raw, parse)

    def _admit_principal(
        self, method: str, raw: bytes, parse: Any, context: grpc.aio.ServicerContext
    ) -> Message:
        try:
            presented = _presented(context)
            if presented.startswith(_API_KEY):
                by = Principal.of_key(self._caller_of(presented, method, context))
            else:
                by = self._tokens.verify(presented)
            message = _parsed(raw, parse)
            authorise(by, method, message)
        except ServingError as error:
            log.request_refused(reason=error.reason)
            raise
        _principal.set(by)
        return message

    def _caller_of(self, key: str, method: str, context: grpc.aio.ServicerContext) -> Caller:
        """Whose key it is, once it is in force, used from where it may be, and for its methods."""
        found = self._authenticator.authenticate(key)
        if found.scope.addresses:
            check_address(found, self._peers.address(context))
        check_method(found, method)
        return found


def authorise(by: Principal, method: str, message: Any) -> None:
    """Whether `by` may call the administrative method in the organisation that it names.

    Where the message names none and all of the caller's roles are in one, that one is meant, and is
    written into the message: from here on an empty `tenant_id` is the platform as a whole.

    Raises:
        PermissionDenied: no role of theirs allows it there.
    """
    tenant_id: str | None = None
    if "tenant_id" in message.DESCRIPTOR.fields_by_name:
        message.tenant_id = message.tenant_id or by.only_tenant_id or ""
        tenant_id = message.tenant_id or None
    needed = METHODS[method]
    if needed is not None and not by.may(needed, tenant_id):
        where = f"in the organisation {tenant_id[:60]!r}" if tenant_id else "on the platform"
        raise PermissionDenied(
            f"{by.actor} may not call {method} {where}.",
            why=f"It needs the permission {needed}, which no role of theirs gives there.",
            fix="See what the caller may do with WhoAmI; roles are configured under `operators`.",
        )


def _presented(context: grpc.aio.ServicerContext) -> str:
    """The key or token of the call, without its scheme.

    Raises:
        Unauthenticated: there is none.
    """
    presented = ""
    for key, value in context.invocation_metadata() or ():
        if key == _KEY and isinstance(value, str):
            presented = value
    if presented[: len(_SCHEME)].lower() != _SCHEME:
        raise Unauthenticated(
            "The call carries no key.",
            why="Every call needs metadata `authorization: Bearer hr_…`.",
            fix="Add it; `headrace keys demo` shows the demo key.",
        )
    return presented[len(_SCHEME) :].strip()


async def _each_parsed(
    raw: AsyncIterator[bytes], parse: Callable[[bytes], Message]
) -> AsyncIterator[Message]:
    async for each in raw:
        yield _parsed(each, parse)


def _parsed(raw: bytes, parse: Callable[[bytes], Message]) -> Message:
    try:
        return parse(raw)
    except DecodeError as error:
        raise InvalidRequest(
            "The message cannot be read.",
            why="Its bytes are not what the service's proto describes, or a string is not UTF-8.",
            fix="Generate the client from protos/headrace/v1.",
        ) from error
