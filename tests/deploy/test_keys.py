"""`headrace keys`: what an operator types and what scripts read."""

import json

import pytest

from headrace.deploy import cli
from headrace.serving.admission.account_view import AccountView
from headrace.serving.admission.accounts import open_accounts
from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config


@pytest.fixture
def headrace(tmp_path, capsys):
    """Types `headrace …` and answers exit code, standard output and standard error."""

    def types(*words: str) -> tuple[int, str, str]:
        code = cli.main([*words, "--home", str(tmp_path)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return types


def caller(home, key: str):
    store = open_accounts(Config.load(home))
    view = AccountView(store, clock=SystemClock(), stale_s=60)
    return Authenticator(view, clock=SystemClock()).authenticate(key)


def test_the_demo_key_is_printed_again_and_opens_the_door(headrace, tmp_path):
    first = json.loads(headrace("keys", "demo", "--json")[1])["key"]
    again = headrace("keys", "demo")[1].strip()

    assert first == again
    assert caller(tmp_path, first).tenant_id == "demo"


def test_a_made_key_goes_to_stdout_alone_and_is_never_shown_again(headrace, tmp_path):
    """So that KEY=$(headrace keys create …) works."""
    code, out, err = headrace("keys", "create", "--tenant", "acme")
    listed = headrace("keys", "list")[1] + headrace("keys", "list", "--json")[1]

    assert (code, out.count("\n")) == (0, 1)
    assert "cannot be shown again" in err
    assert caller(tmp_path, out.strip()).tenant_id == "acme"
    assert out.strip() not in listed


def test_a_revoked_key_is_listed_as_such(headrace):
    made = json.loads(headrace("keys", "create", "--tenant", "acme", "--json")[1])
    code, out, _ = headrace("keys", "revoke", made["key_id"])

    (entry,) = json.loads(headrace("keys", "list", "--json")[1])
    assert (code, out) == (0, f"Key {made['key_id']} of tenant acme is revoked.\n")
    assert entry["key_id"] == made["key_id"]
    assert entry["revoked_unix_ms"] is not None
    assert "revoked" in headrace("keys", "list")[1]


def test_an_unknown_key_and_a_wrong_tenant_are_refused_with_a_fix(headrace):
    unknown = headrace("keys", "revoke", "nobody")
    wrong = headrace("keys", "create", "--tenant", "a b")

    assert (unknown[0], wrong[0]) == (cli.EXIT_REFUSED, cli.EXIT_REFUSED)
    assert "headrace keys list" in unknown[2]
    assert unknown[1] == wrong[1] == ""
