"""`headrace orgs|projects|keys|audit`: at home on the store, and elsewhere on a frontend."""

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.deploy import cli
from headrace.serving.admission.accounts import local_actor, open_accounts
from headrace.serving.domain.scope import Scope
from headrace.serving.testing.platform import Platform

DAY_MS = 86_400_000


class Terminal:
    """Types `headrace …`, always with the same options at the end."""

    def __init__(self, capsys, *options: str) -> None:
        self._capsys = capsys
        self._options = options

    def types(self, *words: str) -> tuple[int, str, str]:
        code = cli.main([*words, *self._options])
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def reads(self, *words: str):
        code, out, err = self.types(*words, "--json")
        assert code == 0, err
        return json.loads(out)


@pytest.fixture
def at_home(tmp_path, capsys) -> Terminal:
    return Terminal(capsys, "--home", str(tmp_path))


@pytest.fixture
def elsewhere(tmp_path, capsys) -> Iterator[Terminal]:
    """A frontend that runs, and a key of its demo organisation that administers it."""
    started, stopping = threading.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        async with Platform(tmp_path, num_replicas=0) as platform:
            store = open_accounts(platform.config)
            key = store.create_key(tenant_id="demo", scope=Scope(methods=("admin",))).key
            await platform.sees_accounts()
            (tmp_path / "token").write_text(key + "\n")
            found.append(platform.addresses.grpc)
            started.set()
            await asyncio.to_thread(stopping.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(30)
        token = str(tmp_path / "token")
        yield Terminal(capsys, "--address", found[0], "--token-file", token)
    finally:
        stopping.set()
        thread.join()


def test_an_organisation_is_made_listed_suspended_and_resumed(at_home):
    made = at_home.reads("orgs", "create", "acme", "--name", "Acme")
    suspended = at_home.types("orgs", "suspend", "acme")
    listed = at_home.reads("tenants", "list")
    resumed = at_home.reads("orgs", "resume", "acme")

    assert (made["tenant_id"], made["display_name"], made["state"]) == ("acme", "Acme", "active")
    assert suspended == (0, "Organisation acme is suspended.\n", "")
    assert [(o["tenant_id"], o["state"]) for o in listed] == [("acme", "suspended")]
    assert resumed["state"] == "active"


def test_a_project_has_its_own_keys(at_home):
    at_home.types("orgs", "create", "acme")
    at_home.types("projects", "create", "search", "--tenant", "acme")
    at_home.reads("keys", "create", "--tenant", "acme", "--project", "search")
    at_home.reads("keys", "create", "--tenant", "acme")

    projects = at_home.reads("projects", "list", "--tenant", "acme")
    keys = at_home.reads("keys", "list", "--tenant", "acme", "--project", "search")
    assert [p["project_id"] for p in projects] == ["default", "search"]
    assert [k["project_id"] for k in keys] == ["search"]
    assert "search" in at_home.types("projects", "list", "--tenant", "acme")[1]


def test_a_key_is_made_with_the_scope_that_the_options_say(at_home):
    options = (
        *("--models", "qwen-*, tiny", "--tiers", "flex,batch", "--default-tier", "flex"),
        *("--max-tier", "standard", "--methods", "inference", "--addresses", "10.0.0.0/8"),
        *("--label", "the crawler's", "--expires", "never", "--key-id", "mine"),
    )
    made = at_home.reads("keys", "create", "--tenant", "acme", *options)
    changed = at_home.reads("keys", "update", "mine", "--models", "*", "--addresses", "none")

    assert made["scope"] == {
        "models": ["qwen-*", "tiny"],
        "tiers": ["flex", "batch"],
        "methods": ["inference"],
        "addresses": ["10.0.0.0/8"],
        "default_tier": "flex",
        "max_tier": "standard",
    }
    assert (made["key_id"], made["label"], made["expires_unix_ms"]) == (
        "mine",
        "the crawler's",
        None,
    )
    assert changed["scope"] == made["scope"] | {"models": ["*"], "addresses": []}


def test_a_key_ends_in_ninety_days_unless_told_otherwise(at_home):
    """And the demo key never does."""
    made = at_home.reads("keys", "create", "--tenant", "acme")

    assert made["expires_unix_ms"] - made["created_unix_ms"] == pytest.approx(90 * DAY_MS, abs=9999)
    assert at_home.reads("keys", "demo")["expires_unix_ms"] is None


def test_a_rotated_key_shows_its_successor_once(at_home):
    old = at_home.reads("keys", "create", "--tenant", "acme")
    code, out, err = at_home.types("keys", "rotate", old["key_id"], "--overlap", "2h")

    listed = {k["key_id"]: k for k in at_home.reads("keys", "list")}
    new = out.strip().split("_")[1]
    assert code == 0
    assert "good for another 2h" in err
    assert listed[new]["rotated_from"] == old["key_id"]
    assert listed[old["key_id"]]["expires_unix_ms"] < listed[new]["expires_unix_ms"]


def test_a_pepper_is_rotated_and_the_keys_go_on(at_home, tmp_path):
    first = at_home.reads("keys", "demo")["key"]
    at_home.reads("keys", "rotate-pepper")

    assert at_home.reads("keys", "demo")["key"] == first
    code, _, err = at_home.types("keys", "rotate-pepper")
    assert (code, "demo0001" in err) == (cli.EXIT_REFUSED, True)
    assert (tmp_path / "pepper.previous").stat().st_mode & 0o777 == 0o600


def test_the_audit_log_names_the_user_and_shows_tampering(at_home, tmp_path):
    at_home.types("orgs", "create", "acme")
    (_, newest) = at_home.reads("audit", "list", "--limit", "2")
    verdict = at_home.reads("audit", "verify")

    assert (newest["actor"], newest["action"]) == (local_actor(), "organisation.create")
    assert (verdict["ok"], verdict["records"]) == (True, 2)
    assert verdict["head"] in at_home.types("audit", "verify")[1]
    with sqlite3.connect(tmp_path / "accounts.db") as connection:
        connection.execute("DROP TRIGGER audit_keeps")
        connection.execute("UPDATE audit SET actor = 'local:bob' WHERE seq = 1")
    connection.close()
    code, out, _ = at_home.types("audit", "verify")
    assert (code, "Record 1 was changed" in out) == (1, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("orgs", "create", "Acme Inc"), "lower-case"),
        (("orgs", "suspend", "nobody"), "headrace orgs list"),
        (("projects", "list", "--tenant", "nobody"), "headrace orgs list"),
        (("keys", "create", "--tenant", "acme", "--project", "p"), "headrace projects list"),
        (("keys", "create", "--tenant", "acme", "--tiers", "gold"), "The tiers are"),
        (("keys", "create", "--tenant", "acme", "--expires", "soon"), "90d"),
        (("keys", "create", "--tenant", "acme", "--addresses", "here"), "CIDR"),
        (("keys", "rotate", "nobody"), "headrace keys list"),
        (("audit", "list", "--limit", "0"), "1 to 10,000"),
        (("orgs", "list", "--token-file", "x"), "--address"),
        (("orgs", "list", "--address", "127.0.0.1:1"), "--token-file"),
        (("orgs", "list", "--address", "127.0.0.1:1", "--token-file", "/none"), "Check the path"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_fix(at_home, words, said):
    code, out, err = at_home.types(*words)

    assert (code, out) == (cli.EXIT_REFUSED, "")
    assert said in err


def test_the_same_commands_work_on_a_frontend_elsewhere(elsewhere):
    """With a key of the demo organisation, which is all that it reaches."""
    project = elsewhere.reads("projects", "create", "search", "--tenant", "demo")
    made = elsewhere.reads(
        *("keys", "create", "--tenant", "demo", "--project", "search"),
        *("--key-id", "mine", "--expires", "never", "--tiers", "flex", "--default-tier", "flex"),
    )
    changed = elsewhere.reads("keys", "update", "mine", "--label", "x", "--expires", "1d")
    rotated = elsewhere.reads("keys", "rotate", "mine", "--overlap", "1h")
    revoked = elsewhere.reads("keys", "revoke", "mine")
    suspended = elsewhere.reads("projects", "suspend", "search", "--tenant", "demo")

    assert project["project_id"] == "search"
    assert made["key"].startswith("hr_mine_")
    assert (made["expires_unix_ms"], made["scope"]["tiers"]) == (None, ["flex"])
    assert (changed["label"], changed["scope"]) == ("x", made["scope"])
    assert rotated["rotated_from"] == "mine"
    assert revoked["revoked_unix_ms"] is not None
    assert suspended["state"] == "suspended"
    assert {k["key_id"] for k in elsewhere.reads("keys", "list")} >= {"mine", "demo0001"}
    assert [o["tenant_id"] for o in elsewhere.reads("orgs", "list")] == ["demo"]
    assert [p["project_id"] for p in elsewhere.reads("projects", "list", "--tenant", "demo")] == [
        "default",
        "search",
    ]
    assert elsewhere.reads("audit", "list", "--limit", "1")[0]["action"] == "project.suspend"
    who = elsewhere.reads("keys", "whoami")
    assert who["grants"] == [{"role": "admin", "tenant_id": "demo"}]
    for words in (("orgs", "create", "acme"), ("audit", "verify"), ("orgs", "suspend", "demo")):
        code, _, err = elsewhere.types(*words)
        assert (code, "permission" in err) == (cli.EXIT_REFUSED, True), words


def test_a_home_can_be_asked_who_one_is(at_home: Terminal, tmp_path: Path):
    assert at_home.reads("keys", "whoami")["actor"] == local_actor()
    assert "every organisation" in at_home.types("keys", "whoami")[1]
