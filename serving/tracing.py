"""Traces of requests, behind a switch: one span each, in OpenTelemetry's `gen_ai` names.

Off, which is the default, a request costs two empty method calls and nothing is imported. Traces
are telemetry: sampled, droppable, never the record of what is charged. Prompts and answers are
not recorded.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from headrace.serving.config import TelemetryConfig
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import ConfigRefused, ServingError


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanStart:
    """What is known of a request before it runs."""

    model: str
    request_id: str
    tenant_id: str
    operation: str = "chat"
    """`chat` for messages, `text_completion` for a bare prompt."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    choices: int = 1
    stream: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanEnd:
    """What is known of it afterwards."""

    outcome: Outcome
    usage: Usage
    finish_reasons: Sequence[str] = ()
    """One for each choice."""
    version: str = ""
    """The artifact that answered."""
    replicas_tried: int = 1
    error: ServingError | None = None


class Span(Protocol):
    """One request's span. Ended exactly once."""

    def first_token(self, ttft_s: float) -> None: ...

    def end(self, result: SpanEnd) -> None: ...


class Tracer(Protocol):
    def start(self, start: SpanStart, metadata: Mapping[str, str]) -> Span:
        """Begin a span under the caller's `traceparent`, if the metadata of the call has one."""
        ...

    def close(self) -> None:
        """Send what is buffered. Blocks for a few seconds at most."""
        ...


class _OffSpan:
    def first_token(self, ttft_s: float) -> None:
        pass

    def end(self, result: SpanEnd) -> None:
        pass


class _OffTracer:
    _span = _OffSpan()

    def start(self, start: SpanStart, metadata: Mapping[str, str]) -> Span:
        return self._span

    def close(self) -> None:
        pass


OFF: Tracer = _OffTracer()


def tracer(telemetry: TelemetryConfig, *, version: str) -> Tracer:
    """The tracer that the configuration asks for; `OFF` when it names no endpoint.

    Raises:
        ConfigRefused: it names one, and OpenTelemetry is not installed.
    """
    if telemetry.otlp_endpoint is None:
        return OFF
    try:
        home = importlib.import_module("headrace.serving.tracing_otel")
    except ImportError as error:
        raise ConfigRefused(
            f"Traces are switched on ({telemetry.otlp_endpoint}); {error.name} is not installed.",
            why="OpenTelemetry is an optional part of Headrace.",
            fix="Install it with `pip install 'headrace[otel]'`, or unset telemetry.otlp_endpoint "
            "and OTEL_EXPORTER_OTLP_ENDPOINT.",
            field="telemetry.otlp_endpoint",
        ) from error
    return cast(
        "Tracer",
        home.connect(
            endpoint=telemetry.otlp_endpoint,
            service_name=telemetry.service_name,
            version=version,
        ),
    )
