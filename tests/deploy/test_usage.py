"""`headrace usage`: the numbers of the records, to the token and to the nano."""

import asyncio
import json

import pytest

from headrace.deploy import cli
from headrace.deploy.commands.usage import since_unix_ms
from headrace.deploy.tables import money
from headrace.serving.config import Config
from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.testing.clock import ManualClock

PRICE = Price.text(
    version="book-7",
    prompt_nano_per_mtok=10**9,
    cached_nano_per_mtok=10**8,
    completion_nano_per_mtok=2 * 10**9,
)
USED = Usage(prompt_tokens=100, cached_tokens=10, completion_tokens=20, reasoning_tokens=3)


def serve(home, *requests: tuple[str, str]) -> None:
    """A frontend that served these (tenant, request id), a second apart, and stopped."""
    clock = ManualClock()
    log = MeterLog(
        Config.load(home).meterlog_dir, clock=clock, epoch="life", was_used=lambda *_: False
    )

    async def serve_all() -> None:
        for tenant_id, request_id in requests:
            clock.advance(seconds=1)
            opening = Opening(
                tenant_id=tenant_id,
                request_id=request_id,
                key_id="k1",
                model="m",
                version="v1",
                price=PRICE,
                accepted_unix_ms=clock.unix_ms(),
            )
            await log.open(opening)
            settlement = Settlement(
                tenant_id=tenant_id,
                request_id=request_id,
                usage=USED,
                outcome=Outcome.OK,
                charge_femto=PRICE.charge_femto(USED),
                version="v1",
                first_token_unix_ms=clock.unix_ms(),
                settled_unix_ms=clock.unix_ms(),
            )
            await log.settle(settlement)

    asyncio.run(serve_all())
    log.close()


@pytest.fixture
def usage(tmp_path, capsys):
    """Types `headrace usage …` and answers exit code, standard output and standard error."""

    def types(*words: str) -> tuple[int, str, str]:
        code = cli.main(["usage", "--home", str(tmp_path), *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return types


def test_json_has_what_scripts_rely_on(usage, tmp_path):
    serve(tmp_path, ("acme", "r1"))

    (entry,) = json.loads(usage("--json")[1])

    assert {
        "request_id": "r1",
        "tenant_id": "acme",
        "model": "m",
        "prompt_tokens": 100,
        "cached_tokens": 10,
        "completion_tokens": 20,
        "reasoning_tokens": 3,
        "outcome": "ok",
        "charge_nano": 131_000,
        "currency": "USD",
        "price_version": "book-7",
    }.items() <= entry.items()


def test_the_table_shows_exact_charges_and_totals_over_all_that_match(usage, tmp_path):
    """Three requests of 131,000 nano; two are shown, three are summed."""
    serve(tmp_path, ("acme", "r1"), ("acme", "r2"), ("zeta", "r3"))

    code, out, _ = usage("--limit", "2")

    lines = [line.split() for line in out.splitlines() if line.strip()]
    assert code == 0
    assert lines[2][2:] == ["r3", "zeta", "m", "100", "10", "20", "ok", "0.000131000", "USD"]
    assert lines[-1] == [
        *("total", "3", "requests,", "2", "shown"),
        *("300", "30", "60", "0.000393000", "USD"),
    ]


def test_filters_narrow_what_is_shown(usage, tmp_path):
    serve(tmp_path, ("acme", "r1"), ("zeta", "r2"), ("acme", "r3"))

    def ids(*words: str) -> list[str]:
        return [entry["request_id"] for entry in json.loads(usage("--json", *words)[1])]

    assert ids("--tenant", "acme") == ["r3", "r1"]
    assert ids("--request-id", "r2") == ["r2"]
    assert ids("--since", "2023-11-14T22:13:22") == ["r3", "r2"]
    assert ids("--since", "1h") == []


def test_before_the_first_request_there_is_an_empty_list(usage):
    assert usage("--json")[:2] == (0, "[]\n")
    assert "headrace chat" in usage()[1]


@pytest.mark.parametrize("words", [("--since", "soon"), ("--limit", "0"), ("--limit", "-1")])
def test_a_question_without_sense_is_refused_with_a_fix(usage, words):
    code, out, err = usage(*words)

    assert (code, out) == (cli.EXIT_REFUSED, "")
    assert "fix:" in err


def test_since_counts_back_or_names_a_moment():
    clock = ManualClock(now_ms=1_700_000_000_000)

    assert since_unix_ms("90s", clock) == 1_699_999_910_000
    assert since_unix_ms("2d", clock) == 1_699_827_200_000
    assert since_unix_ms("2023-11-14T22:13:20", clock) == 1_700_000_000_000
    assert since_unix_ms("2023-11-14T23:13:20+01:00", clock) == 1_700_000_000_000
    for wrong in ("", "5", "5w", "-5m", "yesterday", "99999999999d"):
        with pytest.raises(InvalidRequest):
            since_unix_ms(wrong, clock)


@pytest.mark.parametrize(
    ("nano", "shown"),
    [
        (0, "0.000000000"),
        (1, "0.000000001"),
        (131_000, "0.000131000"),
        (27_670_116_110_564_327_421, "27670116110.564327421"),
        (-5, "-0.000000005"),
    ],
)
def test_money_is_shown_to_the_last_nano(nano, shown):
    assert money(nano) == shown
    assert money(nano, "EUR") == f"{shown} EUR"
