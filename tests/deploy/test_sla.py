"""`headrace receipts` and `headrace sla`: what they print, sign and refuse."""

import asyncio
import json

from headrace.deploy import cli
from headrace.deploy.commands import receipts, sla
from headrace.serving.config import Config
from headrace.serving.domain.record import Opening, Settlement, UsageRecord
from headrace.serving.domain.tier import Receipt, Tier, Verdict
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.testing.clock import ManualClock

RECEIPT = Receipt(
    tier_asked=Tier.RESERVED,
    tier_served=Tier.STANDARD,
    ttft_us=123_400,
    itl_p50_us=9_000,
    itl_p99_us=1_250_000,
    verdict=Verdict.MISSED,
    missed=("itl",),
)
RECORD = UsageRecord(
    tenant_id="acme",
    request_id="r1",
    key_id="k1",
    model="m",
    version="v1",
    usage=Usage(),
    outcome=Outcome.OK,
    charge_nano=1,
    currency="USD",
    price_version="book-7",
    accepted_unix_ms=1_700_000_000_000,
    first_token_unix_ms=None,
    settled_unix_ms=None,
    replicas_tried=1,
    receipt=RECEIPT,
)
NOVEMBER_2023 = 1_700_000_000_000
PRICE = Price.text(
    version="book-7", prompt_nano_per_mtok=1, cached_nano_per_mtok=1, completion_nano_per_mtok=1
)


def serve(home, request_id: str) -> None:
    """A frontend that served one request in November 2023."""
    log = MeterLog(
        Config.load(home).meterlog_dir,
        clock=ManualClock(NOVEMBER_2023),
        epoch="life",
        was_used=lambda *_: False,
    )

    async def serve_it() -> None:
        await log.open(
            Opening(
                tenant_id="acme",
                request_id=request_id,
                key_id="k1",
                model="m",
                version="v1",
                price=PRICE,
                accepted_unix_ms=NOVEMBER_2023,
            )
        )
        await log.settle(
            Settlement(
                tenant_id="acme",
                request_id=request_id,
                usage=Usage(prompt_tokens=1),
                outcome=Outcome.OK,
                charge_femto=1,
                version="v1",
                first_token_unix_ms=None,
                settled_unix_ms=NOVEMBER_2023,
                receipt=RECEIPT,
            )
        )

    asyncio.run(serve_it())
    log.close()


def test_a_receipt_as_json_has_the_names_scripts_rely_on() -> None:
    assert receipts.as_json(RECORD) == {
        "request_id": "r1",
        "tenant_id": "acme",
        "project_id": "default",
        "model": "m",
        "outcome": "ok",
        "accepted_unix_ms": 1_700_000_000_000,
        "tier_asked": "reserved",
        "tier_served": "standard",
        "ttft_us": 123_400,
        "itl_p50_us": 9_000,
        "itl_p99_us": 1_250_000,
        "verdict": "missed",
        "missed": ["itl"],
    }


def test_a_receipt_for_people_says_what_was_missed(capsys) -> None:
    receipts._show([RECORD])

    shown = capsys.readouterr().out
    for text in ("r1", "reserved", "standard", "123.4", "1,250.0", "missed: itl"):
        assert text in shown


def test_receipts_are_listed_from_the_records(tmp_path, capsys) -> None:
    serve(tmp_path, "r1")

    assert cli.main(["receipts", "--home", str(tmp_path), "--tenant", "acme", "--json"]) == 0

    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["request_id"] == "r1"


def test_without_records_there_are_no_receipts(tmp_path, capsys) -> None:
    assert cli.main(["receipts", "--home", str(tmp_path)]) == 0
    assert "No such requests" in capsys.readouterr().out


def test_a_limit_out_of_range_is_refused(tmp_path, capsys) -> None:
    assert cli.main(["receipts", "--home", str(tmp_path), "--limit", "0"]) == 3
    assert "--limit is 0" in capsys.readouterr().err


def test_a_statement_is_signed_and_verified_and_names_its_key(tmp_path, capsys) -> None:
    serve(tmp_path, "r1")
    home = ["--home", str(tmp_path)]
    out = tmp_path / "november.jws"
    month = ["--tenant", "acme", "--month", "2023-11"]

    assert cli.main(["sla", "statement", *month, *home, "--out", str(out), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert cli.main(["sla", "verify", str(out), *home, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)

    assert made["tenant_id"] == said["tenant_id"] == "acme"
    assert said["lines"] == made["lines"]
    assert [line["requests"] for line in made["lines"]] == [1]
    assert (tmp_path / "sla_key").stat().st_mode & 0o777 == 0o600


def test_anyone_with_the_public_key_can_verify(tmp_path, capsys) -> None:
    issuer, auditor = tmp_path / "issuer", tmp_path / "auditor"
    out, key = tmp_path / "statement.jws", tmp_path / "key.json"
    month = ["--tenant", "acme", "--month", "2023-11", "--out", str(out)]
    assert cli.main(["sla", "statement", *month, "--home", str(issuer)]) == 0
    capsys.readouterr()
    assert cli.main(["sla", "key", "--home", str(issuer)]) == 0
    key.write_text(capsys.readouterr().out)

    assert cli.main(["sla", "verify", str(out), "--key", str(key), "--home", str(auditor)]) == 0
    assert "is genuine" in capsys.readouterr().out
    assert cli.main(["sla", "verify", str(out), "--home", str(auditor)]) == 3
    assert "does not verify" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_refused(tmp_path, capsys) -> None:
    home = ["--home", str(tmp_path)]

    assert cli.main(["sla", "verify", str(tmp_path / "none"), *home]) == 3
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "key").write_text("[]")
    assert cli.main(["sla", "verify", "x", "--key", str(tmp_path / "key"), *home]) == 3


def test_a_tenant_that_asked_for_nothing_has_an_empty_statement(tmp_path, capsys) -> None:
    month = ["--tenant", "nobody", "--month", "2023-11", "--home", str(tmp_path)]

    assert cli.main(["sla", "statement", *month]) == 0
    assert "asked for nothing" in capsys.readouterr().out


def test_percentages_are_shown_to_the_hundredth() -> None:
    assert sla._percent(999_500) == "99.95 %"
