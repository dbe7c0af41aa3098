"""Sends every ended request as a CloudEvent to an OpenMeter-compatible receiver.

At least once: the mark of what was taken is in the ledger, and moves after the receiver has said
so. An event is named by its log and the number of the record that ended the request, so a receiver
that gets it twice can tell (CloudEvents 1.0: source and id are unique together); the name is the
same for ever, however late it comes.

Nothing is skipped. A receiver that is gone is tried again, ever more slowly; one that refuses what
we send stops the sink until somebody looks, and the events wait in the ledger.
"""

import http.client
import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from headrace.serving import log
from headrace.serving.errors import ConfigRefused, LedgerUnavailable
from headrace.serving.metering.ledger.currency import FEMTO_DIGITS, decimal
from headrace.serving.metering.ledger.database import INTEGER, Row, as_batch
from headrace.serving.metering.ledger.focus import time_text
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.turns import Backoff

BATCH_EVENTS = 100
"""Events of one POST: about 60 KB."""
TIMEOUT_S = 10.0
"""Longest wait for a connection, and for each part of an answer."""
ANSWER_BYTES_MAX = 4096
"""Read of an answer, for its message."""
POLL_S = 1.0
BACKOFF_FIRST_S = 1.0
BACKOFF_LONGEST_S = 300.0
CONTENT_TYPE = "application/cloudevents-batch+json"
_TRANSIENT = {408, 425, 429}
"""And everything from 500 on: the same request may be taken later."""

CloudEvent = Mapping[str, Any]


class NotTaken(Exception):
    """A receiver did not say that it has the events; they are sent again."""


class Refused(Exception):
    """A receiver said that it will never take them."""


class Receiver(Protocol):
    @property
    def name(self) -> str:
        """Names it in the ledger, for ever: its mark is kept under this."""
        ...

    def send(self, events: Sequence[CloudEvent]) -> None:
        """Return once the receiver has said that it has all of them.

        Raises:
            NotTaken: it did not say so; it may have them all the same.
            Refused: it will never take them.
        """
        ...


class HttpReceiver:
    """`POST` to one URL. Holds no connection: batches are large and seldom."""

    def __init__(self, url: str, *, token: str | None = None) -> None:
        """Connects later. `token` is sent as a bearer token, and is a secret.

        Raises:
            ConfigRefused: the URL has no host, or another scheme than HTTP.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigRefused(
                "The URL of the usage sink cannot be used.",
                why="It has a scheme, http or https, and a host.",
                fix="Write ledger.sink_url like https://openmeter.example/api/v1/events.",
                field="ledger.sink_url",
            )
        self._parts = parts
        self._headers = {"content-type": CONTENT_TYPE}
        if token:
            self._headers["authorization"] = f"Bearer {token}"
        self.name = f"{parts.scheme}://{parts.hostname}:{parts.port or ''}{parts.path}"

    def __repr__(self) -> str:
        return f"HttpReceiver({self.name!r})"

    def send(self, events: Sequence[CloudEvent]) -> None:
        connection = self._connection()
        try:
            path = self._parts.path or "/"
            target = f"{path}?{self._parts.query}" if self._parts.query else path
            body = json.dumps(events, separators=(",", ":")).encode()
            connection.request("POST", target, body, self._headers)
            answer = connection.getresponse()
            said = answer.read(ANSWER_BYTES_MAX).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise NotTaken(f"{type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if 200 <= answer.status < 300:
            return
        what = f"HTTP {answer.status} {' '.join(said.split())[:200]}"
        if answer.status >= 500 or answer.status in _TRANSIENT:
            raise NotTaken(what)
        raise Refused(what)

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
        return http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)


@dataclass(slots=True, eq=False)
class Sink:
    """The core: one turn after another, each of one batch. For one thread at a time.

    `turns.BackgroundTurns(sink.turn)` runs it in the background.
    """

    ledger: Ledger
    """The local one; this sink's alone."""
    log_id: str
    """Whose requests: each frontend sends its own."""
    receiver: Receiver
    refusal: str = ""
    """Why it stands still: what the receiver said."""
    _backoff: Backoff = field(default_factory=lambda: Backoff(BACKOFF_FIRST_S, BACKOFF_LONGEST_S))
    _log_no: int = 0
    _mark: int | None = None

    def turn(self) -> float | None:
        """Send one batch; the seconds to wait before the next turn, None once it stands still."""
        backoff = self._backoff
        try:
            sent = self._send()
        except (NotTaken, LedgerUnavailable) as error:
            if backoff.failures == 0:
                log.sink_behind(sink=self.receiver.name, why=str(error))
            return backoff.failed()
        except Refused as error:
            self.refusal = str(error)
            log.sink_behind(sink=self.receiver.name, why=f"refused for good: {error}")
            return None
        if backoff.failures:
            log.sink_reached(sink=self.receiver.name)
            backoff.succeeded()
        return 0.0 if sent == BATCH_EVENTS else POLL_S

    def _send(self) -> int:
        if self._mark is None:
            self._log_no = self.ledger.log_no(self.log_id)
            rows = self.ledger.database.rows(
                "SELECT settled_seq FROM sink WHERE sink_id = ? AND log_no = ?",
                (self.receiver.name, self._log_no),
            )
            self._mark = rows[0][0] if rows else 0
        batch = self.ledger.database.rows(_SELECT, (self._log_no, self._mark, BATCH_EVENTS))
        if batch:
            self.receiver.send(self._events(batch))
            mark = batch[-1][0]
            with self.ledger.database.transaction() as execute:
                execute(_MOVE, (self.receiver.name, self._log_no, mark))
            self._mark = mark
        return len(batch)

    def _events(self, batch: Sequence[Row]) -> list[CloudEvent]:
        quantities: dict[int, dict[str, int]] = {}
        table = self.ledger.database.dialect.batch({"seq": INTEGER})
        for seq, unit, quantity in self.ledger.database.rows(
            f"SELECT quantity.seq, unit, quantity FROM {table} CROSS JOIN quantity"
            " WHERE quantity.seq = batch.seq AND quantity.log_no = ?",
            (as_batch([[row[1]] for row in batch]), self._log_no),
        ):
            quantities.setdefault(seq, {})[unit] = quantity
        return [event_of(self.log_id, row, quantities.get(row[1], {})) for row in batch]


def event_of(log_id: str, row: Row, quantities: Mapping[str, int]) -> CloudEvent:
    """A row of _SELECT as a CloudEvents 1.0 message."""
    (settled_seq, _, tenant, project, key_id, request_id, model, *rest) = row
    tier, outcome, settled_unix_ms, charge_femto, waived_femto, currency, price_version = rest
    return {
        "specversion": "1.0",
        "type": "headrace.usage",
        "source": f"/{log_id}",
        "id": str(settled_seq),
        "time": time_text(settled_unix_ms),
        "subject": tenant,
        "datacontenttype": "application/json",
        "data": {
            "project": project,
            "key_id": key_id,
            "request_id": request_id,
            "model": model,
            "tier": tier,
            "outcome": outcome,
            "currency": currency,
            "price_version": price_version,
            # Money as a decimal text: receivers read JSON numbers as floats.
            "charge": decimal(charge_femto, FEMTO_DIGITS),
            "waived": decimal(waived_femto, FEMTO_DIGITS),
            **quantities,
        },
    }


_SELECT = (
    "SELECT settled_seq, seq, tenant_id, project_id, key_id, request_id, model, tier, outcome,"
    " settled_unix_ms, charge_femto, waived_femto, price.currency, price.version FROM request"
    " JOIN price ON price.price_id = request.price_id WHERE log_no = ? AND settled_seq > ?"
    " ORDER BY settled_seq LIMIT ?"
)
_MOVE = (
    "INSERT INTO sink (sink_id, log_no, settled_seq) VALUES (?, ?, ?)"
    " ON CONFLICT (sink_id, log_no) DO UPDATE SET settled_seq = excluded.settled_seq"
)
