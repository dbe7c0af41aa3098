"""Log events: one line each, parseable, and without a way in for prompts or keys."""

import inspect
import io
import json
import logging

import pytest

from headrace.serving import log
from headrace.serving.domain.usage import Outcome, Usage


@pytest.fixture
def lines():
    """Our log as text and as JSON; the root logger is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    ours = logging.getLogger("headrace").level

    def written(form: log.LogFormat, *events) -> list[str]:
        stream = io.StringIO()
        log.setup_logging(form=form, stream=stream)
        for event in events:
            event()
        return stream.getvalue().splitlines()

    yield written
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("headrace").setLevel(ours)


def settle(request_id: str = "r1") -> None:
    log.request_settled(
        request_id=request_id,
        tenant_id="acme",
        key_id="k1",
        model="m",
        outcome=Outcome.OK,
        usage=Usage(prompt_tokens=10, completion_tokens=5),
        charge_nano=131_000,
        ttft_ms=12.3456,
        duration_ms=99.9,
    )


def test_a_finished_request_is_one_json_line(lines):
    (line,) = lines(log.LogFormat.JSON, settle)

    event = json.loads(line)
    assert event["event"] == "request_settled"
    assert (event["request_id"], event["outcome"]) == ("r1", "ok")
    assert (event["completion_tokens"], event["charge_nano"]) == (5, 131_000)
    assert event["ttft_ms"] == 12.35
    assert "replica_id" not in event


def test_a_finished_request_is_one_line_for_people(lines):
    (line,) = lines(log.LogFormat.TEXT, settle)

    assert " INFO    request_settled request_id=r1 tenant_id=acme " in line
    assert line.endswith("duration_ms=99.9 replicas_tried=1")


@pytest.mark.parametrize("form", list(log.LogFormat))
def test_a_value_cannot_forge_a_second_line(lines, form):
    """Request ids are checked at the door; the log does not rely on it."""
    forged = "r1\n2026 INFO request_settled request_id=r2"

    assert len(lines(form, lambda: settle(forged))) == 1


def test_a_crash_is_logged_with_its_traceback(lines):
    def crash() -> None:
        try:
            raise ZeroDivisionError("a defect")
        except ZeroDivisionError as error:
            log.crashed(during="a test", error=error)

    (line,) = lines(log.LogFormat.JSON, crash)

    event = json.loads(line)
    assert (event["event"], event["during"]) == ("crashed", "a test")
    assert "ZeroDivisionError: a defect" in event["traceback"]


def test_setting_up_twice_does_not_write_twice(lines):
    assert len(lines(log.LogFormat.TEXT, settle)) == 1
    assert len(lines(log.LogFormat.TEXT, settle)) == 1


def test_no_event_has_a_field_for_what_people_wrote():
    """The names of parameters are the whole way in."""
    private = {"prompt", "answer", "text", "content", "message", "messages", "key", "secret"}
    events = [each for _, each in inspect.getmembers(log, inspect.isfunction)]

    fields = {name for event in events for name in inspect.signature(event).parameters}

    assert len(fields) > 20
    assert not fields & private
