"""The sink against a real HTTP server that drops, repeats and errs."""

import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import ConfigRefused
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.sink import (
    BACKOFF_LONGEST_S,
    BATCH_EVENTS,
    CONTENT_TYPE,
    HttpReceiver,
    Sink,
)
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.testing.memory_log import MemoryLog


class OpenMeter:
    """What OpenMeter's ingestion does: takes batches, tells duplicates by source and id."""

    def __init__(self) -> None:
        self.moods: list[str] = []
        """What befalls the next requests; then all goes well."""
        self.events: dict[tuple[str, str], dict] = {}
        self.deliveries = 0
        self.headers: list[dict[str, str]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                owner._takes(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/api/v1/events"

    def _takes(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers["content-length"]))
        self.headers.append({key.lower(): value for key, value in request.headers.items()})
        mood = self.moods.pop(0) if self.moods else "well"
        if mood in ("well", "forgets to say so"):
            for event in json.loads(body):
                self.events[event["source"], event["id"]] = event
                self.deliveries += 1
        if mood in ("hangs up", "forgets to say so"):
            request.close_connection = True
            return
        status = {"well": 204, "errs": 500, "is busy": 429, "refuses": 400}[mood]
        request.send_response(status)
        request.send_header("content-length", "0")
        request.end_headers()

    def closes(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def meter():
    server = OpenMeter()
    yield server
    server.closes()


@pytest.fixture
def sink_of(tmp_path, log, meter):
    ledger = Ledger(SqliteDatabase(tmp_path / "ledger.db"))

    def make(token: str | None = None) -> Sink:
        ledger.apply(log.log_id, log.records)
        return Sink(ledger, log.log_id, HttpReceiver(meter.url, token=token))

    yield make
    ledger.close()


def test_an_ended_request_becomes_a_cloud_event(log, meter, sink_of):
    log.settles(log.reserves("r1"))
    log.reserves("running")

    sink_of(token="secret").turn()

    (event,) = meter.events.values()
    assert {
        "specversion": "1.0",
        "type": "headrace.usage",
        "source": "/log-1",
        "id": "2",
        "time": "2026-11-01T00:00:01.000Z",
        "subject": "acme",
    }.items() <= event.items()
    assert {
        "request_id": "r1",
        "outcome": "ok",
        "prompt_tokens": 6,
        "cache_read_tokens": 4,
        "completion_tokens": 5,
        "charge": "0.000016400000000",
    }.items() <= event["data"].items()
    assert meter.headers[0]["content-type"] == CONTENT_TYPE
    assert meter.headers[0]["authorization"] == "Bearer secret"


def test_everything_arrives_however_badly_the_receiver_behaves(log, meter, sink_of):
    """It loses answers and so gets events twice; by source and id it has each of them once."""
    for i in range(3 * BATCH_EVENTS):
        log.settles(log.reserves(f"r{i}"), outcome=Outcome.OK)
    chance = random.Random(5)
    bad = ("hangs up", "forgets to say so", "errs", "is busy")
    meter.moods = [chance.choice((*bad, "well")) for _ in range(25)]
    sink = sink_of()

    pauses = [sink.turn() for _ in range(30)]

    ids = sorted(int(event_id) for _, event_id in meter.events)
    assert ids == [2 * i + 2 for i in range(3 * BATCH_EVENTS)]
    assert meter.deliveries > len(ids)
    assert all(pause is not None and pause <= BACKOFF_LONGEST_S for pause in pauses)


def test_a_receiver_that_is_gone_is_tried_ever_more_slowly(log, meter, sink_of):
    log.serves("r1")
    sink = sink_of()
    meter.moods = ["errs"] * 11

    pauses = [sink.turn() for _ in range(12)]

    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 1.0]


def test_a_process_that_dies_goes_on_where_the_receiver_had_said_so(log, meter, sink_of):
    log.serves("r1")
    sink_of().turn()
    log.serves("r2")

    sink_of().turn()

    assert meter.deliveries == 2


def test_what_a_receiver_refuses_is_not_skipped(log, meter, sink_of):
    """Nobody would ever learn of events that were passed over."""
    log.serves("r1")
    meter.moods = ["refuses"]
    sink = sink_of()

    assert sink.turn() is None
    assert sink.refusal.startswith("HTTP 400")

    sink_of().turn()
    assert len(meter.events) == 1


def test_every_frontend_sends_the_requests_of_its_own_log(tmp_path, meter):
    """In a ledger of many logs nothing is sent twice."""
    ledger = Ledger(SqliteDatabase(tmp_path / "all.db"))
    for log in (MemoryLog("log-1"), MemoryLog("log-2")):
        log.serves("r1")
        ledger.apply(log.log_id, log.records)
    for name in ("log-1", "log-2"):
        Sink(ledger, name, HttpReceiver(meter.url)).turn()

    assert sorted(meter.events) == [("/log-1", "2"), ("/log-2", "2")]
    assert meter.deliveries == 2
    ledger.close()


@pytest.mark.parametrize("url", ["ftp://host/x", "https://", "events"])
def test_a_url_that_is_none_is_refused_without_being_shown(url):
    with pytest.raises(ConfigRefused) as refusal:
        HttpReceiver(url, token="secret")

    assert "secret" not in str(refusal.value)
    assert "secret" not in repr(HttpReceiver("https://u:pass@host/x", token="secret"))
    assert "pass" not in repr(HttpReceiver("https://u:pass@host/x"))
