"""Records of version 1, the table `usage` in the same SQLite file, brought into the ledger.

The table stays where it is, so that the release that wrote it can go on with it. Its settled rows
are taken in order, once; rows that a dead frontend left open are first settled at their last
checkpoint, as that release would have done. A row that a live one still runs is waited for.

Version 1 kept charges in whole nano, rounded up. The exact charge is computed again from the tokens
and the rates that every row kept, and must round to the same.
"""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from headrace.serving.domain.record import DEFAULT_PROJECT
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Outcome, Price, Usage, nano_of
from headrace.serving.errors import LedgerUnavailable
from headrace.serving.metering import outcomes
from headrace.serving.metering.epochs import is_alive
from headrace.serving.metering.ledger.fold import Effects, Frozen, Request
from headrace.serving.metering.ledger.ledger import FORMER_LOG_ID, Ledger
from headrace.serving.metering.ledger.record_fields import month_of

_ROWS = 5_000
"""Rows of one transaction: a quarter of a second."""
_BUSY_S = 5

_SELECT = """
SELECT seq, tenant_id, request_id, key_id, model, version, currency, price_version,
    prompt_nano_per_mtok, cached_nano_per_mtok, completion_nano_per_mtok, epoch, accepted_unix_ms,
    outcome, prompt_tokens, cached_tokens, completion_tokens, reasoning_tokens, charge_nano,
    first_token_unix_ms, settled_unix_ms, replicas_tried
FROM usage WHERE seq > ? ORDER BY seq LIMIT ?
"""
_HAS_TABLE = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'usage'"


def import_former(path: Path, ledger: Ledger, *, now_unix_ms: Callable[[], int]) -> int:
    """Bring over what version 1 left in the file of `ledger`; answers how many requests.

    Idempotent, and cheap when there is nothing: one look at the highest row.

    Args:
        path: of the file; `ledger` is in the same.
        ledger: where the requests go.
        now_unix_ms: when a request that is settled here was settled.

    Raises:
        LedgerUnavailable: the file cannot be read.
    """
    ledger.prepare()
    imported = 0
    try:
        with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as connection:
            if connection.execute(_HAS_TABLE).fetchone() is None:
                return 0
            while True:
                mark = ledger.high_water(FORMER_LOG_ID)
                rows = connection.execute(_SELECT, (mark, _ROWS)).fetchall()
                done = _until_live(rows, path.with_name(path.name + ".epochs"))
                if not done:
                    return imported
                ledger.import_former(int(done[-1][0]), _effects(ledger, done, now_unix_ms()))
                imported += len(done)
    except sqlite3.Error as error:
        raise LedgerUnavailable(
            f"The usage records in {path} cannot be read: {error}.",
            why="An earlier release wrote them, and they belong to the ledger.",
            fix="Check the file with `headrace doctor`.",
        ) from error


def _until_live(rows: Sequence[Sequence[str | int]], locks: Path) -> Sequence[Sequence[str | int]]:
    """The rows before the first one whose frontend is still at work on it."""
    for index, row in enumerate(rows):
        if row[13] == Outcome.OPEN.value and is_alive(locks, str(row[11])):
            return rows[:index]
    return rows


def _effects(ledger: Ledger, rows: Sequence[Sequence[str | int]], now_unix_ms: int) -> Effects:
    log_no, effects = ledger.log_no(FORMER_LOG_ID), Effects()
    for row in rows:
        (seq, tenant_id, request_id, key_id, model, version, currency, price_version, *rest) = row
        (prompt_rate, cached_rate, completion_rate, _, accepted, outcome, *counts) = rest
        (prompt, cached, completion, reasoning, charge_nano, first, settled, tried) = counts
        price = Price.text(
            currency=str(currency),
            version=str(price_version),
            prompt_nano_per_mtok=int(prompt_rate),
            cached_nano_per_mtok=int(cached_rate),
            completion_nano_per_mtok=int(completion_rate),
        )
        usage = Usage(
            prompt_tokens=int(prompt),
            cached_tokens=int(cached),
            completion_tokens=int(completion),
            reasoning_tokens=int(reasoning),
        )
        frozen = Frozen.of(currency=price.currency, version=price.version, rates=price.rates)
        effects.prices[frozen.price_id] = frozen
        ending = Outcome(str(outcome))
        if ending is Outcome.OPEN:
            ending, settled = Outcome.RECOVERED, now_unix_ms
            charge_femto = outcomes.charge_femto(price, usage, ending)
        else:
            charge_femto = _exact(price, usage, int(charge_nano))
        request = Request(
            log_no=log_no,
            seq=int(seq),
            tenant_id=str(tenant_id),
            project_id=DEFAULT_PROJECT,
            key_id=str(key_id),
            request_id=str(request_id),
            model=str(model),
            tier=Tier.STANDARD.value,
            price_id=frozen.price_id,
            hold_femto=0,
            accepted_unix_ms=int(accepted),
            version=str(version),
            outcome=ending.value,
            charge_femto=charge_femto,
            waived_femto=outcomes.waived_femto(price, usage, ending),
            first_token_unix_ms=int(first) if first is not None else None,
            settled_unix_ms=int(settled),
            settled_seq=int(seq),
            month=month_of(int(settled)),
            replicas_tried=int(tried),
        )
        request.uses(usage)
        effects.requests[request.seq] = request
        effects.ended(request, price, usage.quantities())
    return effects


def _exact(price: Price, usage: Usage, charge_nano: int) -> int:
    """The femto behind a charge in nano; the nano themselves where the rates do not explain it."""
    femto = price.charge_femto(usage) if charge_nano else 0
    return femto if nano_of(femto) == charge_nano else charge_nano * 10**6
