"""OpenTelemetry, where it is installed and switched on: the only module that imports it.

Names follow the GenAI semantic conventions (open-telemetry/semantic-conventions-genai, status
Development): `gen_ai.usage.input_tokens` includes cached tokens, of which
`gen_ai.usage.cache_read.input_tokens` says how many.
"""

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from headrace.serving.domain.usage import Outcome
from headrace.serving.tracing import Span, SpanEnd, SpanStart

PROVIDER = "headrace"
QUEUE_SPANS = 2048
"""Spans that wait for the collector; beyond it the newest are dropped, and requests go on."""
EXPORT_MS = 5_000
"""How long one export may take before it is given up."""


def connect(*, endpoint: str, service_name: str, version: str) -> "OtelTracer":
    """A tracer that sends batches to an OTLP collector over gRPC."""
    exporter = OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_MS / 1000)
    return over(_batching(exporter), service_name=service_name, version=version)


def over(processor: SpanProcessor, *, service_name: str, version: str) -> "OtelTracer":
    """A tracer that hands its spans to `processor`."""
    resource = Resource.create({"service.name": service_name, "service.version": version})
    # Ours alone: the global provider belongs to whoever embeds us.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return OtelTracer(provider)


class OtelTracer:
    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("headrace.serving")
        self._propagator = TraceContextTextMapPropagator()

    def start(self, start: SpanStart, metadata: Mapping[str, str]) -> Span:
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": start.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": start.model,
            "gen_ai.request.choice.count": start.choices,
            "gen_ai.request.stream": start.stream,
            "headrace.request_id": start.request_id,
            "headrace.tenant_id": start.tenant_id,
        }
        if start.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = start.max_tokens
        if start.temperature is not None:
            attributes["gen_ai.request.temperature"] = start.temperature
        if start.top_p is not None:
            attributes["gen_ai.request.top_p"] = start.top_p
        span = self._tracer.start_span(
            f"{start.operation} {start.model}",
            context=self._propagator.extract(metadata),
            kind=trace.SpanKind.SERVER,
            attributes=attributes,
        )
        return _OtelSpan(span, start.model)

    def close(self) -> None:
        self._provider.shutdown()


class _OtelSpan:
    def __init__(self, span: trace.Span, model: str) -> None:
        self._span = span
        self._model = model

    def first_token(self, ttft_s: float) -> None:
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", ttft_s)

    def end(self, result: SpanEnd) -> None:
        usage = result.usage
        attributes: dict[str, AttributeValue] = {
            "gen_ai.response.model": self._model,
            "gen_ai.response.finish_reasons": list(result.finish_reasons),
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.reasoning.output_tokens": usage.reasoning_tokens,
            "headrace.outcome": result.outcome.value,
            "headrace.model_version": result.version,
            "headrace.replicas_tried": result.replicas_tried,
        }
        self._span.set_attributes(attributes)
        if result.error is not None:
            self._span.set_attribute("error.type", result.error.reason)
        if result.error is not None or result.outcome is Outcome.FAILED:
            # The reason alone: the sentences of an error may quote what the caller sent.
            reason = result.error.reason if result.error else result.outcome.value
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, reason))
        self._span.end()


def _batching(exporter: SpanExporter) -> SpanProcessor:
    return BatchSpanProcessor(exporter, max_queue_size=QUEUE_SPANS, export_timeout_millis=EXPORT_MS)
