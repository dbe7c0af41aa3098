"""Metrics of the ledgers that follow this frontend's log, beside those of `observe`."""

from collections.abc import Callable, Sequence

from prometheus_client import Gauge

from headrace.serving.metering.ledger.projector import Lag
from headrace.serving.observe import Metrics, Spec

LEDGER_LAG = Spec(
    "headrace_ledger_lag_records",
    "Durable records of the meter log that a ledger does not have.",
    "Growing: the ledger's database is gone or slow. Nothing is lost; it catches up by itself.",
    ("ledger",),
)
LEDGER_LAG_SECONDS = Spec(
    "headrace_ledger_lag_seconds",
    "Time since a ledger last had every durable record; 0 when it has.",
    "Above 60: invoices and usage of the last minutes are not there yet; see ledger_behind in the "
    "log.",
    ("ledger",),
)

TABLE: Sequence[Spec] = (LEDGER_LAG, LEDGER_LAG_SECONDS)


def lag_gauges(metrics: Metrics) -> Callable[[str], Callable[[Lag], None]]:
    """Adds the gauges to a process's metrics, once.

    Returns:
        Given what a ledger is, `local` or `postgres`, what its follower tells its lag.
    """
    records, seconds = (
        Gauge(spec.name, f"{spec.what} {spec.act}", spec.labels, registry=metrics.registry)
        for spec in TABLE
    )

    def of(ledger: str) -> Callable[[Lag], None]:
        records_of, seconds_of = records.labels(ledger), seconds.labels(ledger)

        def tell(lag: Lag) -> None:
            records_of.set(lag.records)
            seconds_of.set(lag.seconds)

        return tell

    return of
