"""`headrace limits` and `headrace budgets`: what an operator types and what scripts read."""

import asyncio
import json
from pathlib import Path

import pytest

from headrace.deploy import cli
from headrace.serving.admission.lease import Ask, Claim
from headrace.serving.admission.quota_authority import QuotaAuthority
from headrace.serving.admission.quota_book import QuotaBook
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.testing.platform import Platform


@pytest.fixture
def headrace(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Types `headrace …` and answers exit code, standard output and standard error."""
    (tmp_path / "config.yaml").write_text("directory: {address: '127.0.0.1:1'}\n")

    def types(*words: str) -> tuple[int, str, str]:
        code = cli.main([*words, "--home", str(tmp_path)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return types


TOKENS = ("--project", "acme/search", "--metric", "output_tokens_per_min")


def test_a_limit_is_set_listed_changed_and_removed(headrace):
    assert headrace("limits", "set", *TOKENS, "--limit", "50000", "--model", "m")[0] == 0
    headrace("limits", "set", *TOKENS, "--limit", "60000", "--model", "m", "--hard")
    (listed,) = json.loads(headrace("limits", "list", "--json")[1])

    assert (listed["subject"], listed["model"]) == ("project:acme/search", "m")
    assert (listed["limit"], listed["hard"], listed["left"]) == (60_000, True, None)
    assert "60,000" in headrace("limits", "list")[1]
    assert headrace("limits", "remove", *TOKENS, "--model", "m")[0] == 0
    assert json.loads(headrace("limits", "list", "--json")[1]) == []


def test_money_is_given_in_units_of_currency_and_kept_exactly(headrace):
    """0.1 has no binary fraction: a float would keep 100,000,000.00000001."""
    month = ("--organisation", "acme", "--metric", "budget_nano_per_month")
    headrace("limits", "set", *month, "--amount", "1234.100000001", "--hard")
    (listed,) = json.loads(headrace("limits", "list", "--json")[1])

    assert listed["limit"] == 1_234_100_000_001


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((*TOKENS, "--limit", "0"), id="nothing"),
        pytest.param((*TOKENS, "--limit", "-1"), id="negative"),
        pytest.param((*TOKENS, "--limit", str(1 << 63)), id="overflowing"),
        pytest.param((*TOKENS, "--amount", "5"), id="money of tokens"),
        pytest.param(
            ("--key", "k", "--metric", "budget_nano_total", "--amount", "1.0000000001"),
            id="less than a nano",
        ),
        pytest.param(("--project", "acme", "--metric", "kv_tokens", "--limit", "5"), id="nobody"),
    ],
)
def test_a_limit_that_means_nothing_is_refused_with_a_fix(headrace, words):
    code, out, err = headrace("limits", "set", *words)

    assert (code, out) == (cli.EXIT_REFUSED, "")
    assert "fix: " in err


def test_what_was_never_set_cannot_be_removed(headrace):
    code, _, err = headrace("limits", "remove", *TOKENS)

    assert code == cli.EXIT_REFUSED
    assert "headrace limits list" in err


def test_budgets_are_shown_from_the_book_when_nothing_runs(headrace, tmp_path: Path):
    total = ("--organisation", "acme", "--metric", "budget_nano_total")
    headrace("limits", "set", *total, "--amount", "10", "--hard")
    assert "No budgets" not in headrace("budgets")[1]
    name = "organisation:acme|*|budget_nano_total|USD"
    book = QuotaBook(Config.load(tmp_path).quota_path)
    limits = [_limit_of(tmp_path)]
    authority = QuotaAuthority(book, clock=SystemClock(), limits=limits)
    claim = Claim(limit_name=name, need=5 * 10**15, desired=5 * 10**15)
    (grant,) = authority.lease(Ask(holder="f", epoch="1", seq=1, claims=(claim,)))
    spent = Claim(limit_name=name, lease_id=grant.lease_id, spent=10**15 + 1)
    authority.lease(Ask(holder="f", epoch="1", seq=2, claims=(spent,)))
    authority.close()

    (shown,) = json.loads(headrace("budgets", "--json")[1])
    assert (shown["spent_femto"], shown["held_femto"]) == (10**15 + 1, 4 * 10**15 - 1)
    assert shown["left_femto"] == 5 * 10**15
    table = headrace("budgets")[1]
    assert "1.000000001" in table
    assert "5.000000000" in table


def _limit_of(home: Path):
    from headrace.deploy.commands.limits import limits_on_disk

    (limit,) = limits_on_disk(Config.load(home))
    return limit


def test_a_running_frontend_says_what_is_left(tmp_path: Path, capsys):
    async def story() -> None:
        limits = [
            {"subject": "organisation:demo", "metric": "concurrent_requests", "limit": 7},
            {"subject": "organisation:demo", "metric": "budget_nano_total", "limit": 900},
        ]
        overrides = {"limits": limits}
        async with Platform(tmp_path, num_replicas=0, overrides=overrides) as platform:
            directory = {"address": platform.addresses.directory}
            text = json.dumps({"directory": directory, "limits": limits})
            (tmp_path / "config.yaml").write_text(text)
            home = ("--json", "--home", str(tmp_path))
            for words in (("limits", "list"), ("budgets",)):
                await asyncio.to_thread(cli.main, [*words, *home])
            rate = ("--metric", "requests_per_min", "--limit", "5")
            for words in (("limits", "set", "--organisation", "acme", *rate), ("limits", "list")):
                await asyncio.to_thread(cli.main, [*words, *home])

    asyncio.run(story())

    limits, budgets, _, after = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(after) == len(limits) + 1, "what was set is listed before a frontend follows it"
    assert [each["left"] for each in limits] == [7, 900]
    assert [each["left_femto"] for each in budgets] == [900 * 10**6]
