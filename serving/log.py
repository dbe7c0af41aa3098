"""Every log event, as a function with typed fields.

One line for each finished request at INFO, nothing for each step. No prompt, no answer and no key
has a way in: the functions take ids, counts and reasons.
"""

import json
import logging
import sys
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import TextIO

from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import ServingError

_LOGGER = logging.getLogger("headrace")

FieldValue = str | int | float | bool | None


class LogFormat(StrEnum):
    TEXT = "text"
    """`time LEVEL event key=value …`, for people."""
    JSON = "json"
    """One JSON object a line, for log stores."""


def setup_logging(
    *, level: str = "INFO", form: LogFormat | None = None, stream: TextIO | None = None
) -> None:
    """Send our events to `stream` (standard error); idempotent.

    `form` None chooses text on a terminal and JSON elsewhere. Other libraries' warnings take the
    same way out.
    """
    out: TextIO = stream or sys.stderr
    form = form or (LogFormat.TEXT if out.isatty() else LogFormat.JSON)
    handler = logging.StreamHandler(out)
    handler.setFormatter(_JsonFormatter() if form is LogFormat.JSON else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _LOGGER.setLevel(level)


def started(*, role: str, version: str, addresses: Mapping[str, str]) -> None:
    _event(logging.INFO, "started", role=role, version=version, **addresses)


def draining(*, role: str, streams_open: int, drain_s: float) -> None:
    _event(logging.INFO, "draining", role=role, streams_open=streams_open, drain_s=drain_s)


def cut_unfinished(*, streams_open: int, waited_s: float) -> None:
    """Answers that a stop cut off had not settled in time; the next start recovers them."""
    _event(logging.ERROR, "cut_unfinished", streams_open=streams_open, waited_s=waited_s)


def stopped(*, role: str) -> None:
    _event(logging.INFO, "stopped", role=role)


def request_settled(
    *,
    request_id: str,
    tenant_id: str,
    key_id: str,
    model: str,
    outcome: Outcome,
    usage: Usage,
    charge_nano: int,
    ttft_ms: float | None,
    duration_ms: float,
    replicas_tried: int = 1,
    replica_id: str | None = None,
    picked: str | None = None,
) -> None:
    """The one line of a request that was accepted. `picked` is the router's reason."""
    _event(
        logging.INFO,
        "request_settled",
        request_id=request_id,
        tenant_id=tenant_id,
        key_id=key_id,
        model=model,
        outcome=outcome.value,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        charge_nano=charge_nano,
        ttft_ms=None if ttft_ms is None else round(ttft_ms, 2),
        duration_ms=round(duration_ms, 2),
        replicas_tried=replicas_tried,
        replica_id=replica_id,
        picked=picked,
    )


def request_refused(
    *, reason: str, request_id: str | None = None, tenant_id: str | None = None
) -> None:
    """A request that never opened a record. Only the reason: the text may quote the caller."""
    _event(
        logging.INFO,
        "request_refused",
        reason=reason,
        request_id=request_id,
        tenant_id=tenant_id,
    )


def request_replayed(*, request_id: str, tenant_id: str, attempt: str) -> None:
    """An idempotency key was used again: `attached` to the running call, or `answered` anew."""
    _event(
        logging.INFO,
        "request_replayed",
        request_id=request_id,
        tenant_id=tenant_id,
        attempt=attempt,
    )


def given_back(*, tenant_id: str, request_id: str, amount_nano: int, why: str) -> None:
    """The charge of a request whose result nobody has was reversed."""
    _event(
        logging.WARNING,
        "given_back",
        tenant_id=tenant_id,
        request_id=request_id,
        amount_nano=amount_nano,
        why=why,
    )


def batch_moved(
    *, batch_id: str, tenant_id: str, state: str, lines: int, done: int, why: str | None = None
) -> None:
    """A batch entered a state; `done` of its `lines` have a result."""
    _event(
        logging.INFO,
        "batch_moved",
        batch_id=batch_id,
        tenant_id=tenant_id,
        state=state,
        lines=lines,
        done=done,
        why=why,
    )


def replica_joined(*, replica_id: str, model: str, version: str, address: str) -> None:
    _event(
        logging.INFO,
        "replica_joined",
        replica_id=replica_id,
        model=model,
        version=version,
        address=address,
    )


def replica_left(*, replica_id: str, model: str, why: str, sequences_lost: int = 0) -> None:
    level = logging.WARNING if sequences_lost else logging.INFO
    _event(
        level,
        "replica_left",
        replica_id=replica_id,
        model=model,
        why=why,
        sequences_lost=sequences_lost,
    )


def failed_over(
    *, request_id: str, from_replica: str, to_replica: str, resumed_tokens: int
) -> None:
    _event(
        logging.WARNING,
        "failed_over",
        request_id=request_id,
        from_replica=from_replica,
        to_replica=to_replica,
        resumed_tokens=resumed_tokens,
    )


def usage_recovered(*, requests: int, epochs: int) -> None:
    """Requests of dead frontends were settled at their last checkpoint."""
    _event(logging.WARNING, "usage_recovered", requests=requests, epochs=epochs)


def meter_unhealthy(*, why: str) -> None:
    _event(logging.ERROR, "meter_unhealthy", why=why)


def accounts_unreadable(*, what: str, stale_s: float) -> None:
    """The accounts cannot be read; known keys go on for `stale_s`, and then none does."""
    _event(logging.ERROR, "accounts_unreadable", what=what, stale_s=stale_s)


def accounts_readable() -> None:
    _event(logging.WARNING, "accounts_readable")


def operator_keys_unreadable(*, path: str, why: str) -> None:
    """An issuer's file of public keys broke; those read before stay in force."""
    _event(logging.ERROR, "operator_keys_unreadable", path=path, why=why)


def meter_log_torn(*, path: str, offset: int, num_bytes: int, seq: int) -> None:
    """A write that a power cut tore was taken back; none of its records had been acknowledged."""
    _event(
        logging.WARNING,
        "meter_log_torn",
        path=path,
        offset=offset,
        num_bytes=num_bytes,
        seq=seq,
    )


def meter_log_full(*, why: str) -> None:
    """No room for another segment: new work is refused, what was accepted is settled."""
    _event(logging.ERROR, "meter_log_full", why=why)


def meter_log_has_room() -> None:
    _event(logging.WARNING, "meter_log_has_room")


def ledger_behind(*, ledger: str, why: str) -> None:
    """A ledger cannot be written; the log goes on, and the ledger will follow."""
    _event(logging.WARNING, "ledger_behind", ledger=ledger, why=why)


def ledger_reached(*, ledger: str) -> None:
    """It can be written again, and catches up."""
    _event(logging.WARNING, "ledger_reached", ledger=ledger)


def sink_behind(*, sink: str, why: str) -> None:
    """A receiver of usage events does not take them; they wait in the ledger."""
    _event(logging.WARNING, "sink_behind", sink=sink, why=why)


def sink_reached(*, sink: str) -> None:
    _event(logging.WARNING, "sink_reached", sink=sink)


def limits_changed(*, limits: int) -> None:
    """Another set of limits is in force."""
    _event(logging.INFO, "limits_changed", limits=limits)


def engine_loaded(
    *, model: str, device: str, rank: int, rows_max: int, device_bytes: int, duration_ms: float
) -> None:
    """An engine has the device: `device_bytes` of it, for at most `rows_max` sequences."""
    _event(
        logging.INFO,
        "engine_loaded",
        model=model,
        device=device,
        rank=rank,
        rows_max=rows_max,
        device_bytes=device_bytes,
        duration_ms=round(duration_ms, 1),
    )


def graph_refused(*, rows: int, why: str) -> None:
    """A decode step could not be recorded: it is given to the device kernel by kernel."""
    _event(logging.WARNING, "graph_refused", rows=rows, why=why)


def library_said(*, library: str, level: int, said: str) -> None:
    """A line of a native library's own log, at one of our levels."""
    _event(level, "library_said", library=library, said=said)


def not_freed(*, what: str, why: str) -> None:
    """Something could not be given back while an engine closed; the rest was."""
    _event(logging.WARNING, "not_freed", what=what, why=why)


def refused(error: ServingError, *, during: str) -> None:
    """A refusal that reaches no caller, for example of a background task."""
    _event(
        logging.ERROR, "refused", during=during, reason=error.reason, what=error.what, fix=error.fix
    )


def crashed(*, during: str, error: BaseException, request_id: str | None = None) -> None:
    """A defect of ours: logged with its traceback at the root of the task that it ended."""
    _LOGGER.error(
        "crashed",
        exc_info=error,
        extra={"fields": _present({"during": during, "request_id": request_id})},
    )


def _event(level: int, event: str, **fields: FieldValue) -> None:
    if _LOGGER.isEnabledFor(level):
        _LOGGER.log(level, event, extra={"fields": _present(fields)})


def _present(fields: Mapping[str, FieldValue]) -> dict[str, FieldValue]:
    return {name: value for name, value in fields.items() if value is not None}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, FieldValue] = {
            "time": _iso(record.created),
            "level": record.levelname,
            "event": record.getMessage(),
        }
        if not record.name.startswith("headrace"):
            line["logger"] = record.name
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, FieldValue] = getattr(record, "fields", {})
        parts = [_iso(record.created), f"{record.levelname:<7}", record.getMessage()]
        parts += [f"{name}={_plain(value)}" for name, value in fields.items()]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def _plain(value: FieldValue) -> str:
    """A bare word where that is unambiguous; otherwise quoted, so that no value ends a line."""
    if isinstance(value, str) and not (value.isprintable() and value and " " not in value):
        return json.dumps(value)
    return str(value)


def _iso(unix_s: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))
    return f"{whole}.{int(unix_s * 1000) % 1000:03d}Z"
