"""Compares the ledger with two books that are not ours to write: the clients' and the engines'."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.reconcile import Difference, Findings


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What a client was told at the end of one request."""

    tenant_id: str
    request_id: str
    usage: Usage
    charge_nano: int


def audit(
    ledger: Ledger,
    transcripts: Sequence[Transcript],
    *,
    engine: Usage | None = None,
    outcomes_compared: Sequence[Outcome] = (Outcome.OK, Outcome.BUDGET),
) -> Findings:
    """Compare the ledger with what clients were told, and with what the engines counted.

    Args:
        ledger: caught up.
        transcripts: one for each request whose final message arrived; a request that ended so and
            has none is a difference, as is one that the ledger has not.
        engine: tokens over all engines, where nothing was computed that was not delivered.
        outcomes_compared: how the requests ended whose clients got a final message.

    Raises:
        LedgerUnavailable: the ledger cannot be read.
    """
    findings = Findings()
    told = {(each.tenant_id, each.request_id): each for each in transcripts}
    assert len(told) == len(transcripts), "one final message a request"
    counted: Counter[str] = Counter()
    for record in LedgerReader(ledger).stream():
        counted.update(record.usage.quantities())
        if record.outcome not in outcomes_compared:
            continue
        findings.requests += 1
        findings.charge_femto += record.charge_femto
        names = {"tenant_id": record.tenant_id, "request_id": record.request_id}
        transcript = told.pop((record.tenant_id, record.request_id), None)
        mine = (record.usage, record.charge_nano)
        if transcript is None or (transcript.usage, transcript.charge_nano) != mine:
            what = f"The ledger says {mine}, the client was told {transcript}."
            findings.add(Difference(what=what, **names))
    for left in told.values():
        what = "The client has a final message of a request that the ledger has not, or not so."
        findings.add(Difference(what=what, tenant_id=left.tenant_id, request_id=left.request_id))
    if engine is not None and dict(counted) != dict(engine.quantities()):
        what = f"The engines counted {dict(engine.quantities())}, the ledger {dict(counted)}."
        findings.add(Difference(what=what))
    return findings
