"""The rows behind every `ClaimStore`: one SQL for SQLite and PostgreSQL.

Each method runs inside a transaction of its caller's. Placeholders are question marks; what differs
between the two databases is in `Dialect`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from headrace.serving.domain.usage import Usage
from headrace.serving.idempotency.claims import (
    ATTEMPTS_MAX,
    SWEEP_ROWS,
    Answer,
    Ask,
    Claim,
    Conflicting,
    Debt,
    Elsewhere,
    Exhausted,
    Extent,
    KeyState,
    Verdict,
)

_RACES_MAX = 8
"""Times a row may vanish between our insert and our look: each needs a sweep in that moment."""


class Cursor(Protocol):
    @property
    def rowcount(self) -> int: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> Sequence[Any]: ...


Execute = Callable[[str, Sequence[object]], Cursor]


@dataclass(frozen=True, slots=True)
class Dialect:
    blob: str
    integer: str
    strict: str
    locking: str
    """After a SELECT whose row is about to be changed."""

    def schema(self) -> list[str]:
        """Statements that make the tables where there are none."""
        return [
            f"""
            CREATE TABLE IF NOT EXISTS idempotency (
                digest {self.blob} PRIMARY KEY,
                tenant_id TEXT NOT NULL,
                fingerprint {self.blob} NOT NULL,
                request_id TEXT NOT NULL,
                attempt {self.integer} NOT NULL,
                state TEXT NOT NULL,
                owner TEXT NOT NULL,
                log_id TEXT NOT NULL,
                owed TEXT NOT NULL,
                tokens TEXT NOT NULL,
                answer_bytes {self.integer} NOT NULL,
                expires_unix_ms {self.integer} NOT NULL,
                answer {self.blob}
            ) {self.strict}
            """,
            "CREATE INDEX IF NOT EXISTS idempotency_by_expiry ON idempotency (expires_unix_ms)",
            "CREATE INDEX IF NOT EXISTS idempotency_in_debt ON idempotency (digest) "
            "WHERE state = 'answered' AND owed <> '[]'",
            "CREATE INDEX IF NOT EXISTS idempotency_kept ON idempotency "
            "(expires_unix_ms, answer_bytes) WHERE answer_bytes > 0",
        ]


SQLITE = Dialect(blob="BLOB", integer="INTEGER", strict="STRICT", locking="")
POSTGRES = Dialect(blob="BYTEA", integer="BIGINT", strict="", locking=" FOR UPDATE")

_INSERT = """
INSERT INTO idempotency (digest, tenant_id, fingerprint, request_id, attempt, state, owner, log_id,
    owed, tokens, answer, answer_bytes, expires_unix_ms)
VALUES (?, ?, ?, ?, 1, 'running', ?, ?, '[]', '[]', NULL, 0, ?)
ON CONFLICT (digest) DO NOTHING
"""
_SELECT = """
SELECT fingerprint, request_id, attempt, state, owner, log_id, owed, tokens, answer,
    expires_unix_ms
FROM idempotency WHERE digest = ?"""
_TAKE = """
UPDATE idempotency SET fingerprint = ?, request_id = ?, attempt = ?, state = 'running', owner = ?,
    log_id = ?, owed = ?, tokens = '[]', answer = NULL, answer_bytes = 0, expires_unix_ms = ?
WHERE digest = ?
"""
_MINE = "WHERE digest = ? AND attempt = ? AND owner = ? AND state = 'running'"
_FINISH = f"""
UPDATE idempotency SET state = 'answered', tokens = ?, answer = ?, answer_bytes = ?,
    expires_unix_ms = ? {_MINE}
"""  # noqa: S608 - a fixed clause
_END = f"UPDATE idempotency SET state = 'ended', owed = ? {_MINE}"  # noqa: S608 - the same
_STEP_BACK = f"""
UPDATE idempotency SET state = 'ended', attempt = attempt - 1 {_MINE} AND attempt > 1
"""  # noqa: S608 - the same
_FORGET = f"DELETE FROM idempotency {_MINE} AND attempt = 1"  # noqa: S608 - the same
_OURS = """
SELECT attempt, request_id FROM idempotency WHERE digest = ? AND owner = ? AND state = 'running'"""
_OWED = "SELECT owed FROM idempotency WHERE digest = ?"
_DEBTS = """
SELECT digest, tenant_id, owed FROM idempotency
WHERE state = 'answered' AND owed <> '[]' AND owed LIKE ? LIMIT ?
"""
_SET_OWED = "UPDATE idempotency SET owed = ? WHERE digest = ?"
# Debts outlive their key's time: they go once they are given back.
_SWEEP = """
DELETE FROM idempotency WHERE digest IN (
    SELECT digest FROM idempotency
    WHERE expires_unix_ms <= ? AND NOT (state = 'answered' AND owed <> '[]')
    ORDER BY expires_unix_ms LIMIT ?)
"""
# Each half reads an index only.
_EXTENT = """
SELECT (SELECT count(*) FROM idempotency),
    (SELECT coalesce(sum(answer_bytes), 0) FROM idempotency WHERE answer_bytes > 0)
"""
_OLDEST_KEPT = """
SELECT digest, answer_bytes FROM idempotency WHERE answer_bytes > 0
ORDER BY expires_unix_ms LIMIT ?
"""
_DROP_ANSWER = "UPDATE idempotency SET answer = NULL, answer_bytes = 0 WHERE digest = ?"


class ClaimRows:
    """What a `ClaimStore` does, within one transaction.

    `owner` names this frontend's life, `log_id` its meter log. What is owed is a list of
    [log_id, request_id].
    """

    def __init__(
        self,
        execute: Execute,
        *,
        owner: str,
        log_id: str,
        is_alive: Callable[[str], bool],
        dialect: Dialect = SQLITE,
    ) -> None:
        self._execute = execute
        self._owner = owner
        self._log_id = log_id
        self._is_alive = is_alive
        self._locking = dialect.locking

    def claim(self, ask: Ask) -> Verdict:
        values = (ask.digest, ask.tenant_id, ask.fingerprint, ask.request_id)
        mine = (self._owner, self._log_id, ask.expires_unix_ms)
        for _ in range(_RACES_MAX):
            if self._execute(_INSERT, (*values, *mine)).rowcount == 1:
                return Claim(digest=ask.digest, attempt=1, request_id=ask.request_id)
            row = self._execute(_SELECT + self._locking, (ask.digest,)).fetchone()
            if row is not None:
                return self._claim_known(ask, row)
        raise AssertionError("a row that blocks our insert vanishes whenever we look")

    def finish(self, claim: Claim, answer: Answer, *, expires_unix_ms: int) -> bool:
        sealed = answer.sealed
        size = 0 if sealed is None else len(sealed)
        values = (_tokens_text(answer.usage), sealed, size, expires_unix_ms, *self._mine(claim))
        return self._execute(_FINISH, values).rowcount == 1

    def end(self, claim: Claim, *, owes: bool) -> None:
        row = self._execute(_OWED + self._locking, (claim.digest,)).fetchone()
        if row is not None:
            owed = json.loads(row[0])
            if owes:
                owed.append([self._log_id, claim.request_id])
            self._execute(_END, (json.dumps(owed), *self._mine(claim)))

    def release(self, claim: Claim) -> None:
        self._execute(_FORGET, self._mine(claim))
        self._execute(_STEP_BACK, self._mine(claim))

    def end_ours(self, digest: bytes) -> None:
        row = self._execute(_OURS + self._locking, (digest, self._owner)).fetchone()
        if row is not None:
            attempt, request_id = row
            self.end(Claim(digest=digest, attempt=attempt, request_id=request_id), owes=True)

    def debts(self) -> Sequence[Debt]:
        rows = self._execute(_DEBTS, (f'%["{self._log_id}", %', SWEEP_ROWS)).fetchall()
        return [
            Debt(
                digest=bytes(digest),
                tenant_id=tenant_id,
                request_ids=[each for log_id, each in json.loads(owed) if log_id == self._log_id],
            )
            for digest, tenant_id, owed in rows
        ]

    def settled(self, debt: Debt) -> None:
        row = self._execute(_OWED + self._locking, (debt.digest,)).fetchone()
        if row is not None:
            paid = [[self._log_id, request_id] for request_id in debt.request_ids]
            left = [each for each in json.loads(row[0]) if each not in paid]
            self._execute(_SET_OWED, (json.dumps(left), debt.digest))

    def sweep(self, *, now_unix_ms: int, answer_bytes_max: int) -> int:
        swept = self._execute(_SWEEP, (now_unix_ms, SWEEP_ROWS)).rowcount
        surplus = self.extent().answer_bytes - answer_bytes_max
        if surplus > 0:
            for digest, size in self._execute(_OLDEST_KEPT, (SWEEP_ROWS,)).fetchall():
                if surplus <= 0:
                    break
                self._execute(_DROP_ANSWER, (bytes(digest),))
                surplus -= size
                swept += 1
        return swept

    def extent(self) -> Extent:
        rows, size = self._execute(_EXTENT, ()).fetchone()
        return Extent(rows=int(rows), answer_bytes=int(size))

    def _claim_known(self, ask: Ask, row: Sequence[Any]) -> Verdict:
        fingerprint, request_id, attempt, state, owner, log_id, owed_text, *rest = row
        tokens, answer, expires = rest
        owed: list[list[str]] = json.loads(owed_text)
        in_debt = state == KeyState.ANSWERED and bool(owed)
        if expires <= ask.now_unix_ms and not in_debt:
            return self._take(ask, request_id=ask.request_id, attempt=1, owed=[])
        if bytes(fingerprint) != ask.fingerprint:
            return Conflicting(request_id)
        if state == KeyState.ANSWERED:
            sealed = None if answer is None else bytes(answer)
            return Answer(request_id=request_id, usage=_usage(tokens), sealed=sealed)
        if state == KeyState.RUNNING:
            if owner != self._owner and self._is_alive(owner):
                return Elsewhere(request_id)
            owed.append([log_id, request_id])
        if attempt >= ATTEMPTS_MAX:
            return Exhausted()
        return self._take(ask, request_id=ask.retry_id, attempt=attempt + 1, owed=owed)

    def _take(
        self, ask: Ask, *, request_id: str, attempt: int, owed: Sequence[Sequence[str]]
    ) -> Claim:
        self._execute(
            _TAKE,
            (
                ask.fingerprint,
                request_id,
                attempt,
                self._owner,
                self._log_id,
                json.dumps(owed),
                ask.expires_unix_ms,
                ask.digest,
            ),
        )
        return Claim(digest=ask.digest, attempt=attempt, request_id=request_id)

    def _mine(self, claim: Claim) -> tuple[object, ...]:
        return claim.digest, claim.attempt, self._owner


def _tokens_text(usage: Usage) -> str:
    return json.dumps(
        [
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            usage.reasoning_tokens,
            usage.cache_write_tokens,
        ]
    )


def _usage(text: str) -> Usage:
    prompt, cached, completion, reasoning, written = json.loads(text)
    return Usage(
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        reasoning_tokens=reasoning,
        cache_write_tokens=written,
    )
