"""Traces: off costs nothing, on speaks OpenTelemetry's gen_ai names."""

import importlib
import sys

import pytest

from headrace.serving.config import TelemetryConfig
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import ConfigRefused, EngineFault
from headrace.serving.tracing import OFF, SpanEnd, SpanStart, tracer

START = SpanStart(
    model="m", request_id="r1", tenant_id="acme", max_tokens=64, temperature=0.5, choices=2
)
END = SpanEnd(
    outcome=Outcome.OK,
    usage=Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=7, reasoning_tokens=2),
    finish_reasons=["stop", "length"],
    version="v1",
)
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def traced():
    """A tracer whose spans stay in memory, and the function that reads them."""
    otel = pytest.importorskip(
        "headrace.serving.tracing_otel", reason="pip install 'headrace[otel]'"
    )
    export = importlib.import_module("opentelemetry.sdk.trace.export")
    memory = importlib.import_module("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    live = otel.over(export.SimpleSpanProcessor(exporter), service_name="headrace", version="1")
    yield live, exporter.get_finished_spans
    live.close()


def test_off_is_the_default_and_imports_nothing():
    off = tracer(TelemetryConfig(), version="1")
    span = off.start(START, {"traceparent": "whatever"})
    span.first_token(0.1)
    span.end(END)

    assert off is OFF


def test_a_request_is_one_span_with_gen_ai_names(traced):
    live, finished = traced

    span = live.start(START, {})
    span.first_token(0.25)
    span.end(END)

    (seen,) = finished()
    assert (seen.name, seen.kind.name) == ("chat m", "SERVER")
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.finish_reasons": ("stop", "length"),
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.reasoning.output_tokens": 2,
        "headrace.request_id": "r1",
        "headrace.tenant_id": "acme",
    }.items() <= dict(seen.attributes).items()
    assert seen.resource.attributes["service.name"] == "headrace"


def test_a_span_continues_the_callers_trace(traced):
    live, finished = traced

    live.start(START, {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}).end(END)

    (seen,) = finished()
    assert f"{seen.context.trace_id:032x}" == TRACE_ID
    assert f"{seen.parent.span_id:016x}" == "00f067aa0ba902b7"


@pytest.mark.parametrize("traceparent", ["", "garbage", "00-0-0-00", "x" * 5000])
def test_a_traceparent_that_is_none_starts_a_trace_of_its_own(traced, traceparent):
    live, finished = traced

    live.start(START, {"traceparent": traceparent}).end(END)

    assert finished()[0].parent is None


def test_a_fault_marks_the_span_by_its_reason_and_quotes_nobody(traced):
    live, finished = traced
    fault = EngineFault("The prompt 'secret' broke it.", why="why", fix="fix")

    live.start(START, {}).end(SpanEnd(outcome=Outcome.FAILED, usage=Usage(), error=fault))

    (seen,) = finished()
    assert (seen.status.status_code.name, seen.status.description) == ("ERROR", "ENGINE_FAULT")
    assert seen.attributes["error.type"] == "ENGINE_FAULT"
    assert "secret" not in seen.to_json()


def test_switched_on_without_opentelemetry_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "headrace.serving.tracing_otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)

    with pytest.raises(ConfigRefused) as refusal:
        tracer(TelemetryConfig(otlp_endpoint="http://127.0.0.1:4317"), version="1")

    assert "headrace[otel]" in refusal.value.fix
