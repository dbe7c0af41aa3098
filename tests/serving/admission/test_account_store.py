"""The account store on each database: what changes, what is refused, what survives a crash."""

import os
import threading
from contextlib import contextmanager

import pytest

from headrace.serving.admission import account_store
from headrace.serving.admission.account_rules import DAY_MS, OVERLAP_MS_MAX
from headrace.serving.admission.account_store import AccountStore
from headrace.serving.admission.key_store import Peppers
from headrace.serving.domain.account import AccountState
from headrace.serving.domain.scope import Scope
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import (
    AccountExists,
    AccountNotFound,
    InvalidRequest,
    KeyNotFound,
)
from headrace.serving.testing.clock import ManualClock

FLEX_ONLY = Scope(models=("qwen-*",), tiers=(Tier.FLEX,), default_tier=Tier.FLEX)


def test_a_new_organisation_has_a_default_project(house):
    house.has("acme", "search")

    assert [p.project_id for p in house.store.projects(tenant_id="acme").items] == [
        "default",
        "search",
    ]


def test_making_the_same_again_answers_what_is_there_and_something_else_is_refused(house):
    """So that a client may retry a creation whose answer it lost."""
    made = house.store.create_organisation(tenant_id="acme", display_name="Acme")
    project = house.store.create_project(tenant_id="acme", project_id="search")
    house.clock.advance(seconds=9)

    assert house.store.create_organisation(tenant_id="acme", display_name="Acme") == made
    assert house.store.create_project(tenant_id="acme", project_id="search") == project
    with pytest.raises(AccountExists):
        house.store.create_organisation(tenant_id="acme", display_name="Apex")


def test_a_key_id_of_the_callers_makes_one_key_however_often_it_is_tried(house):
    house.has("acme")
    house.store.create_key(tenant_id="acme", key_id="mine01")

    with pytest.raises(AccountExists):
        house.store.create_key(tenant_id="acme", key_id="mine01")

    assert [key.key_id for key in house.store.keys(tenant_id="acme").items] == ["mine01"]


def test_what_is_kept_of_a_key_comes_back_as_it_was(house):
    house.has("acme", "search")
    expires = house.clock.unix_ms() + DAY_MS

    new = house.store.create_key(
        tenant_id="acme",
        project_id="search",
        label="the crawler's",
        scope=FLEX_ONLY,
        expires_unix_ms=expires,
    )

    assert house.opened().key(key_id=new.stored.key_id) == new.stored
    assert (new.stored.scope, new.stored.expires_unix_ms) == (FLEX_ONLY, expires)
    assert new.key.rsplit("_", 1)[1] not in repr(new)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 41, "Acme", "ä", "a\nb", "a_b"])
def test_names_are_lower_case_slugs(small_house, name):
    small_house.has("acme")

    with pytest.raises(InvalidRequest):
        small_house.store.create_organisation(tenant_id=name)
    with pytest.raises(InvalidRequest):
        small_house.store.create_project(tenant_id="acme", project_id=name)


@pytest.mark.parametrize(
    "scope",
    [
        pytest.param(Scope(models=()), id="no model"),
        pytest.param(Scope(models=("x" * 129,)), id="a pattern that is too long"),
        pytest.param(Scope(models=("a\nb",)), id="a pattern with a line's end"),
        pytest.param(Scope(models=("a",) * 65), id="too many patterns"),
        pytest.param(Scope(methods=("inferense",)), id="a group that does not exist"),
        pytest.param(Scope(methods=("Inference/../Admin",)), id="a method that cannot be"),
        pytest.param(Scope(addresses=("10.0.0.1/8",)), id="bits beyond the prefix"),
        pytest.param(Scope(addresses=("localhost",)), id="a name for an address"),
        pytest.param(Scope(tiers=(Tier.FLEX,)), id="a default tier that is not allowed"),
        pytest.param(Scope(max_tier=Tier.BATCH), id="a default tier above the highest"),
    ],
)
def test_a_scope_that_means_nothing_is_refused(small_house, scope):
    small_house.has("acme")

    with pytest.raises(InvalidRequest) as refusal:
        small_house.store.create_key(tenant_id="acme", scope=scope)

    assert (refusal.value.field or "").startswith("scope.")


def test_nothing_is_made_under_an_organisation_or_project_that_is_not_there(house):
    house.has("acme")

    with pytest.raises(AccountNotFound):
        house.store.create_project(tenant_id="apex", project_id="search")
    with pytest.raises(AccountNotFound):
        house.store.create_key(tenant_id="acme", project_id="search")
    with pytest.raises(AccountNotFound):
        house.store.projects(tenant_id="apex")
    with pytest.raises(KeyNotFound):
        house.store.revoke_key(key_id="nobody")


def test_a_key_of_another_organisation_is_as_if_it_were_not_there(house):
    house.has("acme")
    house.has("apex")
    theirs = house.store.create_key(tenant_id="apex").stored.key_id

    for attempt in (
        lambda: house.store.key(key_id=theirs, tenant_id="acme"),
        lambda: house.store.revoke_key(key_id=theirs, tenant_id="acme"),
        lambda: house.store.rotate_key(key_id=theirs, tenant_id="acme", overlap_ms=0),
        lambda: house.store.update_key(key_id=theirs, tenant_id="acme", label="mine"),
    ):
        with pytest.raises(KeyNotFound):
            attempt()
    assert house.store.key(key_id=theirs).revoked_unix_ms is None


def test_a_rotated_key_ends_with_the_overlap_and_the_new_one_lives_as_long_as_it_did(house):
    house.has("acme", "search")
    start = house.clock.unix_ms()
    old = house.store.create_key(
        tenant_id="acme",
        project_id="search",
        scope=FLEX_ONLY,
        expires_unix_ms=start + 90 * DAY_MS,
    ).stored
    house.clock.advance(seconds=86_400)

    new = house.store.rotate_key(key_id=old.key_id, overlap_ms=DAY_MS).stored

    assert house.store.key(key_id=old.key_id).expires_unix_ms == start + 2 * DAY_MS
    assert new.expires_unix_ms == start + 91 * DAY_MS
    assert (new.project_id, new.scope, new.rotated_from) == ("search", FLEX_ONLY, old.key_id)


def test_a_key_that_ended_or_was_rotated_is_not_rotated_again(house):
    house.has("acme")
    rotated = house.store.create_key(tenant_id="acme").stored.key_id
    revoked = house.store.create_key(tenant_id="acme").stored.key_id
    house.store.rotate_key(key_id=rotated, overlap_ms=DAY_MS)
    house.store.revoke_key(key_id=revoked)

    for key_id in (rotated, revoked, house.store.demo().stored.key_id):
        with pytest.raises(InvalidRequest):
            house.store.rotate_key(key_id=key_id, overlap_ms=DAY_MS)
    with pytest.raises(InvalidRequest):
        house.store.rotate_key(key_id=rotated, overlap_ms=OVERLAP_MS_MAX + 1)


def test_revoking_twice_keeps_the_first_time(house):
    house.has("acme")
    key_id = house.store.create_key(tenant_id="acme").stored.key_id
    first = house.store.revoke_key(key_id=key_id)
    house.clock.advance(seconds=9)

    assert house.store.revoke_key(key_id=key_id) == first


def test_updating_changes_what_is_given_and_nothing_else(house):
    house.has("acme")
    key = house.store.create_key(tenant_id="acme", label="a").stored

    labelled = house.store.update_key(key_id=key.key_id, label="b")
    scoped = house.store.update_key(key_id=key.key_id, scope=FLEX_ONLY)
    ends = house.store.update_key(key_id=key.key_id, expires_unix_ms=house.clock.unix_ms() + DAY_MS)

    assert (labelled.label, labelled.scope, labelled.expires_unix_ms) == ("b", key.scope, None)
    assert (scoped.label, scoped.scope) == ("b", FLEX_ONLY)
    assert ends.expires_unix_ms == house.clock.unix_ms() + DAY_MS
    assert house.store.update_key(key_id=key.key_id, never_expires=True).expires_unix_ms is None


def test_pages_join_to_the_whole_and_no_page_is_unbounded(house):
    for i in range(7):
        house.has(f"t{i}")

    seen, after = [], ""
    while True:
        page = house.store.organisations(after=after, limit=3)
        seen += [o.tenant_id for o in page.items]
        if not (after := page.next_token):
            break

    assert seen == [f"t{i}" for i in range(7)]
    for limit in (0, -1, account_store.KEYS_MAX):
        with pytest.raises(InvalidRequest):
            house.store.keys(limit=limit)


def test_an_organisation_has_a_bounded_number_of_keys(house, monkeypatch):
    monkeypatch.setattr(account_store, "KEYS_MAX", 2)
    house.has("acme")
    first = house.store.create_key(tenant_id="acme").stored.key_id
    house.store.create_key(tenant_id="acme")

    with pytest.raises(InvalidRequest):
        house.store.create_key(tenant_id="acme")
    house.store.revoke_key(key_id=first)

    assert house.store.create_key(tenant_id="acme")


def test_commands_that_run_at_once_lose_nothing_and_leave_a_whole_chain(house):
    stores = [house.opened() for _ in range(6)]
    threads = [
        threading.Thread(target=lambda i=i, s=s: s.create_organisation(tenant_id=f"t{i}"))
        for i, s in enumerate(stores)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [o.tenant_id for o in house.store.organisations().items] == [f"t{i}" for i in range(6)]
    verdict = house.store.verify_audit()
    assert (verdict.records, verdict.problem) == (12, "")


def test_processes_that_make_the_tables_at_once_agree(tmp_path, open_database):
    peppers, errors = Peppers(tmp_path / "pepper"), []

    def opens() -> None:
        database = open_database()
        try:
            AccountStore(database, peppers, clock=ManualClock(), actor="local:ada").demo()
        except Exception as error:
            errors.append(error)
        finally:
            database.close()

    threads = [threading.Thread(target=opens) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []


class DiesAfter:
    """A database whose process is gone after so many statements, without a word."""

    def __init__(self, database, statements: int) -> None:
        self._database = database
        self._left = statements

    def __getattr__(self, name):
        return getattr(self._database, name)

    def changing(self):
        @contextmanager
        def transaction():
            with self._database.changing() as execute:

                def counted(statement, values=(), /):
                    rows = execute(statement, values)
                    self._left -= 1
                    if self._left == 0:
                        os._exit(9)
                    return rows

                yield counted

        return transaction()


def dies_after(house, statements: int, change) -> bool:
    """Whether a process that makes the change died before it was done."""
    child = os.fork()
    if child == 0:
        try:
            database = DiesAfter(house.open_database(), statements)
            peppers = Peppers(house.folder / "pepper")
            change(AccountStore(database, peppers, clock=house.clock, actor="local:ada"))
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), code
    return code == 9


CHANGES = {
    "an organisation is made": lambda s: s.create_organisation(tenant_id="apex"),
    "a project is made": lambda s: s.create_project(tenant_id="acme", project_id="p"),
    "an organisation is suspended": lambda s: s.set_organisation_state(
        tenant_id="acme", state=AccountState.SUSPENDED
    ),
    "a key is made": lambda s: s.create_key(tenant_id="acme", key_id="new1"),
    "a key is updated": lambda s: s.update_key(key_id="key1", label="x"),
    "a key is rotated": lambda s: s.rotate_key(key_id="key1", overlap_ms=0, new_key_id="new1"),
    "a key is revoked": lambda s: s.revoke_key(key_id="key1"),
    "the demo key is made": lambda s: s.demo(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_process_that_dies_at_any_statement_changes_all_or_nothing(house, change):
    """With its audit records: whatever is there was recorded, and the chain holds."""
    house.has("acme")
    house.store.create_key(tenant_id="acme", key_id="key1")
    before = everything(house.store)

    deaths = 0
    while dies_after(house, deaths + 1, change):
        deaths += 1
        assert everything(house.store) == before
        assert house.store.verify_audit().problem == ""

    after = everything(house.store)
    assert deaths >= 3
    assert after != before
    assert len(after[3]) > len(before[3])
    assert house.store.verify_audit().problem == ""


def everything(store: AccountStore):
    tenants = [o.tenant_id for o in store.organisations().items]
    return (
        store.organisations().items,
        [store.projects(tenant_id=each).items for each in tenants],
        store.keys().items,
        store.audit().items,
    )
