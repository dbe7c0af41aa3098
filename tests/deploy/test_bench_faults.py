"""`headrace bench faults`: the audit sees what it should, and a short run is clean."""

from dataclasses import replace

import pytest

from headrace.deploy.bench import faults
from headrace.deploy.bench.fault_world import CUT_OFF, Transcript
from headrace.serving.domain.record import UsageRecord
from headrace.serving.domain.usage import Outcome, Usage
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import usage_pb2

USED = Usage(prompt_tokens=10, completion_tokens=20)
RECORD = UsageRecord(
    tenant_id="demo",
    request_id="q1",
    key_id="k",
    model="m",
    version="v",
    usage=USED,
    outcome=Outcome.OK,
    charge_nano=30,
    charge_femto=30 * 10**6,
    currency="USD",
    price_version="p",
    accepted_unix_ms=1,
    first_token_unix_ms=2,
    settled_unix_ms=3,
    replicas_tried=1,
)


def told(request_id: str = "q1", *, received: int = 20, charge_nano: int | None = 30) -> Transcript:
    """What a client has of an answer of 20 tokens; without a charge it got no receipt."""
    done = None
    if charge_nano is not None:
        usage = usage_pb2.Usage(prompt_tokens=10, completion_tokens=received)
        done = pb.Done(usage=usage, charge=usage_pb2.Charge(nano=charge_nano))
    return Transcript(request_id, prompt_tokens=10, received_tokens=received, done=done)


def audit(transcripts, records, *, difference: int = 0) -> faults.Audit:
    return faults.audit(transcripts, records, reconciliation_difference=difference)


def test_books_that_agree_are_clean():
    found = audit([told()], [RECORD])

    assert found.is_clean
    assert (found.requests, found.settled) == (1, 1)


@pytest.mark.parametrize(
    ("transcripts", "records", "field"),
    [
        pytest.param([told()], [], "lost_settlements", id="a receipt without a record"),
        pytest.param(
            [told(charge_nano=29)], [RECORD], "lost_settlements", id="another charge was told"
        ),
        pytest.param(
            [told()],
            [replace(RECORD, usage=Usage(prompt_tokens=10, completion_tokens=19))],
            "lost_settlements",
            id="another count was told",
        ),
        pytest.param([told()], [RECORD, RECORD], "double_charges", id="charged twice"),
        pytest.param(
            [told(received=5, charge_nano=None)],
            [replace(RECORD, outcome=Outcome.RECOVERED)],
            "over_billed_tokens",
            id="charged for more than arrived",
        ),
        pytest.param(
            [told(charge_nano=None)],
            [replace(RECORD, outcome=Outcome.OPEN, charge_femto=0)],
            "open_holds",
            id="a hold that nobody closed",
        ),
    ],
)
def test_each_way_to_be_wrong_is_found(transcripts, records, field):
    found = audit(transcripts, records)

    assert getattr(found, field) > 0
    assert not found.is_clean


def test_what_was_on_its_way_when_the_connection_died_is_told_apart():
    cut = told(received=5, charge_nano=None)
    cut.error = CUT_OFF
    found = audit([cut], [replace(RECORD, outcome=Outcome.RECOVERED)])

    assert found.is_clean
    assert found.in_transit_tokens == found.in_transit_tokens_max
    assert found.in_transit_tokens == RECORD.usage.completion_tokens - 5


def test_what_a_killed_frontend_gave_away_is_measured():
    recovered = replace(
        RECORD, outcome=Outcome.RECOVERED, usage=replace(USED, completion_tokens=15)
    )
    found = audit([told(received=20, charge_nano=None)], [recovered])

    assert found.under_billed_tokens_max == 5
    assert found.is_clean


def test_eight_kills_under_load_lose_nothing_and_double_nothing():
    """Frontend, engines and PostgreSQL, by seed; the bench does hundreds."""
    report, found = faults.run(faults.Options(trials=8, seed=5), lambda line: None)

    assert found.is_clean, found
    assert found.settled > 20
    assert found.recovered > 0
    assert sum(row.value for row in report.rows if row.metric.startswith("kills_of_")) == 8
