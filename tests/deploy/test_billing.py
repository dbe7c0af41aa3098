"""The commands that turn usage into money: prices, statements, invoices, exports, proofs."""

import csv
import io
import json
from pathlib import Path

import pytest

from headrace.deploy import cli, ledgers
from headrace.serving.domain.usage import Price, Usage
from headrace.serving.metering.ledger.source import Source
from headrace.serving.testing.memory_log import NOVEMBER, PRICE, MemoryLog

OCTOBER = NOVEMBER - 31 * 86_400_000
DOLLAR = Price.text(
    version="book-9",
    prompt_nano_per_mtok=10**9,
    cached_nano_per_mtok=10**9,
    completion_nano_per_mtok=10**9,
)
BOOK = """
version: b1
currency: USD
effective_from: 2020-01-01T00:00:00Z
default: {prompt_tokens: 100, completion_tokens: 200}
"""


class Desk:
    """Somebody who types commands in a home whose log is `log`."""

    def __init__(self, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.home = home
        # The invoiced month is over whatever the day on which this runs.
        self.log = MemoryLog(unix_ms=OCTOBER - 5 * 365 * 86_400_000)
        self._capsys = capsys

    def types(self, *words: str) -> tuple[int, str, str]:
        code = cli.main([words[0], *words[1:], "--home", str(self.home)])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def reads(self, *words: str):
        return json.loads(self.types(*words, "--json")[1])


@pytest.fixture
def desk(tmp_path, capsys, monkeypatch) -> Desk:
    desk = Desk(tmp_path, capsys)
    found: list[Source] = [desk.log]
    monkeypatch.setattr(ledgers, "sources", lambda config, folders=(): found)
    return desk


def test_usage_is_caught_up_with_the_log_before_it_answers(desk):
    desk.log.serves("r1", project_id="search", tier="flex")
    first = desk.reads("usage")
    desk.log.serves("r2", project_id="chat")

    assert [each["request_id"] for each in first] == ["r1"]
    assert [each["request_id"] for each in desk.reads("usage")] == ["r2", "r1"]
    assert [each["request_id"] for each in desk.reads("usage", "--project", "chat")] == ["r2"]
    assert [each["request_id"] for each in desk.reads("usage", "--tier", "flex")] == ["r1"]
    assert desk.reads("usage", "--until", "2000-01-01") == []
    assert first[0]["charge_nano"] == 16_400
    assert (first[0]["project_id"], first[0]["tier"]) == ("search", "flex")


def test_a_month_is_stated_invoiced_and_listed(desk):
    """2.5 million tokens at a dollar a million."""
    desk.log.settles(desk.log.reserves("r1", price=DOLLAR), Usage(prompt_tokens=2_500_000))
    month = ("--tenant", "acme", "--month", "2021-10")

    (statement,) = desk.reads("statement", *month)
    (issued,) = desk.reads("invoice", *month)
    table = desk.types("invoice", "--list")[1]

    assert statement["total_minor"] == issued["total_minor"] == 250
    assert issued["invoice_id"] == "HR-2021-000001"
    assert "2.50 USD" in table
    assert "2.50" in desk.types("statement", *month)[1]
    assert desk.reads("invoice", *month) == [issued]
    assert "correction" not in table
    desk.log.settles(desk.log.reserves("late", price=DOLLAR), Usage(prompt_tokens=1_000_000))
    assert "needs a correction" in desk.types("invoice", "--list")[1]
    assert [each["is_outdated"] for each in desk.reads("invoice", "--list")] == [True]


def test_an_invoice_needs_to_know_whose(desk):
    code, _, err = desk.types("invoice", "--month", "2021-10")

    assert code == cli.EXIT_REFUSED
    assert "--tenant and --month" in err


def test_books_that_differ_are_named_and_block_the_invoice(desk):
    desk.log.settles(desk.log.reserves("r1"), charge_femto=1)

    code, out, _ = desk.types("reconcile")
    refused, _, err = desk.types("invoice", "--tenant", "acme", "--month", "2021-10")

    assert code == 1
    assert "Request 'r1' was charged 1 femto; its quantities and rates make 16,400,000,000." in out
    assert refused == cli.EXIT_REFUSED
    assert "headrace reconcile" in err


def test_books_that_agree_say_so(desk):
    desk.log.serves("r1")

    assert desk.types("reconcile")[:2] == (
        0,
        "1 requests compared; difference 0 femto, 0 differences.\n",
    )
    assert desk.reads("reconcile", "--month", "2021-10")["requests"] == 1
    assert desk.reads("reconcile", "--month", "2021-11")["requests"] == 0


def test_usage_is_exported_as_it_is_asked_for(desk):
    desk.log.serves("r1", tenant_id="acme")
    desk.log.serves("r2", tenant_id="zeta")

    rows = list(csv.DictReader(io.StringIO(desk.types("usage", "export", "--tenant", "acme")[1])))
    everything = json.loads(desk.types("usage", "export", "--format", "json")[1])
    code, out, _ = desk.types(
        "usage", "export", "--format", "parquet", "--output", str(desk.home / "u.parquet")
    )

    assert {row["x_RequestId"] for row in rows} == {"r1"}
    assert len(rows) == 3
    assert len(everything) == 6
    assert (code, out.split()[:2]) == (0, ["6", "rows"])
    assert desk.types("usage", "export", "--format", "parquet")[0] == cli.EXIT_REFUSED
    assert desk.types("usage", "export", "--focus", "9")[0] == cli.EXIT_REFUSED


def test_prices_are_published_listed_and_shown(desk):
    path = desk.home / "book.yaml"
    path.write_text(BOOK)

    assert desk.reads("prices", "publish", str(path))["is_new"]
    assert "nothing has changed" in desk.types("prices", "publish", str(path))[1]
    books = {each["version"]: each["in_force"] for each in desk.reads("prices", "list")}
    assert books == {"demo-1": False, "b1": True}
    assert desk.reads("prices", "show")["default"]["completion_tokens"] == 200
    assert desk.types("prices", "show", "b2")[0] == cli.EXIT_REFUSED
    assert "0.000000200 USD" in desk.types("prices", "show")[1]
    assert "b1" in desk.types("prices", "list")[1]


def test_a_ledger_is_made_again_from_the_log(desk):
    desk.log.serves("r1", price=PRICE)
    into = str(desk.home / "again.db")

    assert desk.reads("meterlog", "replay", "--into", into) == {"records": 2, "into": into}
    assert desk.types("meterlog", "replay", "--into", into)[1].startswith("0 records")
    assert [(each["log_id"], each["seq"]) for each in desk.reads("ledger", "status")] == [
        ("log-1", 2)
    ]
    same = str(desk.home / "ledger.db")
    assert desk.types("meterlog", "replay", "--into", same)[0] == cli.EXIT_REFUSED


def test_a_secret_file_that_cannot_be_read_is_named_and_not_shown(desk):
    (desk.home / "config.yaml").write_text(f"ledger: {{postgres_dsn_file: {desk.home}/none}}\n")

    code, _, err = desk.types("reconcile")

    assert code == cli.EXIT_REFUSED
    assert "ledger.postgres_dsn_file names it" in err
