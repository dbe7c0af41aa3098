"""Proves that the books agree: log, ledger, what clients were told, what engines counted.

The log is read from its first record, and every charge is computed again from quantities, frozen
rates and the outcome table, without looking at what the ledger did. Then:

* every RESERVE and REFUSE of the log is a request of the ledger, and nothing else is;
* every request that ended has the tenant, usage, quantities and charge that the log says, and the
  charge is what its rates make of them;
* sums over each (tenant, project, currency, month) are its balance, and sums over each (tenant,
  unit) are the ledger's;
* no request id of a tenant was charged twice.

A difference of one femto is a difference. Memory is bounded by the requests that are open at once,
the tenants and the units, not by the length of the log.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import AmountOutOfRange, UnknownUnit
from headrace.serving.metering import outcomes
from headrace.serving.metering.ledger import schema
from headrace.serving.metering.ledger.database import (
    INTEGER,
    Row,
    as_batch,
    columns_of,
    exact,
    sum_of,
)
from headrace.serving.metering.ledger.fold import BalanceKey, Counted, Effects, Fold, Request
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.source import Logged, Source

BATCH_RECORDS = 2_000
SHOWN_MAX = 100
"""Differences that are kept; further ones are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Two books that disagree about one thing."""

    what: str
    """One sentence, with both values."""
    tenant_id: str = ""
    request_id: str = ""


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a reconciliation saw."""

    requests: int = 0
    """That ended, and were compared."""
    open_requests: int = 0
    charge_femto: int = 0
    """Over all currencies: a check sum, not an amount."""
    difference_femto: int = 0
    """Absolute differences between what was charged and what the log makes of it, added up."""
    differences: list[Difference] = field(default_factory=list[Difference])
    """The first ones."""
    differences_found: int = 0

    @property
    def agree(self) -> bool:
        return self.differences_found == 0

    def note(self, what: str, request: Request | None = None, *, femto: int = 0) -> None:
        self.difference_femto += abs(femto)
        names = (request.tenant_id, request.request_id) if request else ("", "")
        self.add(Difference(what=what, tenant_id=names[0], request_id=names[1]))

    def add(self, difference: Difference) -> None:
        self.differences_found += 1
        if len(self.differences) < SHOWN_MAX:
            self.differences.append(difference)


def reconcile(sources: Sequence[Source], ledger: Ledger, *, month: int | None = None) -> Findings:
    """Compare logs and ledger, as far as the ledger has come in each log.

    Args:
        sources: every log that the ledger is made of; one that is not here is a difference.
        ledger: of these logs.
        month: compare only requests that ended in this one; which requests there are is compared
            in any case.

    Raises:
        LedgerUnavailable, MeterUnavailable: a book cannot be read.
        MeterLogDamaged: the log itself is not sound.
    """
    findings = Findings()
    books = _Books(month)
    for source in sources:
        _OneLog(source, ledger, findings, books).compare()
    known = {source.log_id for source in sources}
    ledger.prepare()
    for (log_id,) in ledger.database.rows("SELECT log_id FROM log WHERE seq > 0 ORDER BY log_id"):
        if log_id not in known:
            findings.note(f"The ledger has log {log_id}, which is not here to compare.")
    _compare_sums(ledger, findings, books)
    _find_double_charges(ledger, findings)
    return findings


@dataclass(slots=True, eq=False)
class _Books:
    """Sums that the logs make."""

    month: int | None
    """Only of this one."""
    balances: Effects = field(default_factory=Effects)
    units: "Counter[tuple[str, str]]" = field(default_factory=Counter[tuple[str, str]])
    """By tenant and unit, over requests that ended."""


class _OneLog:
    """One log on its way past the ledger."""

    def __init__(self, source: Source, ledger: Ledger, findings: Findings, books: _Books) -> None:
        self._source = source
        self._ledger = ledger
        self._findings = findings
        self._books = books

    def compare(self) -> None:
        mark = self._ledger.high_water(self._source.log_id)
        fold, seq = Fold(self._ledger.log_no(self._source.log_id), {}, {}), 0
        while seq < mark:
            batch = self._source.after(seq, min(BATCH_RECORDS, mark - seq))
            if not batch:
                self._findings.note(
                    f"Log {self._source.log_id} ends at record {seq:,}; the ledger has it up to"
                    f" {mark:,}."
                )
                return
            self._compare_batch(fold, batch)
            seq = batch[-1].seq
        self._findings.open_requests += sum(request.is_open for request in fold.known.values())

    def _compare_batch(self, fold: Fold, batch: Sequence[Logged]) -> None:
        fold.effects = Effects()
        for logged in batch:
            checkpoint = logged.event.HasField("checkpoint") and logged.event.checkpoint.reserve
            if not checkpoint or checkpoint in fold.known:  # What has ended is forgotten here.
                fold.apply(logged)
        effects = fold.effects
        made = {
            each.seq for each in batch if each.event.WhichOneof("kind") in ("reserve", "refuse")
        }
        self._compare_existence(fold, made, first=batch[0].seq, last=batch[-1].seq)
        over = [request for request in effects.requests.values() if not request.is_open]
        ended = [each for each in over if self._books.month in (None, each.month)]
        quantities: dict[int, dict[str, int]] = {}
        for _, seq, unit, quantity in effects.quantities:
            quantities.setdefault(int(str(seq)), {})[str(unit)] = int(str(quantity))
        self._compare_requests(fold, ended, quantities)
        self._compare_corrections("adjustment", schema.ADJUSTMENT, effects.adjustments)
        self._compare_corrections("credit", schema.CREDIT, effects.credits)
        self._add(effects, ended, quantities)
        for request in over:
            fold.known.pop(request.seq, None)

    def _compare_existence(self, fold: Fold, made: set[int], *, first: int, last: int) -> None:
        rows = self._ledger.database.rows(
            "SELECT seq, tenant_id, request_id FROM request"
            " WHERE log_no = ? AND seq BETWEEN ? AND ?",
            (fold.log_no, first, last),
        )
        for seq, tenant_id, request_id in rows:
            if seq not in made:
                self._findings.note(
                    f"Request {request_id!r} of {tenant_id} is in the ledger; record {seq:,} of log"
                    f" {self._source.log_id} made none."
                )
        for seq in sorted(made - {row[0] for row in rows}):
            self._findings.note(
                f"Record {seq:,} of log {self._source.log_id} made a request that the ledger has"
                " not.",
                fold.effects.requests.get(seq),
            )

    def _compare_requests(
        self, fold: Fold, ended: Sequence[Request], quantities: Mapping[int, Mapping[str, int]]
    ) -> None:
        # CROSS JOIN: by key, one after the other; see `ledger._Statements`.
        keys = as_batch([[request.seq] for request in ended])
        table = self._ledger.database.dialect.batch({"seq": INTEGER})
        found: dict[int, Row] = {
            row[1]: row
            for row in self._ledger.database.rows(
                f"SELECT {columns_of(schema.REQUEST, prefix='request.')} FROM {table}"
                " CROSS JOIN request WHERE request.seq = batch.seq AND request.log_no = ?",
                (keys, fold.log_no),
            )
        }
        counted: dict[int, dict[str, int]] = {}
        for seq, unit, quantity in self._ledger.database.rows(
            f"SELECT quantity.seq, quantity.unit, quantity.quantity FROM {table}"
            " CROSS JOIN quantity WHERE quantity.seq = batch.seq AND quantity.log_no = ?",
            (keys, fold.log_no),
        ):
            counted.setdefault(seq, {})[unit] = quantity
        for request in ended:
            mine = quantities.get(request.seq, {})
            self._compare_charge(fold, request, mine)
            row = found.get(request.seq)
            if row is None:
                continue  # Said by _compare_existence, of the batch that made it.
            self._compare_row(request, row)
            if counted.get(request.seq, {}) != mine:
                self._findings.note(
                    f"Request {request.request_id!r} used {mine} by the log and"
                    f" {counted.get(request.seq, {})} by the ledger.",
                    request,
                )

    def _compare_charge(self, fold: Fold, request: Request, counted: Mapping[str, int]) -> None:
        """What was charged against what the frozen rates and the outcome make of it."""
        self._findings.requests += 1
        self._findings.charge_femto += request.charge_femto
        price = fold.frozen[request.price_id].price
        try:
            due = outcomes.charge_femto(price, Counted(counted), Outcome(request.outcome))
        except (UnknownUnit, AmountOutOfRange) as error:
            self._findings.note(
                f"Request {request.request_id!r} cannot be charged again: {error.what}", request
            )
            return
        if due != request.charge_femto:
            self._findings.note(
                f"Request {request.request_id!r} was charged {request.charge_femto:,} femto; its"
                f" quantities and rates make {due:,}.",
                request,
                femto=due - request.charge_femto,
            )

    def _compare_row(self, request: Request, row: Row) -> None:
        for name, mine, theirs in zip(schema.REQUEST, request.row(), row, strict=True):
            if mine != theirs:
                femto = int(str(mine)) - theirs if name == "charge_femto" else 0
                self._findings.note(
                    f"Request {request.request_id!r} has {name} {mine!r} by the log and {theirs!r}"
                    " by the ledger.",
                    request,
                    femto=femto,
                )

    def _compare_corrections(
        self, table: str, columns: Mapping[str, str], rows: Sequence[Sequence[object]]
    ) -> None:
        """The ledger's correction of that id says the same, whichever log it came from first."""
        names = list(columns)
        key, what = names[1], slice(0, 6)
        for row in rows:
            tenant_id, correction_id = str(row[0]), str(row[1])
            found = self._ledger.database.rows(
                f"SELECT {columns_of(columns)} FROM {table} WHERE tenant_id = ? AND {key} = ?",
                (tenant_id, correction_id),
            )
            if not found or tuple(found[0][what]) != tuple(row[what]):
                self._findings.note(
                    f"The {table} {correction_id!r} of {tenant_id} is {row[what]} by the log and"
                    f" {found[0][what] if found else 'missing'} by the ledger."
                )

    def _add(
        self,
        effects: Effects,
        ended: Sequence[Request],
        quantities: Mapping[int, Mapping[str, int]],
    ) -> None:
        for key, balance in effects.balances.items():
            if self._books.month not in (None, key[3]):
                continue
            mine = self._books.balances.balance(key)
            mine.requests += balance.requests
            mine.charge += balance.charge
        for request in ended:
            for unit, quantity in quantities.get(request.seq, {}).items():
                self._books.units[request.tenant_id, unit] += quantity


def _compare_sums(ledger: Ledger, findings: Findings, books: _Books) -> None:
    """Sums that logs make, sums over the ledger's rows, and its balances."""
    of_month = "" if books.month is None else " AND request.month = ?"
    values = () if books.month is None else (books.month,)
    by_rows: dict[BalanceKey, tuple[int, int]] = {
        (tenant, project, currency, month): (requests, exact(high, low))
        for tenant, project, currency, month, requests, high, low in ledger.database.rows(
            "SELECT tenant_id, project_id, price.currency, month, count(*),"
            f" {sum_of('charge_femto')} FROM request JOIN price ON price.price_id ="
            f" request.price_id WHERE month IS NOT NULL{of_month}"
            " GROUP BY tenant_id, project_id, price.currency, month",
            values,
        )
    }
    by_logs = {
        key: (balance.requests, balance.charge) for key, balance in books.balances.balances.items()
    }
    for key in sorted(by_rows.keys() | by_logs.keys()):
        mine, theirs = by_logs.get(key, (0, 0)), by_rows.get(key, (0, 0))
        if mine != theirs:
            findings.note(
                f"{key}: {mine[0]:,} requests and {mine[1]:,} femto by the logs, {theirs[0]:,} and"
                f" {theirs[1]:,} by the ledger."
            )
    _compare_balances(ledger, findings)
    units = {
        (tenant, unit): exact(high, low)
        for tenant, unit, high, low in ledger.database.rows(
            f"SELECT tenant_id, unit, {sum_of('quantity')} FROM quantity JOIN request ON"
            " request.log_no = quantity.log_no AND request.seq = quantity.seq"
            f" WHERE true{of_month} GROUP BY tenant_id, unit",
            values,
        )
    }
    for key in sorted(units.keys() | books.units.keys()):
        if units.get(key, 0) != books.units[key]:
            findings.note(
                f"{key}: {books.units[key]:,} by the logs and {units.get(key, 0):,} by the ledger."
            )


def _compare_balances(ledger: Ledger, findings: Findings) -> None:
    """Balances against the rows they are sums of."""
    sums: dict[BalanceKey, list[int]] = {}
    for column, query in enumerate(_BALANCE_PARTS):
        for *key, count, high, low in ledger.database.rows(query):
            entry = sums.setdefault((key[0], key[1], key[2], key[3]), [0, 0, 0, 0])
            entry[0] += count if column == 0 else 0
            entry[1 + column] += exact(high, low)
    for each in LedgerReader(ledger).balances():
        key = (each.tenant_id, each.project_id, each.currency, each.month)
        kept = [each.requests, each.charge_femto, each.adjusted_femto, each.credit_femto]
        if (rows := sums.pop(key, [0, 0, 0, 0])) != kept:
            findings.note(f"The balance of {key} is {kept}; its rows make {rows}.")
    for key, rows in sorted(sums.items()):
        if any(rows):
            findings.note(f"There is no balance of {key}; its rows make {rows}.")


_BALANCE_PARTS = (
    "SELECT tenant_id, project_id, price.currency, month, count(*),"
    f" {sum_of('charge_femto')} FROM request JOIN price ON price.price_id = request.price_id"
    " WHERE month IS NOT NULL GROUP BY tenant_id, project_id, price.currency, month",
    f"SELECT tenant_id, project_id, currency, month, count(*), {sum_of('amount_femto')}"
    " FROM adjustment GROUP BY tenant_id, project_id, currency, month",
    f"SELECT tenant_id, project_id, currency, month, count(*), {sum_of('amount_femto')}"
    " FROM credit WHERE budget_id = '' GROUP BY tenant_id, project_id, currency, month",
)


def _find_double_charges(ledger: Ledger, findings: Findings) -> None:
    """A request id is charged at most once, whichever frontends it reached."""
    for tenant_id, request_id, times in ledger.database.rows(
        "SELECT tenant_id, request_id, count(*) FROM request WHERE charge_femto > 0"
        " GROUP BY tenant_id, request_id HAVING count(*) > 1"
        " ORDER BY tenant_id, request_id LIMIT ?",
        (SHOWN_MAX,),
    ):
        findings.note(
            f"Request {request_id!r} of {tenant_id} was charged {times} times; correct it by an"
            " adjustment.",
        )
