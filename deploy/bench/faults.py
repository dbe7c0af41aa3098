"""`headrace bench faults`: kill frontend, engines and ledger at random instants, then audit.

The promises that must hold, whatever dies when:

* a settlement that a client was told of is in the books, to the token and the nano;
* no request is charged twice;
* nobody who was told an end is charged for more than arrived. Of whose connection died with the
  frontend, what was on its way is charged and told apart: a server cannot know what was read;
* an answer that was cut is short by at most one checkpoint interval.
"""

import asyncio
import contextlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.deploy import ledgers
from headrace.deploy.bench import machine
from headrace.deploy.bench.fault_world import CUT_OFF, HUNG_UP, FaultWorld, Transcript
from headrace.deploy.bench.report import OURS, Report, Row
from headrace.serving.config import Config
from headrace.serving.domain.record import UsageRecord
from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import ConfigRefused
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.reconcile import reconcile
from headrace.serving.metering.meterlog.verify import verify
from headrace.serving.testing.postgres import PostgresServer

CLIENTS = 16
ANSWERS_BETWEEN_MAX = 12
"""A kill comes after 0 to this many answers have ended: any phase of a request is met."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    trials: int = 100
    """Kills."""
    seed: int = 1
    clients: int = CLIENTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What the books say beside what the clients were told."""

    requests: int
    settled: int
    """Whose clients got a receipt."""
    recovered: int
    lost_settlements: int
    double_charges: int
    over_billed_tokens: int
    in_transit_tokens: int
    """Written to connections that died with the frontend, charged, and never read."""
    in_transit_tokens_max: int
    """Of one request."""
    under_billed_tokens_max: int
    """Of one request whose frontend was killed: delivered and not charged."""
    open_holds: int
    reconciliation_difference: int
    """Between log, ledgers and a recomputation of every charge: femto-currency, and findings."""

    @property
    def is_clean(self) -> bool:
        return not (
            self.lost_settlements
            or self.double_charges
            or self.over_billed_tokens
            or self.open_holds
            or self.reconciliation_difference
        )


def audit(
    transcripts: Sequence[Transcript],
    records: Sequence[UsageRecord],
    *,
    reconciliation_difference: int,
) -> Audit:
    """Compare every transcript with its records. A pure function."""
    by_id: defaultdict[str, list[UsageRecord]] = defaultdict(list)
    for record in records:
        by_id[record.request_id.partition("#")[0]].append(record)
    charged = Counter(r.request_id.partition("#")[0] for r in records if r.charge_femto)
    over = 0
    lost: list[int] = [0]
    under_max = 0
    for each in transcripts:
        for record in by_id[each.request_id]:
            tokens = record.usage.completion_tokens
            # Who hangs up pays for what was written before we could know: it was delivered.
            if record.charge_femto and each.error == CUT_OFF:
                lost.append(max(0, tokens - each.received_tokens))
            elif record.charge_femto and each.error != HUNG_UP:
                over += max(0, tokens - each.received_tokens)
            if record.outcome is Outcome.RECOVERED:
                under_max = max(under_max, each.received_tokens - tokens)
    return Audit(
        requests=len(transcripts),
        settled=sum(each.done is not None for each in transcripts),
        recovered=sum(r.outcome in (Outcome.RECOVERED, Outcome.EXPIRED) for r in records),
        lost_settlements=sum(
            not any(_is_receipt_of(each, record) for record in by_id[each.request_id])
            for each in transcripts
            if each.done is not None
        ),
        double_charges=sum(times > 1 for times in charged.values()),
        over_billed_tokens=over,
        in_transit_tokens=sum(lost),
        in_transit_tokens_max=max(lost),
        under_billed_tokens_max=under_max,
        open_holds=sum(r.outcome is Outcome.OPEN for r in records),
        reconciliation_difference=reconciliation_difference,
    )


def _is_receipt_of(transcript: Transcript, record: UsageRecord) -> bool:
    done = transcript.done
    return (
        done is not None
        and record.outcome is Outcome.OK
        and record.charge_nano == done.charge.nano
        and record.usage.prompt_tokens == done.usage.prompt_tokens == transcript.prompt_tokens
        and record.usage.completion_tokens
        == done.usage.completion_tokens
        == transcript.received_tokens
    )


def run(options: Options, tell: Tell) -> tuple[Report, Audit]:
    """Kill `options.trials` times, then stop, then audit."""
    report = Report(kind="faults", machine=machine.measure(), roofline={})
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-faults-"))
        postgres = None
        try:
            postgres = stack.enter_context(PostgresServer())
        except ConfigRefused as refusal:
            report.skipped["ledger"] = f"{refusal.what} {refusal.fix}"
        found, kills = asyncio.run(_trials(options, Path(folder), postgres, tell))
    report.rows = to_rows(found, kills)
    report.notes = [
        f"Seed {options.seed}; {options.clients} clients; SIGKILL at random instants under load; "
        "a quarter of the answers is hung up on in the middle."
    ]
    return report, found


async def _trials(
    options: Options, home: Path, postgres: PostgresServer | None, tell: Tell
) -> tuple[Audit, Mapping[str, int]]:
    async with FaultWorld(home, seed=options.seed, postgres=postgres) as world:
        world.begin(options.clients)
        for trial in range(options.trials):
            await world.until_more(world.random.randint(0, ANSWERS_BETWEEN_MAX))
            await world.kill(world.random.choice(world.victims))
            if (trial + 1) % 25 == 0:
                tell(f"{trial + 1}/{options.trials} kills, {len(world.transcripts)} requests")
        await world.finish()
        records, difference = await asyncio.to_thread(books, world.config)
        found = audit(world.transcripts, records, reconciliation_difference=difference)
        return found, dict(world.kills)


def books(config: Config) -> tuple[Sequence[UsageRecord], int]:
    """Every record, and what differs between log, ledgers and every charge computed again.

    Raises:
        MeterLogDamaged: the log is not whole.
    """
    verify(config.meterlog_dir)
    difference = 0
    for opened in (ledgers.local, ledgers.invoiced):
        with opened(config) as ledger:
            found = reconcile(ledgers.sources(config), ledger)
            difference += found.difference_femto + found.differences_found
            records = list(LedgerReader(ledger).stream())
    return records, difference


def to_rows(found: Audit, kills: Mapping[str, int]) -> list[Row]:
    figures = {
        "requests": found.requests,
        "settled": found.settled,
        "recovered": found.recovered,
        "lost_settlements": found.lost_settlements,
        "double_charges": found.double_charges,
        "over_billed_tokens": found.over_billed_tokens,
        "in_transit_tokens": found.in_transit_tokens,
        "in_transit_tokens_max": found.in_transit_tokens_max,
        "under_billed_tokens_max": found.under_billed_tokens_max,
        "open_holds": found.open_holds,
        "reconciliation_difference": found.reconciliation_difference,
        **{f"kills_of_{victim}": count for victim, count in kills.items()},
    }
    return [
        Row(name="faults", peer=OURS, metric=metric, value=value, unit="")
        for metric, value in figures.items()
    ]
