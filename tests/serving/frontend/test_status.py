"""Errors on the wire."""

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code as RpcCode
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RetryInfo

from headrace.serving.errors import InvalidRequest, Overloaded, QuotaExceeded, ServingError
from headrace.serving.frontend.status import status_of


def every_error() -> list[type[ServingError]]:
    found = [ServingError]
    for kind in found:
        found.extend(kind.__subclasses__())
    # Errors of the command line are not part of the public tree.
    return [kind for kind in found if kind.__module__ == ServingError.__module__]


def detail(error: ServingError, kind: type[Message]) -> Message | None:
    for packed in status_of(error).details:
        message = kind()
        if packed.Unpack(message):
            return message
    return None


@pytest.mark.parametrize("kind", every_error())
def test_every_error_has_a_status(kind: type[ServingError]) -> None:
    """A new error class cannot be forgotten here: the list is the class tree."""
    error = kind("What.", why="Why.", fix="Fix.")
    status = status_of(error)
    info = detail(error, ErrorInfo)

    assert status.code == RpcCode.Value(grpc.StatusCode[kind.code].name)
    assert status.message == "What."
    assert isinstance(info, ErrorInfo)
    assert (info.reason, info.domain) == (kind.reason, "headrace")
    assert dict(info.metadata) == {"why": "Why.", "fix": "Fix."}


def test_a_bad_field_is_named() -> None:
    error = InvalidRequest("n is 99.", why="w", fix="f", field="n")
    violations = detail(error, BadRequest)

    assert isinstance(violations, BadRequest)
    assert [(v.field, v.description) for v in violations.field_violations] == [("n", "n is 99.")]


def test_an_overloaded_server_says_when_to_return() -> None:
    retry = detail(Overloaded("Full.", why="w", fix="f", retry_after_ms=1_500), RetryInfo)

    assert isinstance(retry, RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 1_500


def test_a_long_sentence_does_not_burst_the_trailers() -> None:
    """Trailers travel as headers, which proxies cap at a few KiB; a schema error can be longer."""
    status = status_of(InvalidRequest("x" * 50_000, why="y" * 50_000, fix="z", field="n"))

    assert len(status.SerializeToString()) < 6_000


def test_a_limit_of_the_callers_says_which_and_whose():
    error = QuotaExceeded(
        "The request needs 1 of the limit of 60 requests a minute.",
        why="It is the limit of key:k1.",
        fix="Wait.",
        metric="requests_per_min",
        limit=60,
        subject="key:k1",
        retry_after_ms=1_000,
    )

    info, failure = detail(error, ErrorInfo), detail(error, QuotaFailure)
    assert isinstance(info, ErrorInfo)
    assert isinstance(failure, QuotaFailure)
    names = ("quota_metric", "quota_limit_value", "quota_subject")
    assert [info.metadata[name] for name in names] == ["requests_per_min", "60", "key:k1"]
    (violation,) = failure.violations
    assert (violation.subject, violation.description) == ("key:k1", error.what)
    assert detail(Overloaded("x", why="x", fix="x"), QuotaFailure) is None
