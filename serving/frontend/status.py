"""How a ServingError looks on the wire: google.rpc.Status with details."""

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code as RpcCode
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from headrace.serving.errors import Code, LimitExceeded, ServingError

DOMAIN = "headrace"
DETAILS_KEY = "grpc-status-details-bin"

TEXT_CHARS_MAX = 1000
"""Of each sentence: trailers travel in headers, and some proxies take 8 KiB of those."""

INTERNAL_TEXT = "An internal error ended the request. It was logged; nothing was charged."


def status_of(error: ServingError) -> Status:
    """ErrorInfo always, and what fits: BadRequest, QuotaFailure, RetryInfo if waiting can help."""
    info = ErrorInfo(reason=error.reason, domain=DOMAIN)
    info.metadata["why"] = error.why[:TEXT_CHARS_MAX]
    info.metadata["fix"] = error.fix[:TEXT_CHARS_MAX]
    details: list[Message] = [info]
    if error.field is not None and error.code is Code.INVALID_ARGUMENT:
        violation = BadRequest.FieldViolation(
            field=error.field, description=error.what[:TEXT_CHARS_MAX], reason=error.reason
        )
        details.append(BadRequest(field_violations=[violation]))
    if isinstance(error, LimitExceeded) and error.metric:
        info.metadata["quota_metric"] = error.metric
        info.metadata["quota_limit_value"] = str(error.limit)
        info.metadata["quota_subject"] = error.subject
        exceeded = QuotaFailure.Violation(
            subject=error.subject, description=error.what[:TEXT_CHARS_MAX]
        )
        details.append(QuotaFailure(violations=[exceeded]))
    if error.retry_after_ms is not None:
        retry = RetryInfo()
        retry.retry_delay.FromMilliseconds(error.retry_after_ms)
        details.append(retry)
    return Status(
        code=RpcCode.Value(error.code),
        message=error.what[:TEXT_CHARS_MAX],
        details=[_pack(detail) for detail in details],
    )


async def abort_with(context: grpc.aio.ServicerContext, error: ServingError) -> None:
    """End the call with the error. Raises grpc's AbortError, which grpc itself expects."""
    status = status_of(error)
    await context.abort(
        grpc.StatusCode[error.code],
        status.message,
        trailing_metadata=((DETAILS_KEY, status.SerializeToString()),),
    )


async def abort_as_defect(context: grpc.aio.ServicerContext) -> None:
    """End the call with INTERNAL and nothing that would show our inside."""
    await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_TEXT)


def _pack(message: Message) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
