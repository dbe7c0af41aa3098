"""API keys: who gets in, who does not, and what is left on disk."""

import json
import threading

import pytest

from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.admission.key_store import KeyStore, cluster_token, secret_file
from headrace.serving.domain.record import Caller
from headrace.serving.errors import ConfigRefused, InvalidRequest, KeyNotFound, Unauthenticated
from headrace.serving.testing.clock import ManualClock


class House:
    """A key store as the command line sees it, and an authenticator as the frontend does."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.clock = ManualClock()
        self.keys = KeyStore(folder / "keys.json", folder / "pepper", clock=self.clock)
        self.door = Authenticator(self.keys, clock=self.clock)

    def lets_in(self, key: str) -> Caller | None:
        try:
            return self.door.authenticate(key)
        except Unauthenticated:
            return None


@pytest.fixture
def house(tmp_path) -> House:
    return House(tmp_path)


def test_a_fresh_key_opens_the_door_within_a_second(house):
    new = house.keys.create(tenant_id="acme")

    house.clock.advance(seconds=1)

    assert house.lets_in(new.key) == Caller("acme", new.stored.key_id)


def test_a_revoked_key_is_refused_within_a_second(house):
    new = house.keys.create(tenant_id="acme")
    house.clock.advance(seconds=1)
    assert house.lets_in(new.key)

    house.keys.revoke(new.stored.key_id)
    house.clock.advance(seconds=1)

    assert house.lets_in(new.key) is None


def test_revoking_twice_keeps_the_first_time_and_revoking_nobody_is_refused(house):
    new = house.keys.create(tenant_id="acme")
    first = house.keys.revoke(new.stored.key_id)
    house.clock.advance(seconds=9)

    assert house.keys.revoke(new.stored.key_id) == first
    with pytest.raises(KeyNotFound):
        house.keys.revoke("nobody")


def test_every_refusal_reads_the_same(house):
    """A message that told a wrong secret from an unknown id would help to guess."""
    new = house.keys.create(tenant_id="acme")
    house.keys.revoke(new.stored.key_id)
    house.clock.advance(seconds=1)
    id_part, secret = new.key.rsplit("_", 1)
    presented = [
        "",
        "hr_",
        new.key,  # revoked
        new.key[:-1] + ("a" if new.key[-1] != "a" else "b"),
        f"hr_unknown1_{secret}",
        new.key + "\n",
        " " + new.key,
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


def test_the_demo_key_is_the_same_whenever_it_is_asked_for(house):
    """`make serve` prints it, and `headrace keys demo` must print it again."""
    first = house.keys.demo()

    house.clock.advance(seconds=9)
    again = House(house.folder)

    assert again.keys.demo().key == first.key
    assert again.lets_in(first.key) == Caller("demo", "demo0001")


def test_a_leaked_demo_key_is_replaced_by_revoking_it(house):
    leaked = house.keys.demo()
    house.keys.revoke(leaked.stored.key_id)

    fresh = house.keys.demo()
    house.clock.advance(seconds=1)

    assert fresh.key != leaked.key
    assert house.lets_in(fresh.key) == Caller("demo", "demo0002")
    assert house.lets_in(leaked.key) is None


def test_another_pepper_makes_every_old_key_void(house):
    old, demo = house.keys.create(tenant_id="acme"), house.keys.demo()
    (house.folder / "pepper").unlink()

    moved = House(house.folder)

    assert moved.lets_in(old.key) is None
    assert moved.lets_in(demo.key) is None
    assert moved.keys.demo().key != demo.key


def test_no_key_is_stored_or_shown_in_a_repr(house):
    new = house.keys.create(tenant_id="acme")
    secret = new.key.rsplit("_", 1)[1]

    kept = b"".join(file.read_bytes() for file in house.folder.iterdir())

    assert secret.encode() not in kept
    assert secret not in repr(new)
    modes = {file.name: file.stat().st_mode & 0o777 for file in house.folder.iterdir()}
    assert set(modes.values()) == {0o600}, modes


@pytest.mark.parametrize("tenant_id", ["", "a b", "a/b", "x" * 65, "ä", "a\nb"])
def test_a_tenants_name_is_plain(house, tenant_id):
    with pytest.raises(InvalidRequest):
        house.keys.create(tenant_id=tenant_id)


def test_a_key_file_that_someone_broke_leaves_the_last_good_keys_in_force(house):
    """Shutting everybody out for a stray editor would be the greater harm; the log says so."""
    new = house.keys.create(tenant_id="acme")
    house.clock.advance(seconds=1)
    assert house.lets_in(new.key)

    (house.folder / "keys.json").write_text("{")
    house.clock.advance(seconds=1)

    assert house.lets_in(new.key)
    with pytest.raises(ConfigRefused):
        House(house.folder)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[]", id="a list"),
        pytest.param('{"version": 2, "keys": []}', id="a newer version"),
        pytest.param('{"version": 1, "keys": [{"key_id": "k"}]}', id="a key without digest"),
        pytest.param(
            json.dumps(
                {
                    "version": 1,
                    "keys": [
                        {
                            "key_id": "k",
                            "tenant_id": 7,
                            "digest": "d",
                            "created_unix_ms": 1,
                            "revoked_unix_ms": None,
                        }
                    ],
                }
            ),
            id="a tenant that is a number",
        ),
    ],
)
def test_a_key_file_is_read_strictly(house, content):
    (house.folder / "keys.json").write_text(content)

    with pytest.raises(ConfigRefused):
        house.keys.read()


def test_commands_that_run_at_once_lose_no_key(house):
    threads = [
        threading.Thread(target=lambda i=i: House(house.folder).keys.create(tenant_id=f"t{i}"))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert {key.tenant_id for key in house.keys.read().values()} == {f"t{i}" for i in range(8)}


def test_cache_salts_differ_by_tenant_and_by_house(house, tmp_path):
    other = tmp_path / "other"
    other.mkdir()

    salts = [
        house.door.cache_salt("acme"),
        house.door.cache_salt("zeta"),
        House(other).door.cache_salt("acme"),
    ]

    assert len(set(salts)) == 3
    assert House(house.folder).door.cache_salt("acme") == salts[0]
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
