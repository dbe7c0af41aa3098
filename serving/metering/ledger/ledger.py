"""The ledger that a log is projected into: one transaction for a batch and its high-water mark.

At-least-once delivery, exactly-once effect: records at or below the mark are passed over, and a
batch that leaves a gap above it is refused. So it does not matter how often a batch comes, whether
the acknowledgement of a commit was lost, or who else is applying the same log meanwhile.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

from headrace.serving.domain.usage import Price
from headrace.serving.errors import MeterLogDamaged, ServingError
from headrace.serving.metering.ledger import schema
from headrace.serving.metering.ledger.database import (
    Columns,
    Database,
    Dialect,
    Execute,
    Value,
    as_batch,
    columns_of,
)
from headrace.serving.metering.ledger.fold import Effects, Fold, Frozen, Request, holds_of
from headrace.serving.metering.ledger.source import Logged


class Ledger:
    """One ledger in one database. For one thread at a time, like its database."""

    def __init__(self, database: Database) -> None:
        """Makes or migrates the tables at the first use."""
        self.database = database
        self._is_ready = False

    @property
    def name(self) -> str:
        return self.database.name

    def high_water(self, log_id: str) -> int:
        """The last record of this log that was applied; 0 before the first.

        Raises:
            LedgerUnavailable: the database does not answer.
        """
        self.prepare()
        rows = self.database.rows("SELECT seq FROM log WHERE log_id = ?", (log_id,))
        return rows[0][0] if rows else 0

    def apply(self, log_id: str, batch: Sequence[Logged]) -> int:
        """Apply what is new in a batch; answers the high-water mark afterwards.

        Args:
            log_id: whose records they are.
            batch: records of that log in order, without a gap among them; any may have come before.

        Raises:
            MeterLogDamaged: records are missing between the mark and the batch, or one contradicts
                the log; what comes before it is applied.
            AmountOutOfRange: the same, for an amount that is negative or too large.
            LedgerUnavailable: nothing is applied, or the acknowledgement was lost: repeat it.
        """
        self.prepare()
        assert all(each.log_id == log_id for each in batch)
        assert all(after.seq == each.seq + 1 for each, after in pairwise(batch))
        refusal: ServingError | None = None
        with self.database.transaction() as execute:
            log_no, mark = self._lock(execute, log_id)
            fresh = [each for each in batch if each.seq > mark]
            if fresh and fresh[0].seq != mark + 1:
                raise _gap(log_id, mark=mark, found=fresh[0].seq)
            if fresh:
                sound, effects, refusal = self._fold(execute, log_no, fresh)
                if sound:
                    self._write(execute, effects)
                    mark = sound[-1].seq
                    values = (mark, sound[-1].event.unix_ms, log_no)
                    execute("UPDATE log SET seq = ?, unix_ms = ? WHERE log_no = ?", values)
        if refusal is not None:
            raise refusal
        return mark

    def log_no(self, log_id: str) -> int:
        """The number that stands for a log in the tables of this ledger; made on first use."""
        self.prepare()
        with self.database.transaction() as execute:
            return self._lock(execute, log_id)[0]

    def was_used(self, *, tenant_id: str, request_id: str) -> bool:
        """Whether the tenant's request is in the ledger. 10 us on a local file.

        Records that are not projected yet are not: whoever asks keeps the ids beyond the mark.
        """
        self.prepare()
        statement = "SELECT 1 FROM request WHERE tenant_id = ? AND request_id = ? LIMIT 1"
        return bool(self.database.rows(statement, (tenant_id, request_id)))

    def prepare(self) -> None:
        """Make or migrate the tables, once.

        Raises:
            ConfigRefused: the ledger is of a version that this release cannot use.
        """
        if not self._is_ready:
            schema.ensure(self.database)
            self._is_ready = True

    def close(self) -> None:
        self.database.close()

    def _lock(self, execute: Execute, log_id: str) -> tuple[int, int]:
        """Number and mark of the log, which is this transaction's own until it ends."""
        # Updating the row takes PostgreSQL's lock on it; SQLite's transaction is the only one.
        if not (rows := execute(_LOCK_LOG, (log_id,))):
            execute(self.database.dialect.lock, ())
            execute(_INSERT_LOG, (log_id,))
            rows = execute(_LOCK_LOG, (log_id,))
        ((log_no, mark),) = rows
        return log_no, mark

    def _fold(
        self, execute: Execute, log_no: int, batch: Sequence[Logged]
    ) -> tuple[Sequence[Logged], Effects, ServingError | None]:
        """What the batch does; up to the first record that is refused, if one is."""
        refusal: ServingError | None = None
        while True:
            fold = self._begin_fold(execute, log_no, batch)
            for index, logged in enumerate(batch):
                try:
                    fold.apply(logged)
                except ServingError as error:
                    # It may have done half of its work, so what is before it is folded again.
                    refusal, batch = error, batch[:index]
                    break
            else:
                return batch, self._once(execute, fold.effects), refusal

    def _begin_fold(self, execute: Execute, log_no: int, batch: Sequence[Logged]) -> Fold:
        holds = holds_of(batch)
        known: dict[int, Request] = {}
        frozen: dict[str, Frozen] = {}
        if holds:
            statement = _statements(self.database.dialect).select_held
            rows = execute(statement, (as_batch([[hold] for hold in holds]), log_no))
            for *columns, currency, version, rates in rows:
                request = Request(**dict(zip(schema.REQUEST, columns, strict=True)))
                known[request.seq] = request
                price = Price(currency=currency, version=version, rates=json.loads(rates))
                frozen[request.price_id] = Frozen(request.price_id, price)
        return Fold(log_no, known, frozen)

    def _once(self, execute: Execute, effects: Effects) -> Effects:
        """Write adjustments and credits, and count those whose id no log had brought before."""
        statements = _statements(self.database.dialect)
        if effects.adjustments:
            rows = execute(statements.insert_adjustments, (as_batch(sorted(effects.adjustments)),))
            for tenant_id, project_id, currency, month, amount in rows:
                effects.balance((tenant_id, project_id, currency, month)).adjusted += amount
        if effects.credits:
            rows = execute(statements.insert_credits, (as_batch(sorted(effects.credits)),))
            for tenant_id, project_id, budget_id, currency, month, amount in rows:
                if not budget_id:  # Else a slice of a budget that a frontend may spend: no gift.
                    effects.balance((tenant_id, project_id, currency, month)).credit += amount
        return effects

    def _write(self, execute: Execute, effects: Effects) -> None:
        statements = _statements(self.database.dialect)
        rows: Mapping[str, Sequence[Sequence[Value]]] = {
            # In one order for everybody, so that two frontends' batches cannot lock crosswise.
            statements.insert_prices: [each.row() for _, each in sorted(effects.prices.items())],
            statements.upsert_requests: [each.row() for each in effects.requests.values()],
            statements.insert_quantities: effects.quantities,
            statements.insert_epochs: effects.epochs,
            statements.upsert_balances: [
                effects.balances[key].row(key) for key in sorted(effects.balances)
            ],
        }
        for statement, batch in rows.items():
            if batch:
                execute(statement, (as_batch(batch),))


_INSERT_LOG = """
INSERT INTO log (log_no, log_id, seq, unix_ms)
SELECT coalesce(max(log_no), 0) + 1, ?, 0, 0 FROM log WHERE true
ON CONFLICT (log_id) DO NOTHING
"""
_LOCK_LOG = "UPDATE log SET seq = seq WHERE log_id = ? RETURNING log_no, seq"


class _Statements:
    """The statements that a batch needs, in one database's spelling."""

    def __init__(self, dialect: Dialect) -> None:
        # CROSS JOIN: SQLite then takes the batch first and finds each hold by its key. Left to
        # itself it reads the whole log for each, as it cannot know how short a batch is.
        self.select_held = (
            f"SELECT {columns_of(schema.REQUEST, prefix='request.')}, price.currency,"
            f" price.version, price.rates FROM {dialect.batch({'hold': 'integer'})}"
            " CROSS JOIN request JOIN price ON price.price_id = request.price_id"
            " WHERE request.seq = batch.hold AND request.log_no = ?"
        )
        self.insert_prices = _insert(dialect, "price", schema.PRICE) + " ON CONFLICT DO NOTHING"
        self.upsert_requests = (
            _insert(dialect, "request", schema.REQUEST)
            + " ON CONFLICT (log_no, seq) DO UPDATE SET "
            + ", ".join(f"{name} = excluded.{name}" for name in schema.REQUEST_END)
        )
        self.insert_epochs = _insert(dialect, "epoch", schema.EPOCH)
        self.insert_quantities = _insert(dialect, "quantity", schema.QUANTITY)
        self.insert_adjustments = (
            _insert(dialect, "adjustment", schema.ADJUSTMENT)
            + " ON CONFLICT (tenant_id, adjustment_id) DO NOTHING"
            " RETURNING tenant_id, project_id, currency, month, amount_femto"
        )
        self.insert_credits = (
            _insert(dialect, "credit", schema.CREDIT)
            + " ON CONFLICT (tenant_id, grant_id) DO NOTHING"
            " RETURNING tenant_id, project_id, budget_id, currency, month, amount_femto"
        )
        self.upsert_balances = (
            _insert(dialect, "balance", schema.BALANCE)
            + " ON CONFLICT (tenant_id, project_id, currency, month) DO UPDATE SET"
            " requests = balance.requests + excluded.requests, "
            + ", ".join(map(_added, ("charge", "adjusted", "credit")))
        )


def _added(amount: str) -> str:
    """Femto carry over into units."""
    femto = f"(balance.{amount}_femto + excluded.{amount}_femto)"
    return (
        f"{amount}_units = balance.{amount}_units + excluded.{amount}_units + {femto} / {10**15},"
        f" {amount}_femto = {femto} % {10**15}"
    )


def _insert(dialect: Dialect, table: str, columns: Columns) -> str:
    names = columns_of(columns)
    # `WHERE true`: without it SQLite reads ON CONFLICT as the condition of a join.
    return f"INSERT INTO {table} ({names}) SELECT {names} FROM {dialect.batch(columns)} WHERE true"


@lru_cache(maxsize=2)
def _statements(dialect: Dialect) -> _Statements:
    return _Statements(dialect)


def _gap(log_id: str, *, mark: int, found: int) -> MeterLogDamaged:
    return MeterLogDamaged(
        f"Log {log_id} goes on at record {found:,}; the ledger has it up to {mark:,}.",
        why="Records are missing in between, and a ledger with a hole would be wrong for ever.",
        fix="Bring the missing segments back into the log's folder; the ledger follows by itself.",
    )
