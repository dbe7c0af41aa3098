"""Organisations, projects and keys: every change is one transaction with its audit records.

Nothing is deleted. The same store runs on one SQLite file and on PostgreSQL; see `database.py`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from headrace.serving.admission import account_rules as rules
from headrace.serving.admission import account_schema as schema
from headrace.serving.admission.account_change import Change
from headrace.serving.admission.account_reader import AccountReader, no_organisation, no_project
from headrace.serving.admission.database import Database
from headrace.serving.admission.key_store import (
    DEMO_PREFIX,
    Peppers,
    demo_key,
    demo_key_id,
    new_key,
    new_key_id,
)
from headrace.serving.clock import Clock
from headrace.serving.domain.account import (
    AccountState,
    ApiKey,
    NewKey,
    Organisation,
    Project,
)
from headrace.serving.domain.record import DEFAULT_PROJECT
from headrace.serving.domain.scope import UNLIMITED, Scope
from headrace.serving.errors import AccountExists, ConfigRefused, InvalidRequest

DEMO_TENANT = "demo"
DEMO_KEYS_MAX = 10_000
"""Demo keys that may be made and revoked; a home sees a handful in its life."""
PROJECTS_MAX = 1_000
"""Of one organisation."""
KEYS_MAX = 10_000
"""In force, of one organisation. A frontend holds each in memory, at about 1 KB."""


Guard = Callable[[ApiKey], None]
"""Looks at a key as it is and as it is to become, inside the transaction; refuses by raising."""


class AccountStore(AccountReader):
    """Any thread may call; each method is one transaction, and may block for seconds.

    All may raise AccountsUnavailable: nothing was changed then, or, where the answer to a COMMIT
    was lost, all of it was. A creation with the same id may be tried again.
    """

    def __init__(self, database: Database, peppers: Peppers, *, clock: Clock, actor: str) -> None:
        """Makes the tables on first use.

        Raises:
            ConfigRefused: another version's tables.
            AccountsUnavailable: the database does not answer.
        """
        schema.ensure_tables(database)
        super().__init__(database)
        self.peppers = peppers
        self._clock = clock
        self._actor = actor

    def acting_as(self, actor: str) -> "AccountStore":
        """The same store, whose audit records name `actor`."""
        other = copy.copy(self)
        other._actor = actor
        return other

    def close(self) -> None:
        """Of the store and of all that act through it."""
        self._database.close()

    def create_organisation(self, *, tenant_id: str, display_name: str = "") -> Organisation:
        """With a project `default`. The same again answers what is there.

        Raises:
            InvalidRequest: not a name we take.
            AccountExists: the name is taken by one that is called otherwise.
        """
        rules.check_slug(tenant_id, "tenant_id")
        rules.check_label(display_name, "display_name")
        with self._changing() as change:
            if (found := change.organisation(tenant_id)) is None:
                return change.make_organisation(tenant_id, display_name)
            if found.display_name != display_name:
                raise AccountExists(
                    f"There is an organisation {tenant_id!r}, called {found.display_name!r}.",
                    why="Making it again answers it only when it is asked for as it is.",
                    fix="Choose another tenant_id, or ask for it by this name.",
                    field="tenant_id",
                )
            return found

    def set_organisation_state(self, *, tenant_id: str, state: AccountState) -> Organisation:
        """Suspend or resume; in force everywhere within a second. Idempotent.

        Raises:
            AccountNotFound: no such organisation.
        """
        with self._changing() as change:
            if (before := change.organisation(tenant_id)) is None:
                raise no_organisation(tenant_id)
            after = replace(before, state=state)
            change.put(f"organisation.{_verb(state)}", after, before=before)
            return after

    def create_project(self, *, tenant_id: str, project_id: str) -> Project:
        """The same again answers what is there.

        Raises:
            InvalidRequest: not a name we take, or the organisation has too many projects.
            AccountNotFound: no such organisation.
        """
        rules.check_slug(project_id, "project_id")
        with self._changing() as change:
            if change.organisation(tenant_id) is None:
                raise no_organisation(tenant_id)
            if (found := change.project(tenant_id, project_id)) is not None:
                return found
            if change.count_projects(tenant_id) >= PROJECTS_MAX:
                raise _too_many(tenant_id, f"{PROJECTS_MAX:,} projects", "Use one of them.")
            return change.make_project(tenant_id, project_id)

    def set_project_state(self, *, tenant_id: str, project_id: str, state: AccountState) -> Project:
        """Suspend or resume; in force everywhere within a second. Idempotent.

        Raises:
            AccountNotFound: no such project.
        """
        with self._changing() as change:
            if (before := change.project(tenant_id, project_id)) is None:
                raise no_project(tenant_id, project_id)
            after = replace(before, state=state)
            change.put(f"project.{_verb(state)}", after, before=before)
            return after

    def create_key(
        self,
        *,
        tenant_id: str,
        project_id: str = DEFAULT_PROJECT,
        label: str = "",
        scope: Scope = UNLIMITED,
        expires_unix_ms: int | None = None,
        key_id: str = "",
        guard: Guard = lambda key: None,
    ) -> NewKey:
        """A key. The answer is the only place where it stands in full.

        Args:
            tenant_id: whose it is.
            project_id: and of which project.
            label: for people.
            scope: what it may do.
            expires_unix_ms: None is never.
            key_id: empty has one made. With one of the caller's, a retry makes no second key.
            guard: see `Guard`.

        Raises:
            InvalidRequest: an argument is out of range, or the organisation has too many keys.
            AccountNotFound: no such project.
            AccountExists: `key_id` is taken.
        """
        rules.check_scope(scope)
        rules.check_label(label, "label")
        rules.check_expiry(expires_unix_ms, self._clock.unix_ms())
        with self._changing() as change:
            wanted = ApiKey(
                key_id=self._free_id(change, key_id),
                tenant_id=tenant_id,
                project_id=project_id,
                label=label,
                scope=scope,
                created_unix_ms=change.now_unix_ms,
                expires_unix_ms=expires_unix_ms,
            )
            guard(wanted)
            return self._make_key(change, wanted)

    def update_key(
        self,
        *,
        key_id: str,
        tenant_id: str | None = None,
        label: str | None = None,
        scope: Scope | None = None,
        expires_unix_ms: int | None = None,
        never_expires: bool = False,
        guard: Guard = lambda key: None,
    ) -> ApiKey:
        """Change what is given; in force everywhere within a second. None leaves what is there.

        Raises:
            InvalidRequest: an argument is out of range.
            KeyNotFound: no such key in `tenant_id` (None: in any organisation).
        """
        rules.check_expiry(expires_unix_ms, self._clock.unix_ms())
        if scope is not None:
            rules.check_scope(scope)
        if label is not None:
            rules.check_label(label, "label")
        with self._changing() as change:
            before = change.key(key_id, tenant_id)
            guard(before)
            expires = before.expires_unix_ms if expires_unix_ms is None else expires_unix_ms
            after = replace(
                before,
                label=before.label if label is None else label,
                scope=scope or before.scope,
                expires_unix_ms=None if never_expires else expires,
            )
            guard(after)
            change.put("key.update", after, before=before)
            return after

    def rotate_key(
        self,
        *,
        key_id: str,
        overlap_ms: int,
        tenant_id: str | None = None,
        new_key_id: str = "",
        guard: Guard = lambda key: None,
    ) -> NewKey:
        """A key like this one and for as long; this one ends when the overlap does.

        Raises:
            InvalidRequest: the overlap is out of range, or the key is not in force, or was
                rotated before, or is the demo key.
            KeyNotFound: no such key in `tenant_id` (None: in any organisation).
            AccountExists: `new_key_id` is taken.
        """
        rules.check_overlap(overlap_ms)
        with self._changing() as change:
            old = change.key(key_id, tenant_id)
            guard(old)
            now = change.now_unix_ms
            if not old.is_in_force(now) or old.key_id.startswith(DEMO_PREFIX):
                raise _not_rotated(old, "Only a key in force that can be made anew is rotated.")
            if successor := change.successor_of(old):
                raise _not_rotated(old, f"It was rotated already: {successor} replaces it.")
            expires = old.expires_unix_ms
            new = self._make_key(
                change,
                replace(
                    old,
                    key_id=self._free_id(change, new_key_id),
                    created_unix_ms=now,
                    expires_unix_ms=None
                    if expires is None
                    else now + expires - old.created_unix_ms,
                    rotated_from=old.key_id,
                    last_used_unix_ms=None,
                ),
            )
            end = now + overlap_ms if expires is None else min(expires, now + overlap_ms)
            change.put("key.rotate", replace(old, expires_unix_ms=end), before=old)
            return new

    def revoke_key(self, *, key_id: str, tenant_id: str | None = None) -> ApiKey:
        """Refuse the key everywhere within a second. Again changes nothing.

        Raises:
            KeyNotFound: no such key in `tenant_id` (None: in any organisation).
        """
        with self._changing() as change:
            before = change.key(key_id, tenant_id)
            if before.revoked_unix_ms is not None:
                return before
            after = replace(before, revoked_unix_ms=change.now_unix_ms)
            change.put("key.revoke", after, before=before)
            return after

    def demo(self) -> NewKey:
        """The demo organisation's key: the same one at every call, until it is revoked.

        After a revocation the next one in a fixed sequence is made, so a leaked demo key is
        replaced with `headrace keys revoke` and `headrace keys demo`. It never expires.
        """
        with self._changing() as change:
            if change.organisation(DEMO_TENANT) is None:
                change.make_organisation(DEMO_TENANT, "")
            for generation in range(1, DEMO_KEYS_MAX):
                stored = change.find_key(demo_key_id(generation))
                if stored is not None and stored.revoked_unix_ms is not None:
                    continue
                pepper = self.peppers.active.get(stored.pepper_id) if stored else None
                key = demo_key(pepper or self.peppers.current, generation)
                if stored is not None and stored.digest == self._digest(stored, key):
                    return NewKey(key, stored)
                # There is none, or its pepper is gone, and it works no more.
                made = ApiKey(
                    key_id=demo_key_id(generation),
                    tenant_id=DEMO_TENANT,
                    project_id=DEFAULT_PROJECT,
                    label="",
                    scope=UNLIMITED,
                    created_unix_ms=change.now_unix_ms,
                    expires_unix_ms=None,
                )
                return self._stored(change, made, key, before=stored)
        raise AssertionError("more demo keys were revoked than a home ever sees")

    def rotate_pepper(self) -> None:
        """New keys stand on a fresh pepper; those in force go on standing on the one before.

        Raises:
            ConfigRefused: keys in force still stand on the pepper before that, which is dropped.
        """
        with self._changing() as change:
            for pepper_id in list(self.peppers.active)[1:]:
                if left := change.keys_on(pepper_id):
                    raise ConfigRefused(
                        f"Keys in force stand on the previous pepper: {', '.join(left)}.",
                        why="Two peppers are active at a time, and this would drop the older one.",
                        fix="Rotate or revoke these keys first.",
                    )
            self.peppers.rotate()
            change.note("pepper.rotate", target=f"pepper:{self.peppers.current.pepper_id}")

    def bring_in(self, keys: Sequence[ApiKey]) -> int:
        """Take over keys of another store, with their organisations; those known stay as they are.

        Returns how many were new.
        """
        taken = 0
        with self._changing() as change:
            for key in keys:
                if change.organisation(key.tenant_id) is None:
                    change.make_organisation(key.tenant_id, "")
                if change.find_key(key.key_id) is None:
                    change.put("key.import", key)
                    taken += 1
        return taken

    def note_used(self, used: Mapping[str, int]) -> None:
        """When keys were last used, by id, in unix ms. An observation, not a change to audit."""
        with self._database.changing() as execute:
            for key_id, unix_ms in used.items():
                execute(schema.NOTE_USED, (unix_ms, key_id, unix_ms))

    def _make_key(self, change: Change, key: ApiKey) -> NewKey:
        if change.project(key.tenant_id, key.project_id) is None:
            raise no_project(key.tenant_id, key.project_id)
        if change.count_keys(key.tenant_id) >= KEYS_MAX:
            raise _too_many(key.tenant_id, f"{KEYS_MAX:,} keys", "Revoke what nobody uses.")
        return self._stored(change, key, new_key(key.key_id), before=None)

    def _stored(self, change: Change, made: ApiKey, key: str, *, before: ApiKey | None) -> NewKey:
        pepper = self.peppers.current
        stored = replace(made, digest=pepper.digest(key).hex(), pepper_id=pepper.pepper_id)
        change.put("key.create", stored, before=before)
        return NewKey(key, stored)

    def _digest(self, stored: ApiKey, key: str) -> str:
        """As the stored key's own pepper makes it; empty when that is not active."""
        pepper = self.peppers.active.get(stored.pepper_id)
        return pepper.digest(key).hex() if pepper else ""

    def _free_id(self, change: Change, wanted: str) -> str:
        if not wanted:
            while change.find_key(key_id := new_key_id()) is not None:
                pass
            return key_id
        rules.check_key_id(wanted)
        if change.find_key(wanted) is not None:
            raise AccountExists(
                f"There is a key {wanted!r}.",
                why="A key is shown once, when it is made: an earlier try may have made this one.",
                fix="If its answer was lost, revoke it and choose another id.",
                field="key_id",
            )
        return wanted

    @contextmanager
    def _changing(self) -> Iterator[Change]:
        with self._database.changing() as execute:
            change = Change(execute, actor=self._actor, now_unix_ms=self._clock.unix_ms())
            yield change
            change.finish()


def _verb(state: AccountState) -> str:
    return "suspend" if state is AccountState.SUSPENDED else "resume"


def _too_many(tenant_id: str, what: str, fix: str) -> InvalidRequest:
    return InvalidRequest(
        f"The organisation {tenant_id!r} has {what}.",
        why="That is the most that one may have.",
        fix=fix,
        field="tenant_id",
    )


def _not_rotated(key: ApiKey, why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The key {key.key_id!r} is not rotated.",
        why=why,
        fix="Rotate its successor, or make another with `headrace keys create`; for the demo key "
        "revoke it and ask for `headrace keys demo`.",
        field="key_id",
    )
