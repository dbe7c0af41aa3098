"""`headrace credit`, `adjust` and `sla credits`: at home, and where a frontend runs."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from joserfc import jwk, jwt
from joserfc.errors import SecurityWarning

from headrace.deploy import cli, corrections
from headrace.serving.admission.accounts import local_actor, open_accounts
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.tier import Receipt, Tier, Verdict
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.platform import Platform

pytestmark = pytest.mark.filterwarnings(f"ignore::{SecurityWarning.__module__}.SecurityWarning")

SIGNING = jwk.OKPKey.generate_key("Ed25519", {"kid": "ed"})
NOVEMBER_2023 = 1_700_000_000_000
CREDIT = ("credit", "--tenant", "acme", "--amount", "12.50", "--id", "g1", "--reason", "sorry")
ADJUST = ("adjust", "--tenant", "acme", "--amount=-3.20", "--request-id", "r1", "--id", "a1")
ADJUST = (*ADJUST, "--reason", "was charged twice")
SLA = ("sla", "credits", "--tenant", "acme", "--month", "2023-11")


class Terminal:
    """Somebody who types commands in a home with the organisation acme."""

    def __init__(self, home: Path, capsys) -> None:
        self.home, self._capsys = home, capsys
        config = Config.load(home)
        config.prepare_home()
        with closing(open_accounts(config)) as accounts:
            accounts.create_organisation(tenant_id="acme")

    def types(self, *words: str) -> tuple[int, str, str]:
        code = cli.main([*words, "--home", str(self.home)])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def reads(self, *words: str):
        code, out, err = self.types(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    def events(self, kind: str) -> list:
        records = LogReader(Config.load(self.home).meterlog_dir).after(0)
        return [getattr(each.event, kind) for each in records if each.event.HasField(kind)]


@pytest.fixture
def at_home(tmp_path, capsys, monkeypatch) -> Terminal:
    monkeypatch.delenv(corrections.TOKEN_VARIABLE, raising=False)
    return Terminal(tmp_path, capsys)


def this_month() -> str:
    return datetime.fromtimestamp(SystemClock().unix_ms() / 1000, UTC).strftime("%Y-%m")


def token() -> str:
    """An operator's, who keeps the accounts of every organisation."""
    expires = SystemClock().unix_ms() // 1000 + 60
    content = {"iss": "https://i", "aud": "headrace", "sub": "olga", "exp": expires}
    content |= {"roles": ["billing"], "tenant": "acme"}
    return jwt.encode({"alg": "EdDSA", "kid": "ed"}, content, SIGNING, algorithms=["EdDSA"])


@contextmanager
def running(home: Path) -> Iterator[str]:
    """A frontend of this home; answers its address."""
    jwks = home / "jwks.json"
    jwks.write_text(json.dumps({"keys": [SIGNING.as_dict(private=False)]}))
    operators = {"name": "corp", "issuer": "https://i", "audience": "headrace", "jwks": str(jwks)}
    roles = {"roles": [{"name": "billing", "role": "billing", "tenant": "*"}]}
    started, stopping = threading.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        overrides: dict[str, object] = {"operators": [operators | roles]}
        async with Platform(home, num_replicas=0, overrides=overrides) as platform:
            found.append(platform.addresses.grpc)
            started.set()
            await asyncio.to_thread(stopping.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(30)
        yield found[0]
    finally:
        stopping.set()
        thread.join()


def misses(home: Path, charge_femto: int) -> None:
    """A frontend that was late with acme's one request of November 2023."""
    price = Price.text(
        version="b", prompt_nano_per_mtok=1, cached_nano_per_mtok=1, completion_nano_per_mtok=1
    )
    receipt = Receipt(
        tier_asked=Tier.RESERVED,
        tier_served=Tier.RESERVED,
        ttft_us=9_000_000,
        itl_p50_us=9_000,
        itl_p99_us=9_000,
        verdict=Verdict.MISSED,
        missed=("ttft",),
    )
    opening = Opening(
        tenant_id="acme",
        request_id="late",
        key_id="k1",
        model="m",
        version="v1",
        price=price,
        accepted_unix_ms=NOVEMBER_2023,
        tier=Tier.RESERVED,
    )
    settlement = Settlement(
        tenant_id="acme",
        request_id="late",
        usage=Usage(prompt_tokens=charge_femto),
        outcome=Outcome.OK,
        charge_femto=charge_femto,
        version="v1",
        first_token_unix_ms=None,
        settled_unix_ms=NOVEMBER_2023,
        receipt=receipt,
    )
    log = MeterLog(
        Config.load(home).meterlog_dir,
        clock=ManualClock(NOVEMBER_2023),
        epoch="life",
        was_used=lambda *_: False,
    )

    async def serve() -> None:
        await log.open(opening)
        await log.settle(settlement)

    asyncio.run(serve())
    log.close()


def test_credit_and_a_correction_are_on_the_statement_and_twice_is_once(at_home):
    credit, adjustment = at_home.reads(*CREDIT), at_home.reads(*ADJUST)

    assert (at_home.reads(*CREDIT), at_home.reads(*ADJUST)) == (credit, adjustment)
    assert (credit["amount_nano"], adjustment["amount_nano"]) == (12_500_000_000, -3_200_000_000)
    (statement,) = at_home.reads("statement", "--tenant", "acme", "--month", this_month())
    shown = {
        each["correction_id"]: (each["kind"], each["amount_minor"], each["reason"])
        for each in statement["corrections"]
    }
    assert shown == {
        "g1": ("credit", -1250, "sorry"),
        "a1": ("adjustment", -320, "was charged twice"),
    }
    assert statement["total_minor"] == -1570
    assert statement["exact_femto"] == -15_700_000 * 10**9
    assert [each.actor for each in at_home.events("grant")] == [local_actor()]
    assert [each.request_id for each in at_home.events("adjust")] == ["r1"]
    assert at_home.types("reconcile")[0] == 0
    assert "12.500000000 USD for acme" in at_home.types(*CREDIT)[1]
    assert "-3.200000000 USD for acme" in at_home.types(*ADJUST)[1]


def test_without_an_id_each_command_is_one_of_its_own(at_home):
    words = ("credit", "--tenant", "acme", "--amount", "1", "--reason", "hello")

    assert at_home.reads(*words)["grant_id"] != at_home.reads(*words)["grant_id"]
    assert len(at_home.events("grant")) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--amount", "0"), "above zero"),
        (("--amount=-1",), "above zero"),
        (("--amount", "9223.372036855"), "64 bits"),
        (("--amount", "1.0000000001"), "at most nine decimals"),
        (("--amount", "1e3"), "at most nine decimals"),
        (("--amount", "1", "--currency", "EUR"), "price book's USD"),
        (("--amount", "1", "--tenant", "nobody"), "no organisation 'nobody'"),
        (("--amount", "1", "--project", "nowhere"), "no project 'nowhere'"),
        (("--amount", "1", "--id", ""), "grant_id has 0 characters"),
    ],
)
def test_credit_that_cannot_be_is_refused_with_a_reason(at_home, words, said):
    code, _, err = at_home.types("credit", "--tenant", "acme", "--reason", "r", *words)

    assert code == cli.EXIT_REFUSED
    assert said in err
    assert at_home.events("grant") == []


def test_another_amount_under_a_known_id_is_refused(at_home):
    at_home.reads(*CREDIT)

    code, _, err = at_home.types(*CREDIT, "--amount", "13")

    assert code == cli.EXIT_REFUSED
    assert "says something else" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12.50", 12_500_000_000),
        ("-3.2", -3_200_000_000),
        ("+0.000000001", 1),
        ("9007199.254740993", 9_007_199_254_740_993),
        ("-0.1", -100_000_000),
    ],
)
def test_an_amount_is_read_exactly(text, expected):
    assert corrections.nano(text) == expected


@pytest.mark.parametrize("text", ["", ".5", "5.", "1,000", "--1", "NaN", "1_0", "٣", "1 "])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(InvalidRequest, match="at most nine decimals"):
        corrections.nano(text)


def test_while_a_frontend_runs_it_writes_and_asks_for_a_token(at_home, monkeypatch):
    with running(at_home.home) as address:
        host, port = address.split(":")
        settings = {"frontend": {"host": host, "grpc_port": int(port)}}
        (at_home.home / "config.yaml").write_text(json.dumps(settings))
        refused, _, err = at_home.types(*CREDIT)
        (at_home.home / "token").write_text(token())
        by_file = at_home.reads(*CREDIT, "--token-file", str(at_home.home / "token"))
        monkeypatch.setenv(corrections.TOKEN_VARIABLE, token())
        by_variable = at_home.reads(*CREDIT)
        adjusted = at_home.reads(*ADJUST, "--address", address)

    assert refused == cli.EXIT_REFUSED
    assert "--token-file or HEADRACE_ADMIN_KEY, or stop the frontend first" in err
    assert by_file == by_variable
    assert adjusted["log_id"] == by_file["log_id"]
    assert [each.actor for each in at_home.events("grant")] == ["oidc:corp:olga"]
    # The frontend has gone: the home is written directly, and knows what is there.
    assert at_home.reads(*CREDIT) == by_file


def test_a_frontend_elsewhere_asks_for_a_token(at_home):
    code, _, err = at_home.types(*CREDIT, "--address", "127.0.0.1:1")

    assert code == cli.EXIT_REFUSED
    assert "no --token-file" in err


def test_sla_credits_are_shown_applied_and_twice_is_once(at_home):
    misses(at_home.home, charge_femto=1_000_001)

    (proposed,) = at_home.reads(*SLA)
    assert at_home.events("adjust") == []
    (applied,) = at_home.reads(*SLA, "--apply")
    (again,) = at_home.reads(*SLA, "--apply")

    assert proposed["seq"] is None
    assert applied == again == proposed | {"log_id": applied["log_id"], "seq": applied["seq"]}
    assert applied["adjustment_id"] == "sla/2023-11/m/reserved/USD"
    assert applied["amount_nano"] == -1, "a tenth of 1,000,001 femto, rounded to the tenant's side"
    assert len(at_home.events("adjust")) == 1
    (statement,) = at_home.reads("statement", "--tenant", "acme", "--month", this_month())
    assert [each["exact_femto"] for each in statement["corrections"]] == [-1_000_000]
    assert f"record {applied['seq']} of log" in at_home.types(*SLA, "--apply")[1]
    assert "not written" in at_home.types(*SLA)[1]


def test_a_month_that_is_not_over_is_not_credited(at_home):
    month = ("sla", "credits", "--tenant", "acme", "--month", this_month())

    code, _, err = at_home.types(*month, "--apply")

    assert code == cli.EXIT_REFUSED
    assert "is not over" in err
    assert "No credit is due" in at_home.types(*month)[1]


def test_the_services_are_told_by_reflection(at_home):
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with running(at_home.home) as address, grpc.insecure_channel(address) as channel:
        names = ProtoReflectionDescriptorDatabase(channel).get_services()

    assert {"headrace.v1.Admin", "headrace.v1.Billing"} <= set(names)
