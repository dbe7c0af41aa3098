"""The tables of batches: their schema, their statements, and how rows become batches."""

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from headrace.serving.domain.batch import Batch, BatchState, Counts, LineResult, LineStatus
from headrace.serving.domain.usage import Usage

SCHEMA_VERSION = 1
CANDIDATES_MAX = 1_000
"""Batches under way that one look for work considers."""

Execute = Callable[[str, Sequence[Any]], sqlite3.Cursor]

SCHEMA = """
CREATE TABLE batch (
    batch_id TEXT PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    project_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    state TEXT NOT NULL,
    why TEXT NOT NULL DEFAULT '',
    lines INTEGER NOT NULL DEFAULT 0,
    succeeded INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    expired INTEGER NOT NULL DEFAULT 0,
    prompt_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    cache_write_tokens INTEGER NOT NULL DEFAULT 0,
    charge_nano INTEGER NOT NULL DEFAULT 0,
    currency TEXT NOT NULL DEFAULT '',
    input_bytes INTEGER NOT NULL DEFAULT 0,
    results_bytes INTEGER NOT NULL DEFAULT 0,
    created_unix_ms INTEGER NOT NULL,
    started_unix_ms INTEGER,
    finished_unix_ms INTEGER,
    expires_unix_ms INTEGER NOT NULL,
    owner TEXT NOT NULL DEFAULT '',
    lease_unix_ms INTEGER NOT NULL DEFAULT 0,
    begun INTEGER NOT NULL DEFAULT 0,
    done BLOB NOT NULL DEFAULT x''
) STRICT;
CREATE INDEX batch_by_state ON batch (state, created_unix_ms);
CREATE INDEX batch_by_project ON batch (tenant_id, project_id, created_unix_ms);
CREATE TABLE debt (
    tenant_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    PRIMARY KEY (tenant_id, request_id)
) STRICT;
"""
_COLUMNS = """batch_id, tenant_id, project_id, key_id, state, lines, succeeded, failed, cancelled,
    expired, prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, cache_write_tokens,
    charge_nano, currency, input_bytes, results_bytes, created_unix_ms, started_unix_ms,
    finished_unix_ms, expires_unix_ms, why"""
SELECT = f"SELECT {_COLUMNS} FROM batch"  # noqa: S608 - fixed column names
INSERT = """
INSERT INTO batch (batch_id, tenant_id, project_id, key_id, state, created_unix_ms,
    expires_unix_ms, owner, lease_unix_ms)
VALUES (?, ?, ?, ?, 'validating', ?, ?, ?, ?)
"""
# Of the tenant with the fewest batches under way, the oldest one.
SELECT_CANDIDATES = f"""
{SELECT.replace("SELECT", "SELECT owner, lease_unix_ms, ")} AS b
WHERE state IN ('queued', 'running', 'cancelling')
ORDER BY (SELECT count(*) FROM batch AS other WHERE other.state = 'running'
    AND other.tenant_id = b.tenant_id AND other.lease_unix_ms > ?), created_unix_ms
LIMIT {CANDIDATES_MAX}
"""  # noqa: S608 - the same
COUNT_OPEN = """
SELECT count(*) FROM batch WHERE tenant_id = ? AND project_id = ? AND finished_unix_ms IS NULL
"""
SET_LEASE = "UPDATE batch SET owner = ?, lease_unix_ms = ? WHERE batch_id = ?"
SET_STATE = """
UPDATE batch SET state = ?, why = ?, started_unix_ms = coalesce(started_unix_ms, ?),
    finished_unix_ms = ? WHERE batch_id = ?
"""
ADD_RESULTS = """
UPDATE batch SET succeeded = succeeded + ?, failed = failed + ?, cancelled = cancelled + ?,
    expired = expired + ?, prompt_tokens = prompt_tokens + ?, cached_tokens = cached_tokens + ?,
    completion_tokens = completion_tokens + ?, reasoning_tokens = reasoning_tokens + ?,
    cache_write_tokens = cache_write_tokens + ?, charge_nano = charge_nano + ?,
    currency = CASE WHEN currency = '' THEN ? ELSE currency END,
    results_bytes = ?, done = ?, lease_unix_ms = ? WHERE batch_id = ?
"""


class DoneLines:
    """Which lines have a result: one bit each, 6 KB for the longest batch."""

    def __init__(self, bits: bytes = b"") -> None:
        self._bits = bytearray(bits)

    def __contains__(self, line: int) -> bool:
        byte, bit = divmod(line, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)

    def add(self, line: int) -> None:
        byte, bit = divmod(line, 8)
        if byte >= len(self._bits):
            self._bits += bytes(byte + 1 - len(self._bits))
        self._bits[byte] |= 1 << bit

    def __bytes__(self) -> bytes:
        return bytes(self._bits)


def results_row(fresh: Sequence[LineResult]) -> Sequence[int | str]:
    """What ADD_RESULTS adds for these results."""
    usages = [each.usage for each in fresh]
    return (
        *(sum(each.status is kind for each in fresh) for kind in LineStatus),
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.reasoning_tokens for usage in usages),
        sum(usage.cache_write_tokens for usage in usages),
        sum(each.charge_nano for each in fresh),
        max((each.currency for each in fresh), default=""),
    )


def batch_of(row: Sequence[Any]) -> Batch:
    """A row of SELECT."""
    batch_id, tenant_id, project_id, key_id, state, *numbers, why = row
    lines, succeeded, failed, cancelled, expired, *rest = numbers
    prompt, cached, completion, reasoning, written, charge_nano, currency, *rest = rest
    input_bytes, results_bytes, created, started, finished, expires = rest
    return Batch(
        batch_id=batch_id,
        tenant_id=tenant_id,
        project_id=project_id,
        key_id=key_id,
        state=BatchState(state),
        counts=Counts(
            lines=lines, succeeded=succeeded, failed=failed, cancelled=cancelled, expired=expired
        ),
        usage=Usage(
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
            reasoning_tokens=reasoning,
            cache_write_tokens=written,
        ),
        charge_nano=charge_nano,
        currency=currency,
        input_bytes=input_bytes,
        results_bytes=results_bytes,
        created_unix_ms=created,
        started_unix_ms=started,
        finished_unix_ms=finished,
        expires_unix_ms=expires,
        why=why,
    )
