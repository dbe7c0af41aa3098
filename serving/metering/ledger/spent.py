"""What one life of one frontend charged against one budget: what its lost leases came to."""

from datetime import UTC, datetime, timedelta

from headrace.serving.metering.ledger.database import Value, exact, sum_of
from headrace.serving.metering.ledger.ledger import Ledger

_COLUMNS = {
    "organisation": ("tenant_id",),
    "project": ("tenant_id", "project_id"),
    "key": ("key_id",),
}


def spent_femto(
    ledger: Ledger, *, log_id: str, epoch: str, limit_name: str, period: str
) -> int | None:
    """Charges of requests that this life accepted, that this budget pays for, in this period.

    Args:
        ledger: caught up with the log.
        log_id: the frontend's.
        epoch: which of its lives.
        limit_name: `subject|model or *|metric|currency`, as `Limit.name` makes it.
        period: `2026-11`, `2026-11-27`, or empty for all time.

    Returns:
        Femto-currency; None when the log does not know this life.
    """
    ledger.prepare()
    found = ledger.database.rows(
        "SELECT epoch.log_no, epoch.seq, (SELECT min(later.seq) FROM epoch AS later WHERE"
        " later.log_no = epoch.log_no AND later.seq > epoch.seq) FROM epoch JOIN log ON"
        " log.log_no = epoch.log_no WHERE log.log_id = ? AND epoch.epoch = ?",
        (log_id, epoch),
    )
    if not found:
        return None
    ((log_no, first_seq, next_seq),) = found
    subject, model, _, currency = limit_name.split("|")
    kind, _, name = subject.partition(":")
    conditions: list[tuple[str, Value]] = [
        ("request.log_no = ?", log_no),
        ("request.seq > ?", first_seq),
        ("price.currency = ?", currency),
    ]
    names = name.split("/")
    conditions += [
        (f"request.{column} = ?", value)
        for column, value in zip(_COLUMNS[kind], names, strict=True)
    ]
    if next_seq is not None:
        conditions.append(("request.seq < ?", next_seq))
    if model != "*":
        conditions.append(("request.model = ?", model))
    if period:
        begins, ends = _bounds_unix_ms(period)
        conditions += [
            ("request.accepted_unix_ms >= ?", begins),
            ("request.accepted_unix_ms < ?", ends),
        ]
    ((high, low),) = ledger.database.rows(
        f"SELECT {sum_of('charge_femto')} FROM request JOIN price ON price.price_id ="
        f" request.price_id WHERE {' AND '.join(text for text, _ in conditions)}",
        [value for _, value in conditions],
    )
    return exact(high, low)


def _bounds_unix_ms(period: str) -> tuple[int, int]:
    """A month or a day, UTC: its first millisecond and the one after its last."""
    parts = [int(part) for part in period.split("-")]
    if len(parts) == 3:
        begins = datetime(parts[0], parts[1], parts[2], tzinfo=UTC)
        ends = begins + timedelta(days=1)
    else:
        begins = datetime(parts[0], parts[1], 1, tzinfo=UTC)
        ends = datetime(parts[0] + parts[1] // 12, parts[1] % 12 + 1, 1, tzinfo=UTC)
    return int(begins.timestamp() * 1000), int(ends.timestamp() * 1000)
