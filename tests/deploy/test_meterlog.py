"""`headrace meterlog`: a proof that a person and a script can read."""

import asyncio
import json

import pytest

from headrace.deploy import cli
from headrace.serving.config import Config
from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.tier import Receipt, Tier, Verdict
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.testing.clock import ManualClock

PRICE = Price.text(
    version="book-7",
    prompt_nano_per_mtok=10**9,
    cached_nano_per_mtok=10**8,
    completion_nano_per_mtok=2 * 10**9,
)
USED = Usage(prompt_tokens=100, cached_tokens=10, completion_tokens=20)


@pytest.fixture
def home(tmp_path):
    """A frontend served r1 and was killed while r2 ran."""
    clock = ManualClock()
    log = MeterLog(
        Config.load(tmp_path).meterlog_dir, clock=clock, epoch="life", was_used=lambda *_: False
    )

    async def life() -> None:
        for name in ("r1", "r2"):
            opening = Opening(
                tenant_id="acme",
                request_id=name,
                key_id="k1",
                model="m",
                version="v1",
                price=PRICE,
                accepted_unix_ms=clock.unix_ms(),
            )
            await log.open(opening)
        settlement = Settlement(
            tenant_id="acme",
            request_id="r1",
            usage=USED,
            outcome=Outcome.OK,
            charge_femto=PRICE.charge_femto(USED),
            version="v1",
            first_token_unix_ms=clock.unix_ms(),
            settled_unix_ms=clock.unix_ms(),
            receipt=Receipt(
                tier_asked=Tier.STANDARD, tier_served=Tier.STANDARD, verdict=Verdict.MET
            ),
        )
        await log.settle(settlement)

    asyncio.run(life())
    log.close()
    return tmp_path


def damage(home) -> None:
    """A bit of the first Reserve flips."""
    path = Config.load(home).meterlog_dir / "00000001.seg"
    data = bytearray(path.read_bytes())
    data[data.index(b"acme")] ^= 1
    path.write_bytes(data)


def test_a_whole_log_is_said_to_be_whole_with_what_is_open(home, capsys):
    assert cli.main(["meterlog", "verify", "--home", str(home)]) == 0

    shown = capsys.readouterr().out
    assert "whole" in shown
    assert "records    5" in shown
    assert "segments   1, sealed 0" in shown
    assert "open holds 1" in shown
    assert "r2" in shown


def test_a_script_gets_the_proof_as_json(home, capsys):
    assert cli.main(["meterlog", "verify", "--home", str(home), "--json"]) == 0

    proof = json.loads(capsys.readouterr().out)
    assert (proof["ok"], proof["records"], proof["last_seq"]) == (True, 5, 5)
    assert proof["open"] == [{"reserve": 4, "tenant_id": "acme", "request_id": "r2"}]


def test_damage_is_named_by_file_offset_and_record(home, capsys):
    """A header of 80 bytes, an empty Carry of 31 and an Epoch of 33 stand before record 3."""
    damage(home)

    assert cli.main(["meterlog", "verify", "--home", str(home)]) == 1
    shown = capsys.readouterr().out
    assert "00000001.seg at byte 144, record 3" in shown
    assert cli.main(["meterlog", "verify", "--home", str(home), "--json"]) == 1
    proof = json.loads(capsys.readouterr().out)
    assert (proof["ok"], proof["offset"], proof["seq"]) == (False, 144, 3)
    assert proof["file"].endswith("00000001.seg")


def test_a_dump_is_a_json_object_a_line_that_keeps_numbers_whole(home, capsys):
    """90 fresh, 10 cached and 20 completion tokens: 131,000 nano are 131 * 10**9 femto."""
    assert cli.main(["meterlog", "dump", "--home", str(home), "--after", "2"]) == 0

    first, second, third = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["seq"], first["reserve"]["request_id"]) == (3, "r1")
    assert first["reserve"]["price"]["rates"]["prompt_tokens"] == 10**9
    assert second["reserve"]["request_id"] == "r2"
    assert third["settle"]["charge_femto"] == 131 * 10**9
    assert third["settle"]["receipt"]["tier_served"] == "TIER_STANDARD"


def test_a_damaged_log_is_not_dumped_beyond_its_damage(home, capsys):
    damage(home)

    assert cli.main(["meterlog", "dump", "--home", str(home)]) == cli.EXIT_REFUSED
    assert "00000001.seg" in capsys.readouterr().err


@pytest.mark.parametrize("action", ["verify", "dump"])
def test_a_home_without_a_log(action, tmp_path, capsys):
    exit_code = cli.main(["meterlog", action, "--home", str(tmp_path)])

    out, err = capsys.readouterr()
    assert out == ""
    assert exit_code == (cli.EXIT_REFUSED if action == "verify" else 0)
    assert ("There is no meter log" in err) == (action == "verify")
