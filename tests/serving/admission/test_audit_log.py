"""The audit log: every change is in it, no secret is, and tampering shows."""

import sqlite3

import pytest

from headrace.serving.domain.account import AccountState


@pytest.fixture
def busy(house):
    """A house in which something happened: seven records."""
    house.has("acme", "search")
    house.has("apex")
    house.store.create_key(tenant_id="acme", key_id="key1")
    house.store.acting_as("oidc:corp:eve").revoke_key(key_id="key1")
    return house


def tampers(house, *statements: str) -> None:
    """As whoever owns the database can: past the triggers."""
    drops = {
        "SqliteDatabase": ["DROP TRIGGER audit_keeps", "DROP TRIGGER audit_stays"],
        "PostgresDatabase": ["DROP TRIGGER audit_keeps ON audit"],
    }
    with house.database.changing() as execute:
        for statement in [*drops[type(house.database).__name__], *statements]:
            execute(statement)


def test_every_change_names_who_did_what_to_what(busy):
    records = busy.store.audit().items

    assert [(r.seq, r.actor, r.action, r.target) for r in records] == [
        (7, "oidc:corp:eve", "key.revoke", "key:key1"),
        (6, "local:ada", "key.create", "key:key1"),
        (5, "local:ada", "project.create", "project:apex/default"),
        (4, "local:ada", "organisation.create", "organisation:apex"),
        (3, "local:ada", "project.create", "project:acme/search"),
        (2, "local:ada", "project.create", "project:acme/default"),
        (1, "local:ada", "organisation.create", "organisation:acme"),
    ]
    assert [r.changed for r in records[:2]] == ["revoked_unix_ms", ""]
    assert records[0].before == records[1].after
    assert {r.unix_ms for r in records} == {busy.clock.unix_ms()}


def test_what_changes_nothing_leaves_no_record(busy):
    busy.store.revoke_key(key_id="key1")
    busy.store.create_organisation(tenant_id="acme")
    busy.store.set_organisation_state(tenant_id="acme", state=AccountState.ACTIVE)

    assert busy.store.audit().items[0].seq == 7


def test_the_log_is_read_page_by_page_and_by_organisation(busy):
    first = busy.store.audit(tenant_id="acme", limit=3)
    rest = busy.store.audit(tenant_id="acme", before_seq=int(first.next_token), limit=3)

    assert [r.seq for r in (*first.items, *rest.items)] == [7, 6, 3, 2, 1]
    assert rest.next_token == ""


def test_a_whole_chain_verifies_and_its_head_can_be_kept_elsewhere(busy):
    verdict = busy.store.verify_audit()
    busy.store.demo()

    assert (verdict.records, verdict.problem) == (7, "")
    assert busy.store.verify_audit(head=verdict.head).problem == ""
    assert "f" * 64 in busy.store.verify_audit(head="f" * 64).problem


def test_our_own_code_cannot_change_or_remove_a_record(busy):
    for statement in ("UPDATE audit SET actor = 'x'", "DELETE FROM audit"):
        with pytest.raises(Exception, match="only grows"), busy.database.changing() as execute:
            execute(statement)

    assert busy.store.verify_audit().problem == ""


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        pytest.param(
            ["UPDATE audit SET actor = 'local:bob' WHERE seq = 3"],
            "Record 3 was changed",
            id="a changed record",
        ),
        pytest.param(
            ["DELETE FROM audit WHERE seq = 4"], "Record 4 is missing", id="a removed one"
        ),
        pytest.param(
            ["DELETE FROM audit WHERE seq = 1"], "Record 1 is missing", id="the first one"
        ),
        pytest.param(
            ["DELETE FROM audit WHERE seq > 5"],
            "Record 6 is missing, and all up to 7",
            id="an end that was cut off",
        ),
        pytest.param(
            [
                "UPDATE audit SET seq = 100 WHERE seq = 3",
                "UPDATE audit SET seq = 3 WHERE seq = 4",
                "UPDATE audit SET seq = 4 WHERE seq = 100",
            ],
            "Record 3 was changed",
            id="two that changed places",
        ),
        pytest.param(
            [
                "DELETE FROM audit WHERE seq = 3",
                "UPDATE audit SET seq = seq - 1 WHERE seq = 4",
                "UPDATE audit SET seq = seq - 1 WHERE seq = 5",
            ],
            "Record 3 was changed",
            id="a gap that was closed",
        ),
    ],
)
def test_tampering_is_found_and_named(busy, statements, said):
    tampers(busy, *statements)

    verdict = busy.store.verify_audit()

    assert verdict.problem.startswith(said)
    assert verdict.records == int(said.split()[1]) - 1


def test_a_chain_that_was_made_anew_does_not_have_the_head_that_was_kept(small_house, tmp_path):
    """Whoever can write everything can make another chain; a hash kept elsewhere shows it."""
    small_house.has("acme")
    kept = small_house.store.verify_audit().head
    database = tmp_path / "accounts.db"
    database.unlink()
    small_house.clock.advance(seconds=1)

    small_house.opened().create_organisation(tenant_id="acme")
    verdict = small_house.store.verify_audit(head=kept)

    assert kept in verdict.problem


def test_no_secret_is_in_the_log(small_house):
    small_house.has("acme")
    new = small_house.store.create_key(tenant_id="acme")

    with sqlite3.connect(small_house.folder / "accounts.db") as connection:
        kept = repr(connection.execute("SELECT * FROM audit").fetchall())
    connection.close()

    assert new.key.rsplit("_", 1)[1] not in kept
    assert new.stored.digest not in kept
