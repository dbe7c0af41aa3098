"""One transaction that changes accounts: whatever it writes leaves its audit record."""

from headrace.serving.admission import account_schema as schema
from headrace.serving.admission import audit_log
from headrace.serving.admission.account_reader import no_key
from headrace.serving.admission.database import Execute
from headrace.serving.domain.account import (
    AccountState,
    ApiKey,
    AuditRecord,
    Organisation,
    Project,
)
from headrace.serving.domain.record import DEFAULT_PROJECT

SHOWN_MAX = 6
"""Keys that a refusal names; the reader looks the others up."""


class Change:
    """Reads and writes inside one transaction, which the store begins and ends."""

    def __init__(self, execute: Execute, *, actor: str, now_unix_ms: int) -> None:
        self.now_unix_ms = now_unix_ms
        self._execute = execute
        self._actor = actor
        ((self._version, self._audit_seq, self._audit_hash),) = execute(schema.SELECT_MARK)
        self._version_before = self._version

    def put(
        self, action: str, after: schema.Entity, *, before: schema.Entity | None = None
    ) -> None:
        """Write `after` in place of `before`, with its audit record; nothing if they are equal."""
        if after == before:
            return
        self.note(
            action,
            tenant_id=after.tenant_id,
            target=audit_log.target_of(after),
            changed=audit_log.differences(before, after),
            before=audit_log.state_digest(before),
            after=audit_log.state_digest(after),
        )
        schema.put(self._execute, after, self._version)

    def note(
        self,
        action: str,
        *,
        target: str,
        tenant_id: str = "",
        changed: str = "",
        before: str = "",
        after: str = "",
    ) -> None:
        """Append an audit record; the rows of this transaction have its number as their version."""
        record = audit_log.chained(
            AuditRecord(
                seq=self._audit_seq + 1,
                unix_ms=self.now_unix_ms,
                actor=self._actor,
                action=action,
                tenant_id=tenant_id,
                target=target,
                changed=changed,
                before=before,
                after=after,
                previous_hash=self._audit_hash,
            )
        )
        audit_log.append(self._execute, record)
        self._audit_seq, self._audit_hash = record.seq, record.hash
        self._version = self._version_before + 1

    def finish(self) -> None:
        """The last statement: from the COMMIT on, whoever polls sees the new version."""
        if self._version != self._version_before:
            values = (self._version, self._audit_seq, self._audit_hash)
            self._execute(schema.UPDATE_MARK, values)

    def make_organisation(self, tenant_id: str, display_name: str) -> Organisation:
        """With a project `default`."""
        made = Organisation(
            tenant_id=tenant_id,
            display_name=display_name,
            state=AccountState.ACTIVE,
            created_unix_ms=self.now_unix_ms,
        )
        self.put("organisation.create", made)
        self.make_project(tenant_id, DEFAULT_PROJECT)
        return made

    def make_project(self, tenant_id: str, project_id: str) -> Project:
        made = Project(
            tenant_id=tenant_id,
            project_id=project_id,
            state=AccountState.ACTIVE,
            created_unix_ms=self.now_unix_ms,
        )
        self.put("project.create", made)
        return made

    def organisation(self, tenant_id: str) -> Organisation | None:
        rows = self._execute(f"{schema.SELECT_ORGANISATION} WHERE tenant_id = ?", (tenant_id,))
        return schema.organisation(rows[0]) if rows else None

    def project(self, tenant_id: str, project_id: str) -> Project | None:
        statement = f"{schema.SELECT_PROJECT} WHERE tenant_id = ? AND project_id = ?"
        rows = self._execute(statement, (tenant_id, project_id))
        return schema.project(rows[0]) if rows else None

    def find_key(self, key_id: str) -> ApiKey | None:
        rows = self._execute(f"{schema.SELECT_KEY} WHERE key_id = ?", (key_id,))
        return schema.api_key(rows[0]) if rows else None

    def key(self, key_id: str, tenant_id: str | None) -> ApiKey:
        """Raises KeyNotFound: no such key in `tenant_id` (None: in any organisation)."""
        found = self.find_key(key_id)
        if found is None or tenant_id not in (None, found.tenant_id):
            raise no_key(key_id)
        return found

    def successor_of(self, key: ApiKey) -> str:
        """The id of the key that replaces it; empty when none does."""
        statement = "SELECT key_id FROM api_key WHERE tenant_id = ? AND rotated_from = ?"
        rows = self._execute(statement, (key.tenant_id, key.key_id))
        return rows[0][0] if rows else ""

    def keys_on(self, pepper_id: str) -> list[str]:
        """Ids of keys in force whose digests were made with this pepper; a few of them."""
        rows = self._execute(
            "SELECT key_id FROM api_key WHERE pepper_id = ? AND revoked_unix_ms IS NULL "
            "AND (expires_unix_ms IS NULL OR expires_unix_ms > ?) ORDER BY key_id LIMIT ?",
            (pepper_id, self.now_unix_ms, SHOWN_MAX),
        )
        return [key_id for (key_id,) in rows]

    def count_projects(self, tenant_id: str) -> int:
        statement = "SELECT count(*) FROM project WHERE tenant_id = ?"
        ((count,),) = self._execute(statement, (tenant_id,))
        return count

    def count_keys(self, tenant_id: str) -> int:
        """Those in force."""
        ((count,),) = self._execute(
            "SELECT count(*) FROM api_key WHERE tenant_id = ? AND revoked_unix_ms IS NULL "
            "AND (expires_unix_ms IS NULL OR expires_unix_ms > ?)",
            (tenant_id, self.now_unix_ms),
        )
        return count
