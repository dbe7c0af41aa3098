"""The SQLite file of usage records: its schema, its statements, and how rows become records.

Integers and texts in a STRICT table; money and tokens are never floats. Several processes may read
while one writes (WAL). Nothing is ever deleted: a million records take about 270 MB.
"""

import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headrace.serving.domain.record import Opening, Settlement, UsageRecord
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import ConfigRefused

SCHEMA_VERSION = 1
BUSY_MS = 2000
"""How long a write waits for another process's transaction; ours take about a millisecond."""
SQLITE_MIN = (3, 38, 0)
"""STRICT tables, UPDATE … FROM, and `->>` on JSON."""

Connect = Callable[[Path], sqlite3.Connection]
Execute = Callable[[str, Sequence[Any]], sqlite3.Cursor]
RequestKey = tuple[str, str]
"""Tenant and request id."""

_SCHEMA = """
CREATE TABLE usage (
    seq INTEGER PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    request_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    currency TEXT NOT NULL,
    price_version TEXT NOT NULL,
    prompt_nano_per_mtok INTEGER NOT NULL,
    cached_nano_per_mtok INTEGER NOT NULL,
    completion_nano_per_mtok INTEGER NOT NULL,
    epoch TEXT NOT NULL,
    accepted_unix_ms INTEGER NOT NULL,
    outcome TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    charge_nano INTEGER NOT NULL DEFAULT 0 CHECK (charge_nano >= 0),
    first_token_unix_ms INTEGER,
    settled_unix_ms INTEGER,
    replicas_tried INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant_id, request_id)
) STRICT;
CREATE INDEX usage_by_time ON usage (accepted_unix_ms);
CREATE INDEX usage_open ON usage (epoch) WHERE outcome = 'open';
CREATE TABLE probe (only_row INTEGER PRIMARY KEY, writes INTEGER NOT NULL) STRICT;
INSERT INTO probe VALUES (1, 0);
"""

# One statement for a whole batch: each step of a statement gives the interpreter lock away and has
# to win it back from a busy event loop, so rows inserted one by one take milliseconds each.
INSERT_OPENINGS = """
INSERT INTO usage (tenant_id, request_id, key_id, model, version, currency, price_version,
    prompt_nano_per_mtok, cached_nano_per_mtok, completion_nano_per_mtok, epoch,
    accepted_unix_ms, outcome)
SELECT value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4, value ->> 5, value ->> 6,
    value ->> 7, value ->> 8, value ->> 9, value ->> 10, value ->> 11, 'open'
FROM json_each(?) WHERE true
ON CONFLICT (tenant_id, request_id) DO NOTHING
"""

UPDATE_CHECKPOINTS = """
UPDATE usage SET prompt_tokens = batch.value ->> 2, cached_tokens = batch.value ->> 3,
    completion_tokens = batch.value ->> 4, reasoning_tokens = batch.value ->> 5
FROM json_each(?) AS batch
WHERE usage.tenant_id = batch.value ->> 0 AND usage.request_id = batch.value ->> 1
    AND usage.outcome = 'open'
"""

UPDATE_SETTLEMENTS = """
UPDATE usage SET prompt_tokens = batch.value ->> 2, cached_tokens = batch.value ->> 3,
    completion_tokens = batch.value ->> 4, reasoning_tokens = batch.value ->> 5,
    outcome = batch.value ->> 6, charge_nano = batch.value ->> 7, version = batch.value ->> 8,
    first_token_unix_ms = batch.value ->> 9, settled_unix_ms = batch.value ->> 10,
    replicas_tried = batch.value ->> 11
FROM json_each(?) AS batch
WHERE usage.tenant_id = batch.value ->> 0 AND usage.request_id = batch.value ->> 1
    AND usage.outcome = 'open'
"""

SELECT_SEQ = "SELECT seq FROM usage WHERE tenant_id = ? AND request_id = ?"
WRITE_PROBE = "UPDATE probe SET writes = writes + 1"
SELECT_OPEN_EPOCHS = "SELECT DISTINCT epoch FROM usage WHERE outcome = 'open'"
SELECT_OPEN_OF = """
SELECT seq, currency, price_version, prompt_nano_per_mtok, cached_nano_per_mtok,
    completion_nano_per_mtok, prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens
FROM usage WHERE outcome = 'open' AND epoch = ? ORDER BY seq LIMIT ?
"""
RECOVER = """
UPDATE usage SET outcome = 'recovered', charge_nano = batch.value ->> 1,
    settled_unix_ms = batch.value ->> 2
FROM json_each(?) AS batch WHERE usage.seq = batch.value ->> 0 AND usage.outcome = 'open'
"""
_COLUMNS = """tenant_id, request_id, key_id, model, version, prompt_tokens, cached_tokens,
    completion_tokens, reasoning_tokens, outcome, charge_nano, currency, price_version,
    accepted_unix_ms, first_token_unix_ms, settled_unix_ms, replicas_tried"""

SELECT_RECORDS = f"SELECT {_COLUMNS} FROM usage"  # noqa: S608 - fixed column names
NEWEST_FIRST = "ORDER BY accepted_unix_ms DESC, seq DESC LIMIT ?"
# A sum of 64-bit integers may pass 64 bits; whole units and the rest are summed apart.
SELECT_TOTALS = """
SELECT currency, count(*), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens),
    sum(reasoning_tokens), sum(charge_nano / 1000000000), sum(charge_nano % 1000000000)
FROM usage
"""
EACH_CURRENCY = "GROUP BY currency ORDER BY currency"


def connect(path: Path) -> sqlite3.Connection:
    """A connection for one writer, made with the file if there is none; autocommit.

    `synchronous=NORMAL`: a transaction is handed to the operating system before it is
    acknowledged, so a killed process loses nothing. A power cut may lose the moments since the
    last WAL checkpoint, never the file's consistency.
    """
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(
        path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        ensure_schema(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def connect_reading(path: Path) -> sqlite3.Connection:
    """A connection that cannot write, beside whatever process is writing."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro",
        uri=True,
        timeout=BUSY_MS / 1000,
        isolation_level=None,
    )


def ensure_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables in an empty file; refuse a file of another version."""
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        raise ConfigRefused(
            f"This Python has SQLite {sqlite3.sqlite_version}.",
            why=f"Usage records need {'.'.join(map(str, SQLITE_MIN))} for strict tables.",
            fix="Use a Python built with a newer SQLite, such as Debian 12's.",
        )
    with transaction(connection) as execute:
        (version,) = execute("PRAGMA user_version", ()).fetchone()
        if version == SCHEMA_VERSION:
            return
        if version != 0:
            raise ConfigRefused(
                f"{path} has format {version}; this Headrace writes {SCHEMA_VERSION}.",
                why="Writing to a newer file could lose what its format added.",
                fix="Upgrade Headrace, or set HEADRACE_HOME to another folder.",
            )
        for statement in _SCHEMA.split(";\n"):
            execute(statement, ())
        execute(f"PRAGMA user_version = {SCHEMA_VERSION}", ())


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[Execute]:
    """A block whose statements are stored together, or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection.execute
        connection.execute("COMMIT")
    except BaseException:
        # SQLite has ended the transaction itself after some errors, such as a full disk.
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def opening_row(opening: Opening, epoch: str) -> list[str | int | None]:
    price = opening.price
    return _sound(
        opening.tenant_id,
        opening.request_id,
        opening.key_id,
        opening.model,
        opening.version,
        price.currency,
        price.version,
        price.prompt_nano_per_mtok,
        price.cached_nano_per_mtok,
        price.completion_nano_per_mtok,
        epoch,
        opening.accepted_unix_ms,
    )


def usage_row(key: RequestKey, usage: Usage) -> list[str | int | None]:
    return _sound(
        *key,
        usage.prompt_tokens,
        usage.cached_tokens,
        usage.completion_tokens,
        usage.reasoning_tokens,
    )


def settlement_row(settlement: Settlement) -> list[str | int | None]:
    assert settlement.outcome is not Outcome.OPEN
    assert settlement.charge_femto >= 0
    return _sound(
        *usage_row((settlement.tenant_id, settlement.request_id), settlement.usage),
        settlement.outcome.value,
        settlement.charge_nano,
        settlement.version,
        settlement.first_token_unix_ms,
        settlement.settled_unix_ms,
        settlement.replicas_tried,
    )


def _sound(*values: str | int | None) -> list[str | int | None]:
    """A row that the table can hold: one that it cannot would fail its whole batch."""
    for value in values:
        if isinstance(value, str):
            assert value.isprintable()
        else:
            assert value is None or 0 <= value < 1 << 63
    return list(values)


def as_batch(rows: Sequence[Sequence[str | int | None]]) -> str:
    """What `json_each` reads. SQLite's JSON keeps 64-bit integers exact."""
    return json.dumps(rows, separators=(",", ":"))


def recovered_charge(row: Sequence[str | int]) -> int:
    """The price of a checkpoint, by the price that was frozen when the request was accepted.

    `row` is of SELECT_OPEN_OF, after its first column.
    """
    currency, version, prompt, cached, completion, *tokens = row
    price = Price.text(
        currency=str(currency),
        version=str(version),
        prompt_nano_per_mtok=int(prompt),
        cached_nano_per_mtok=int(cached),
        completion_nano_per_mtok=int(completion),
    )
    return price.charge_nano(_usage([int(each) for each in tokens]))


def record(row: Sequence[str | int | None]) -> UsageRecord:
    """A row of SELECT_RECORDS."""
    tenant_id, request_id, key_id, model, version, *rest = row
    tokens, (outcome, charge, currency, price_version, accepted, first, settled, tried) = (
        rest[:4],
        rest[4:],
    )
    return UsageRecord(
        tenant_id=str(tenant_id),
        request_id=str(request_id),
        key_id=str(key_id),
        model=str(model),
        version=str(version),
        usage=_usage([_whole(each) for each in tokens]),
        outcome=Outcome(str(outcome)),
        charge_nano=_whole(charge),
        currency=str(currency),
        price_version=str(price_version),
        accepted_unix_ms=_whole(accepted),
        first_token_unix_ms=None if first is None else _whole(first),
        settled_unix_ms=None if settled is None else _whole(settled),
        replicas_tried=_whole(tried),
    )


def _usage(tokens: Sequence[int]) -> Usage:
    prompt, cached, completion, reasoning = tokens
    return Usage(
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        reasoning_tokens=reasoning,
    )


def _whole(value: str | int | None) -> int:
    assert isinstance(value, int)
    return value
