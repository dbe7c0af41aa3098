"""Reads organisations, projects, keys and the audit log, from any process, beside their writers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from headrace.serving.admission import account_schema as schema
from headrace.serving.admission import audit_log
from headrace.serving.admission.database import Database, Row, Value
from headrace.serving.domain.account import (
    ApiKey,
    AuditRecord,
    AuditVerdict,
    Organisation,
    Page,
    Project,
)
from headrace.serving.errors import AccountNotFound, InvalidRequest, KeyNotFound

PAGE_MAX = 1_000
"""Entries of one page: 500 KB of keys."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What was written since a version: the rows as they are now."""

    version: int
    is_whole: bool
    """Everything there is; forget what is not in it."""
    organisations: Sequence[Organisation] = ()
    projects: Sequence[Project] = ()
    keys: Sequence[ApiKey] = ()


class AccountReader:
    """Any thread may call; each method is one transaction, and may block for seconds.

    All may raise AccountsUnavailable.
    """

    def __init__(self, database: Database) -> None:
        """The tables are there; an `AccountStore` makes them."""
        self._database = database

    def organisation(self, *, tenant_id: str) -> Organisation:
        """Raises AccountNotFound."""
        rows = self._rows(f"{schema.SELECT_ORGANISATION} WHERE tenant_id = ?", (tenant_id,))
        if not rows:
            raise no_organisation(tenant_id)
        return schema.organisation(rows[0])

    def check_exists(self, *, tenant_id: str, project_id: str = "") -> None:
        """Raises AccountNotFound: no such organisation, or no such project in it."""
        self.organisation(tenant_id=tenant_id)
        where = "WHERE tenant_id = ? AND project_id = ?"
        if project_id and not self._rows(
            f"{schema.SELECT_PROJECT} {where}", (tenant_id, project_id)
        ):
            raise no_project(tenant_id, project_id)

    def key(self, *, key_id: str, tenant_id: str | None = None) -> ApiKey:
        """Raises KeyNotFound: no such key in `tenant_id` (None: in any organisation)."""
        rows = self._rows(f"{schema.SELECT_KEY} WHERE key_id = ?", (key_id,))
        found = schema.api_key(rows[0]) if rows else None
        if found is None or tenant_id not in (None, found.tenant_id):
            raise no_key(key_id)
        return found

    def organisations(
        self, *, tenant_id: str | None = None, after: str = "", limit: int = PAGE_MAX
    ) -> Page[Organisation]:
        """By id, from above `after`; None: all of them."""
        where = {"tenant_id = ?": tenant_id, "tenant_id > ?": after}
        rows = self._page(schema.SELECT_ORGANISATION, where, "tenant_id", limit)
        return _as_page([schema.organisation(row) for row in rows], limit, lambda o: o.tenant_id)

    def projects(self, *, tenant_id: str, after: str = "", limit: int = PAGE_MAX) -> Page[Project]:
        """Of one organisation, by id, from above `after`.

        Raises:
            AccountNotFound: no such organisation.
        """
        self.organisation(tenant_id=tenant_id)
        where = {"tenant_id = ?": tenant_id, "project_id > ?": after}
        rows = self._page(schema.SELECT_PROJECT, where, "project_id", limit)
        return _as_page([schema.project(row) for row in rows], limit, lambda p: p.project_id)

    def keys(
        self,
        *,
        tenant_id: str | None = None,
        project_id: str | None = None,
        after: str = "",
        limit: int = PAGE_MAX,
    ) -> Page[ApiKey]:
        """By id, from above `after`; None: of all organisations, of all projects."""
        where = {"tenant_id = ?": tenant_id, "project_id = ?": project_id, "key_id > ?": after}
        rows = self._page(schema.SELECT_KEY, where, "key_id", limit)
        return _as_page([schema.api_key(row) for row in rows], limit, lambda k: k.key_id)

    def audit(
        self, *, tenant_id: str | None = None, before_seq: int | None = None, limit: int = PAGE_MAX
    ) -> Page[AuditRecord]:
        """The newest first, from below `before_seq`; None: of all organisations."""
        _check_limit(limit)
        return audit_log.newest(
            self._database, tenant_id=tenant_id, before_seq=before_seq, limit=limit
        )

    def verify_audit(self, *, head: str = "") -> AuditVerdict:
        """Check the whole chain; see `audit_log.verify`. A million records take seconds."""
        return audit_log.verify(self._database, head=head)

    def changes_since(self, version: int) -> Changes:
        """What was written after `version`; 0 asks for everything.

        A store that is older than `version` was restored from a backup: everything is answered.
        """
        with self._database.reading() as execute:
            ((current, *_),) = execute(schema.SELECT_MARK)
            if current == version:
                return Changes(version=version, is_whole=False)
            since = version if version < current else 0
            found = [
                execute(f"{select} WHERE version > ?", (since,))
                for select in (
                    schema.SELECT_ORGANISATION,
                    schema.SELECT_PROJECT,
                    schema.SELECT_KEY,
                )
            ]
        return Changes(
            version=current,
            is_whole=since == 0,
            organisations=[schema.organisation(row) for row in found[0]],
            projects=[schema.project(row) for row in found[1]],
            keys=[schema.api_key(row) for row in found[2]],
        )

    def _rows(self, statement: str, values: Sequence[Value]) -> Sequence[Row]:
        with self._database.reading() as execute:
            return execute(statement, values)

    def _page(
        self, select: str, where: Mapping[str, Value], order: str, limit: int
    ) -> Sequence[Row]:
        """One row more than a page has, so that the next one is known of."""
        _check_limit(limit)
        chosen = {text: value for text, value in where.items() if value is not None}
        statement = f"{select} WHERE {' AND '.join(chosen)} ORDER BY {order} LIMIT ?"
        return self._rows(statement, (*chosen.values(), limit + 1))


def no_organisation(tenant_id: str) -> AccountNotFound:
    return AccountNotFound(
        f"There is no organisation {tenant_id[:60]!r}.",
        why="It is named by its id, in lower case.",
        fix="See `headrace orgs list`, or make it with `headrace orgs create`.",
        field="tenant_id",
    )


def no_project(tenant_id: str, project_id: str) -> AccountNotFound:
    return AccountNotFound(
        f"There is no project {project_id[:60]!r} in an organisation {tenant_id[:60]!r}.",
        why="Every key belongs to a project of an organisation; a new one has `default`.",
        fix="See `headrace orgs list` and `headrace projects list`, or make it there.",
        field="project_id",
    )


def no_key(key_id: str) -> KeyNotFound:
    return KeyNotFound(
        f"There is no key {key_id[:60]!r} here.",
        why="Keys are named by the part between the two underscores.",
        fix="See `headrace keys list`.",
        field="key_id",
    )


def _as_page(items: Sequence[T], limit: int, name: Callable[[T], str]) -> Page[T]:
    shown = items[:limit]
    return Page(shown, name(shown[-1]) if len(items) > limit else "")


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= PAGE_MAX:
        raise InvalidRequest(
            f"A page of {limit} entries was asked for.",
            why=f"A page has 1 to {PAGE_MAX:,}.",
            fix="Ask for smaller pages, and for the next with the token of the one before.",
            field="page_size",
        )
