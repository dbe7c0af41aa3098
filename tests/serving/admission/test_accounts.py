"""Opening a home's accounts: fresh ones, those of an older Headrace, and what is refused."""

import json
import sqlite3

import pytest

from headrace.serving.admission.account_view import AccountView
from headrace.serving.admission.accounts import local_actor, open_accounts
from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.admission.key_store import Pepper, secret_file
from headrace.serving.config import Config
from headrace.serving.domain.record import Caller
from headrace.serving.errors import ConfigRefused, Unauthenticated
from headrace.serving.testing.clock import ManualClock

OLD_KEYS = {
    "acme_Prod": "hr_k1aaaaaa_0123456789abcdef0123456789abcdef",
    "demo": "hr_k2aaaaaa_0123456789abcdef0123456789abcdef",
}


class Home:
    """A home as an older Headrace left it: `keys.json` and a pepper."""

    def __init__(self, folder) -> None:
        self.config = Config(home=folder)
        self.config.prepare_home()
        self.clock = ManualClock()
        self.pepper = Pepper(secret_file(self.config.pepper_path))
        self.writes([self.entry(tenant, key) for tenant, key in OLD_KEYS.items()])

    def entry(self, tenant_id: str, key: str, revoked_unix_ms: int | None = None):
        return {
            "key_id": key.split("_")[1],
            "tenant_id": tenant_id,
            "digest": self.pepper.digest(key).hex(),
            "created_unix_ms": 5,
            "revoked_unix_ms": revoked_unix_ms,
        }

    def writes(self, keys) -> None:
        self.config.keys_path.write_text(json.dumps({"version": 1, "keys": keys}))

    def opens(self):
        return open_accounts(self.config, clock=self.clock)

    def lets_in(self, key: str) -> Caller | None:
        view = AccountView(self.opens(), clock=self.clock, stale_s=60)
        try:
            return Authenticator(view, clock=self.clock).authenticate(key)
        except Unauthenticated:
            return None


@pytest.fixture
def home(tmp_path) -> Home:
    return Home(tmp_path)


def test_keys_of_an_older_headrace_open_the_door_as_before(home):
    """Under their tenant, whatever it was called then: records and prefix caches go on."""
    for tenant_id, key in OLD_KEYS.items():
        assert home.lets_in(key) == Caller(tenant_id, key.split("_")[1], "default")

    store = home.opens()
    assert [o.tenant_id for o in store.organisations().items] == ["acme_Prod", "demo"]
    assert {k.created_unix_ms for k in store.keys().items} == {5}
    assert {r.action for r in store.audit().items} >= {"key.import"}


def test_they_are_taken_over_once_and_the_file_is_set_aside(home):
    key = OLD_KEYS["demo"]
    home.opens().revoke_key(key_id=key.split("_")[1])
    after = home.opens()

    assert home.lets_in(key) is None
    assert not home.config.keys_path.exists()
    assert (home.config.home / "keys.json.taken-over").exists()
    assert len(after.keys().items) == 2


def test_a_crash_before_the_file_was_set_aside_is_made_good_and_revives_no_key(home):
    old = home.config.keys_path.read_bytes()
    key = OLD_KEYS["demo"]
    home.opens().revoke_key(key_id=key.split("_")[1])
    home.config.keys_path.write_bytes(old)

    assert home.lets_in(key) is None
    assert not home.config.keys_path.exists()


def test_a_key_that_was_revoked_then_stays_revoked(home):
    home.writes([home.entry("acme", OLD_KEYS["demo"], revoked_unix_ms=7)])

    assert home.lets_in(OLD_KEYS["demo"]) is None


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("{", id="no JSON"),
        pytest.param("[]", id="a list"),
        pytest.param('{"version": 2, "keys": []}', id="a newer version"),
        pytest.param('{"version": 1, "keys": [{"key_id": "k"}]}', id="a key without digest"),
        pytest.param(
            '{"version": 1, "keys": [{"key_id": "k", "tenant_id": 7, "digest": "d", '
            '"created_unix_ms": 1, "revoked_unix_ms": null}]}',
            id="a tenant that is a number",
        ),
    ],
)
def test_an_old_file_is_read_strictly(home, content):
    home.config.keys_path.write_text(content)

    with pytest.raises(ConfigRefused):
        home.opens()
    assert home.config.keys_path.exists()


def test_tables_of_another_version_are_refused(home):
    home.opens()
    with sqlite3.connect(home.config.accounts_path) as connection:
        connection.execute("UPDATE account_mark SET schema_version = 9")
    connection.close()

    with pytest.raises(ConfigRefused):
        home.opens()


def test_postgresql_that_is_not_one_is_refused(home):
    config = home.config.with_overrides({"accounts.postgres": "not a connection string"})

    with pytest.raises(ConfigRefused) as refusal:
        open_accounts(config)
    assert refusal.value.field == "accounts.postgres"


def test_whoever_uses_the_files_is_named(home):
    home.opens().demo()

    assert local_actor().startswith("local:")
    assert {r.actor for r in home.opens().audit().items} == {local_actor()}
