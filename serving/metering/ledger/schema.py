"""The ledger's tables, the same in both databases, and how an older ledger becomes a newer one.

| table | one row for each |
|---|---|
| `log` | meter log, with its high-water mark: the last record that was applied |
| `price` | set of frozen rates, named by a digest of what it says |
| `request` | RESERVE or REFUSE of a log, with everything that followed it |
| `quantity` | unit that a settled request used |
| `adjustment`, `credit` | ADJUST and GRANT |
| `balance` | tenant, project, currency and month |
| `invoice` | issued invoice; never changed |
| `epoch` | life of a frontend: where in its log it began |
| `sink` | receiver of events, with its own high-water mark |

A request is named by its log and the number of its record there, which nothing can repeat; tenant
and request id are an index. Amounts are femto-currency in 64 bits. A balance may pass those, so it
is two columns: whole units of currency, and the femto beyond them, 0 to 10^15 - 1.

**Versions.** A release reads its own version and migrates every older one. A migration that only
adds says so (`compatible_with`), so that the release before goes on working beside or after it.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headrace.serving.errors import ConfigRefused
from headrace.serving.metering.ledger.database import INTEGER, TEXT, Columns, Database, Execute

SCHEMA_VERSION = 2

LOG: Columns = {"log_no": INTEGER, "log_id": TEXT, "seq": INTEGER, "unix_ms": INTEGER}
PRICE: Columns = {"price_id": TEXT, "currency": TEXT, "version": TEXT, "rates": TEXT}
REQUEST_KEY: Columns = {"log_no": INTEGER, "seq": INTEGER}
REQUEST_OPENING: Columns = {
    "tenant_id": TEXT,
    "project_id": TEXT,
    "key_id": TEXT,
    "request_id": TEXT,
    "model": TEXT,
    "tier": TEXT,
    "price_id": TEXT,
    "hold_femto": INTEGER,
    "accepted_unix_ms": INTEGER,
    "idempotency_digest": TEXT,
}
REQUEST_END: Columns = {
    "version": TEXT,
    "outcome": TEXT,
    "prompt_tokens": INTEGER,
    "cached_tokens": INTEGER,
    "cache_write_tokens": INTEGER,
    "completion_tokens": INTEGER,
    "reasoning_tokens": INTEGER,
    "charge_femto": INTEGER,
    "waived_femto": INTEGER,
    "first_token_unix_ms": INTEGER,
    "settled_unix_ms": INTEGER,
    "settled_seq": INTEGER,
    "month": INTEGER,
    "replicas_tried": INTEGER,
    "tier_served": TEXT,
    "ttft_us": INTEGER,
    "itl_p50_us": INTEGER,
    "itl_p99_us": INTEGER,
    "verdict": TEXT,
    "missed": TEXT,
}
REQUEST: Columns = {**REQUEST_KEY, **REQUEST_OPENING, **REQUEST_END}
QUANTITY: Columns = {**REQUEST_KEY, "unit": TEXT, "quantity": INTEGER}
ADJUSTMENT: Columns = {
    "tenant_id": TEXT,
    "adjustment_id": TEXT,
    "project_id": TEXT,
    "request_id": TEXT,
    "amount_femto": INTEGER,
    "currency": TEXT,
    "reason": TEXT,
    "actor": TEXT,
    "unix_ms": INTEGER,
    "month": INTEGER,
    **REQUEST_KEY,
}
_CREDIT_1: Columns = {
    "tenant_id": TEXT,
    "grant_id": TEXT,
    "budget_id": TEXT,
    "amount_femto": INTEGER,
    "currency": TEXT,
    "expires_unix_ms": INTEGER,
    "actor": TEXT,
    "unix_ms": INTEGER,
    "month": INTEGER,
    **REQUEST_KEY,
}
_CREDIT_2: Columns = {"project_id": TEXT, "reason": TEXT}
CREDIT: Columns = {**_CREDIT_1, **_CREDIT_2}
WHY_CREDITED = "CASE reason WHEN '' THEN 'credit granted by ' || actor ELSE reason END"
"""What statements and exports say of a row of `credit`."""
BALANCE_KEY: Columns = {
    "tenant_id": TEXT,
    "project_id": TEXT,
    "currency": TEXT,
    "month": INTEGER,
}
BALANCE_SUMS: Columns = {
    "requests": INTEGER,
    "charge_units": INTEGER,
    "charge_femto": INTEGER,
    "adjusted_units": INTEGER,
    "adjusted_femto": INTEGER,
    "credit_units": INTEGER,
    "credit_femto": INTEGER,
}
BALANCE: Columns = {**BALANCE_KEY, **BALANCE_SUMS}
INVOICE: Columns = {
    "number": INTEGER,
    "tenant_id": TEXT,
    "month": INTEGER,
    "currency": TEXT,
    "issued_unix_ms": INTEGER,
    "total_minor": INTEGER,
    "body": TEXT,
}
EPOCH: Columns = {**REQUEST_KEY, "epoch": TEXT}
SINK: Columns = {"sink_id": TEXT, "log_no": INTEGER, "settled_seq": INTEGER}

_NULLABLE = {
    *("first_token_unix_ms", "settled_unix_ms", "settled_seq", "month"),
    *("tier_served", "ttft_us", "itl_p50_us", "itl_p99_us", "verdict", "missed"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    name: str
    columns: Columns
    key: str
    rules: Sequence[str] = ()

    def create(self, database: Database) -> str:
        integer, strict = database.dialect.integer, database.dialect.strict
        lines = [
            f"{name} {integer if kind == INTEGER else 'TEXT'}"
            + ("" if name in _NULLABLE else " NOT NULL")
            for name, kind in self.columns.items()
        ]
        lines += [f"PRIMARY KEY ({self.key})", *self.rules]
        return f"CREATE TABLE {self.name} ({', '.join(lines)}) {strict}"


_TABLES_1 = (
    _Table(name="log", columns=LOG, key="log_no", rules=("UNIQUE (log_id)", "CHECK (seq >= 0)")),
    _Table(name="price", columns=PRICE, key="price_id"),
    _Table(
        name="request",
        columns=REQUEST,
        key="log_no, seq",
        rules=(
            "CHECK (charge_femto >= 0 AND waived_femto >= 0 AND hold_femto >= 0)",
            "CHECK ((outcome = 'open') = (month IS NULL))",
        ),
    ),
    _Table(
        name="quantity",
        columns=QUANTITY,
        key="log_no, seq, unit",
        rules=("CHECK (quantity > 0)",),
    ),
    _Table(name="adjustment", columns=ADJUSTMENT, key="tenant_id, adjustment_id"),
    _Table(name="credit", columns=_CREDIT_1, key="tenant_id, grant_id"),
    _Table(
        name="balance",
        columns=BALANCE,
        key="tenant_id, project_id, currency, month",
        rules=("CHECK (charge_femto >= 0 AND adjusted_femto >= 0 AND credit_femto >= 0)",),
    ),
    _Table(
        name="invoice",
        columns=INVOICE,
        key="number",
        rules=("UNIQUE (tenant_id, month, currency)",),
    ),
    _Table(name="epoch", columns=EPOCH, key="log_no, seq"),
    _Table(name="sink", columns=SINK, key="sink_id, log_no"),
)

_INDEXES_1 = (
    "CREATE INDEX request_by_id ON request (tenant_id, request_id)",
    "CREATE INDEX request_by_time ON request (accepted_unix_ms)",
    "CREATE INDEX request_by_month ON request (month, tenant_id)",
    "CREATE INDEX request_by_end ON request (log_no, settled_seq)",
    "CREATE INDEX request_open ON request (log_no) WHERE outcome = 'open'",
)


def ensure(database: Database) -> None:
    """Make the tables, or bring older ones up to this version.

    Raises:
        ConfigRefused: the ledger is of a version that this release cannot use.
        LedgerUnavailable: the database does not answer.
    """
    version, compatible_with = _version(database)
    if version < SCHEMA_VERSION:
        with database.transaction() as execute:
            execute(database.dialect.lock, ())
            _create_version_table(execute, database)
            ((version,),) = execute("SELECT version FROM ledger_schema", ())
            for step in range(version + 1, SCHEMA_VERSION + 1):
                for statement in _STEPS[step].statements(database):
                    execute(statement, ())
                execute(
                    "UPDATE ledger_schema SET version = ?, compatible_with = ?",
                    (step, _STEPS[step].compatible_with),
                )
    elif compatible_with > SCHEMA_VERSION:
        raise ConfigRefused(
            f"The ledger in {database.name} has format {version}; this Headrace knows"
            f" {SCHEMA_VERSION}.",
            why=f"Formats from {compatible_with} on can be used beside it; an older one would"
            " lose what it added.",
            fix="Upgrade Headrace, or give it another ledger: the logs can fill it.",
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """From the version before to this one."""

    compatible_with: int
    """The oldest release that goes on working on the result."""
    statements: Callable[[Database], Sequence[str]]


def _first(database: Database) -> Sequence[str]:
    return [*(table.create(database) for table in _TABLES_1), *_INDEXES_1]


def _credits_say_why(_: Database) -> Sequence[str]:
    # The release before fills neither column, and what it granted has neither.
    return [f"ALTER TABLE credit ADD COLUMN {name} TEXT NOT NULL DEFAULT ''" for name in _CREDIT_2]


_STEPS: Mapping[int, _Step] = {
    1: _Step(compatible_with=1, statements=_first),
    2: _Step(compatible_with=1, statements=_credits_say_why),
}


def _version(database: Database) -> tuple[int, int]:
    """Version and the oldest it is compatible with; (0, 0) where there is no ledger yet."""
    if not database.rows(database.dialect.has_table, ("ledger_schema",)):
        return 0, 0
    ((version, compatible_with),) = database.rows(
        "SELECT version, compatible_with FROM ledger_schema"
    )
    return version, compatible_with


def _create_version_table(execute: Execute, database: Database) -> None:
    integer, strict = database.dialect.integer, database.dialect.strict
    execute(
        f"CREATE TABLE IF NOT EXISTS ledger_schema (only_row {integer} PRIMARY KEY,"
        f" version {integer} NOT NULL, compatible_with {integer} NOT NULL) {strict}",
        (),
    )
    execute("INSERT INTO ledger_schema VALUES (1, 0, 0) ON CONFLICT DO NOTHING", ())


def price_id(*, currency: str, version: str, rates: str) -> str:
    """The name of a set of rates: the same rates always have the same."""
    return hashlib.sha256(json.dumps([currency, version, rates]).encode()).hexdigest()[:32]
