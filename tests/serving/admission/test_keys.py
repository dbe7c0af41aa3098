"""API keys: who gets in, who does not, and what is left on disk."""

import threading

import psycopg
import pytest

from headrace.serving.admission.account_rules import DAY_MS
from headrace.serving.admission.account_view import POLL_S, USED_EVERY_MS
from headrace.serving.admission.database import SqliteDatabase
from headrace.serving.admission.key_store import Pepper, Peppers, cluster_token, secret_file
from headrace.serving.domain.account import AccountState
from headrace.serving.domain.record import Caller
from headrace.serving.domain.scope import Scope
from headrace.serving.errors import (
    AccountsUnavailable,
    AccountSuspended,
    ConfigRefused,
    Unauthenticated,
)


def test_a_fresh_key_opens_the_door_once_it_has_polled(house):
    house.has("acme", "search")
    scope = Scope(models=("qwen-*",))
    new = house.store.create_key(tenant_id="acme", project_id="search", scope=scope)

    assert house.door.lets_in(new.key) is None
    found = house.door.polls().lets_in(new.key)

    assert found == Caller("acme", new.stored.key_id, "search", scope)


def test_a_revoked_key_is_refused_on_every_frontend_at_its_next_poll(house):
    """They poll twice a second, so a revocation holds everywhere within one."""
    house.has("acme")
    new = house.store.create_key(tenant_id="acme")
    doors = [house.door.polls(), house.another_door()]
    assert all(door.lets_in(new.key) for door in doors)

    house.store.revoke_key(key_id=new.stored.key_id)

    assert [door.polls().lets_in(new.key) for door in doors] == [None, None]
    assert POLL_S <= 0.5


def test_a_change_that_takes_long_delays_no_frontend(house):
    """Frontends read beside whoever writes, so another's long change delays no revocation."""
    new = house.store.demo()
    house.door.polls()
    house.store.revoke_key(key_id=new.stored.key_id)

    with house.database.changing():
        assert house.door.polls().lets_in(new.key) is None


def test_a_key_is_good_until_the_millisecond_it_expires(house):
    house.has("acme")
    expires = house.clock.unix_ms() + DAY_MS
    key = house.store.create_key(tenant_id="acme", expires_unix_ms=expires).key
    house.door.polls()

    house.clock.advance(ms=DAY_MS - 1)
    house.door.polls()
    assert house.door.lets_in(key)
    house.clock.advance(ms=1)

    assert house.door.lets_in(key) is None


def test_both_keys_open_the_door_while_they_overlap_and_then_the_new_one_alone(house):
    house.has("acme")
    old = house.store.create_key(tenant_id="acme")
    new = house.store.rotate_key(key_id=old.stored.key_id, overlap_ms=DAY_MS)

    house.door.polls()
    assert house.door.lets_in(old.key)
    assert house.door.lets_in(new.key)
    house.clock.advance(ms=DAY_MS)

    house.door.polls()
    assert house.door.lets_in(old.key) is None
    assert house.door.lets_in(new.key)


@pytest.mark.parametrize("what", ["organisation", "project"])
def test_a_suspended_organisation_or_project_refuses_its_keys_until_it_is_resumed(house, what):
    house.has("acme", "search")
    house.has("apex")
    theirs = house.store.create_key(tenant_id="acme", project_id="search").key
    others = house.store.create_key(tenant_id="apex").key

    def becomes(state: AccountState) -> None:
        if what == "organisation":
            house.store.set_organisation_state(tenant_id="acme", state=state)
        else:
            house.store.set_project_state(tenant_id="acme", project_id="search", state=state)
        house.door.polls()

    becomes(AccountState.SUSPENDED)
    for door in (house.door, house.another_door()):
        with pytest.raises(AccountSuspended):
            door.authenticate(theirs)
        assert door.lets_in(others)
    becomes(AccountState.ACTIVE)

    assert house.door.lets_in(theirs)


def test_every_refusal_reads_the_same(small_house):
    """A message that told a wrong secret from an unknown id would help to guess."""
    house = small_house
    house.has("acme")
    revoked = house.store.create_key(tenant_id="acme")
    house.store.revoke_key(key_id=revoked.stored.key_id)
    expires = house.clock.unix_ms() + 1
    expired = house.store.create_key(tenant_id="acme", expires_unix_ms=expires)
    good = house.store.create_key(tenant_id="acme")
    house.clock.advance(seconds=1)
    house.door.polls()
    id_part, secret = good.key.rsplit("_", 1)
    presented = [
        "",
        "hr_",
        revoked.key,
        expired.key,
        good.key[:-1] + ("a" if good.key[-1] != "a" else "b"),
        f"hr_{expired.stored.key_id}_{secret}",
        f"hr_unknown1_{secret}",
        good.key + "\n",
        " " + good.key,
        "x" * 10_000_000,
        "hr_ключ_" + secret,
        f"{id_part}_{secret}_{secret}",
    ]

    said = set()
    for key in presented:
        with pytest.raises(Unauthenticated) as refusal:
            house.door.authenticate(key)
        said.add(str(refusal.value))

    assert len(said) == 1
    assert secret not in said.pop()


def test_known_keys_go_on_for_a_minute_without_the_store_and_then_nobody_gets_in(small_house):
    """A revocation in that minute could not be heard of, so the minute has an end."""
    house = small_house
    key = house.store.demo().key
    house.door.polls()
    database = house.folder / "accounts.db"
    database.rename(house.folder / "away.db")

    house.clock.advance(seconds=60)
    with pytest.raises(AccountsUnavailable):
        house.door.polls()
    assert house.door.lets_in(key)
    house.clock.advance(ms=1)
    with pytest.raises(AccountsUnavailable):
        house.door.authenticate(key)

    (house.folder / "away.db").rename(database)
    assert house.door.polls().lets_in(key)


def test_postgresql_that_goes_and_comes_back_is_followed_again(postgres, postgres_house):
    house = postgres_house
    new = house.store.demo()
    house.door.polls()

    postgres.stop()
    with pytest.raises(AccountsUnavailable):
        house.door.polls()
    assert house.door.lets_in(new.key)
    postgres.start()
    house.store.revoke_key(key_id=new.stored.key_id)

    assert house.door.polls().lets_in(new.key) is None


def test_a_store_that_was_restored_from_a_backup_is_read_anew(small_house):
    """Its keys are those of the backup: one that was made since is not known any more."""
    house = small_house
    house.has("acme")
    kept = house.store.create_key(tenant_id="acme").key
    backup = (house.folder / "accounts.db").read_bytes()
    lost = house.store.create_key(tenant_id="acme").key
    assert house.door.polls().lets_in(lost)

    (house.folder / "restored.db").write_bytes(backup)
    (house.folder / "restored.db").rename(house.folder / "accounts.db")

    assert house.door.polls().lets_in(lost) is None
    assert house.door.lets_in(kept)


def test_when_a_key_was_last_used_is_written_once_a_minute(house):
    new = house.store.demo()
    house.door.polls()
    first = house.clock.unix_ms()

    def uses_and_writes() -> int | None:
        house.door.authenticate(new.key)
        house.door.view.write_used()
        return house.store.key(key_id=new.stored.key_id).last_used_unix_ms

    assert uses_and_writes() == first
    house.clock.advance(ms=USED_EVERY_MS - 1)
    house.door.polls()
    assert uses_and_writes() == first
    house.clock.advance(ms=1)
    assert uses_and_writes() == first + USED_EVERY_MS
    assert house.store.audit(limit=1).items[0].action == "key.create"


def test_a_frontend_follows_in_a_thread_of_its_own(small_house):
    """And says in its last breath which keys were used."""
    house = small_house
    door = house.another_door()
    door.view.start()
    new = house.store.demo()

    opened = threading.Event()
    asked = threading.Thread(target=lambda: knocks(door, new.key, opened))
    asked.start()
    asked.join(timeout=30)
    door.view.close()

    assert opened.is_set()
    assert house.store.key(key_id=new.stored.key_id).last_used_unix_ms == house.clock.unix_ms()


def knocks(door, key: str, opened: threading.Event) -> None:
    """Until it is let in."""
    while door.lets_in(key) is None:
        opened.wait(0.01)
    opened.set()


def test_the_demo_key_is_the_same_whenever_it_is_asked_for(house):
    """`make serve` prints it, and `headrace keys demo` must print it again."""
    first = house.store.demo()

    house.clock.advance(seconds=9)
    again = house.opened().demo()

    assert again == first
    assert house.door.polls().lets_in(first.key) == Caller("demo", "demo0001")


def test_a_leaked_demo_key_is_replaced_by_revoking_it(house):
    leaked = house.store.demo()
    house.store.revoke_key(key_id=leaked.stored.key_id)

    fresh = house.store.demo()
    house.door.polls()

    assert fresh.key != leaked.key
    assert house.door.lets_in(fresh.key) == Caller("demo", "demo0002")
    assert house.door.lets_in(leaked.key) is None


def test_two_peppers_are_active_and_a_third_waits_until_no_key_needs_the_first(small_house):
    house = small_house
    house.has("acme")
    old, demo = house.store.create_key(tenant_id="acme"), house.store.demo()

    house.store.rotate_pepper()
    new = house.store.create_key(tenant_id="acme")
    house.door.polls()

    assert [bool(house.door.lets_in(each.key)) for each in (old, demo, new)] == [True] * 3
    assert house.store.demo() == demo
    with pytest.raises(ConfigRefused) as refusal:
        house.store.rotate_pepper()
    assert old.stored.key_id in refusal.value.what

    house.store.revoke_key(key_id=old.stored.key_id)
    house.store.revoke_key(key_id=demo.stored.key_id)
    house.store.rotate_pepper()
    assert house.door.polls().lets_in(new.key)
    assert house.store.verify_audit().problem == ""


def test_another_pepper_makes_every_old_key_void(small_house):
    house = small_house
    house.has("acme")
    old, demo = house.store.create_key(tenant_id="acme"), house.store.demo()
    (house.folder / "pepper").unlink()

    door = house.another_door()

    assert door.lets_in(old.key) is None
    assert door.lets_in(demo.key) is None
    assert house.opened().demo().key != demo.key


def test_a_pepper_that_vanishes_is_not_made_again_by_a_running_frontend(small_house):
    """That would void every key in silence; it is an outage, and ends when the file is back."""
    house = small_house
    key = house.store.demo().key
    house.door.polls()
    pepper = (house.folder / "pepper").read_bytes()
    (house.folder / "pepper").unlink()

    with pytest.raises(ConfigRefused):
        house.door.polls()
    assert house.door.lets_in(key)
    (house.folder / "pepper").write_bytes(pepper)

    assert house.door.polls().lets_in(key)


def test_a_crash_between_the_two_files_of_a_pepper_rotation_is_gone_on_from(tmp_path):
    peppers = Peppers(tmp_path / "pepper")
    first = peppers.current
    (tmp_path / "pepper.previous").write_bytes((tmp_path / "pepper").read_bytes())

    after = Peppers(tmp_path / "pepper")
    assert list(after.active.values()) == [first]
    after.rotate()

    assert after.current != first
    assert first in after.active.values()


def test_no_key_is_stored_or_shown_in_a_repr(house):
    house.has("acme")
    new = house.store.create_key(tenant_id="acme")
    secret = new.key.rsplit("_", 1)[1]

    kept = b"".join(file.read_bytes() for file in house.folder.iterdir())
    if not isinstance(house.database, SqliteDatabase):
        with psycopg.connect(**house.database._options) as connection:
            rows = connection.execute("SELECT * FROM headrace_accounts.api_key").fetchall()
        kept += repr(rows).encode()

    assert new.stored.digest.encode() in kept
    assert secret.encode() not in kept
    assert secret not in repr(new)
    assert house.store.peppers.current.secret.decode() not in repr(house.store.peppers.current)
    modes = {file.name: file.stat().st_mode & 0o777 for file in house.folder.iterdir()}
    assert set(modes.values()) == {0o600}, modes


def test_cache_salts_differ_by_tenant_and_by_house(small_house, tmp_path):
    salt_of = small_house.door.authenticator.cache_salt
    other = Pepper(secret_file(tmp_path / "other" / "pepper"))

    salts = [salt_of("acme"), salt_of("zeta"), other.derive("cache-salt/acme")[:16]]

    assert len(set(salts)) == 3
    assert small_house.another_door().authenticator.cache_salt("acme") == salts[0]
    assert {len(salt) for salt in salts} == {16}


def test_processes_that_start_at_once_agree_on_one_secret(tmp_path):
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(secret_file(tmp_path / "new" / "token")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(found)) == 1
    assert cluster_token(tmp_path / "new" / "token") == found[0].decode()


def test_a_secret_that_can_be_guessed_is_refused(tmp_path):
    (tmp_path / "token").write_text("secret\n")

    with pytest.raises(ConfigRefused):
        secret_file(tmp_path / "token")
