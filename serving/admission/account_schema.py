"""The tables of accounts, their statements, and how rows become values.

The same for SQLite and PostgreSQL. Each row carries the `version` of the change that wrote it
last: whoever knows version 41 asks for the rows above it. Nothing is ever deleted.
"""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from headrace.serving.admission.database import MARK_TABLE, Database, Execute, Row, Value
from headrace.serving.domain.account import (
    AccountState,
    ApiKey,
    AuditRecord,
    Organisation,
    Project,
)
from headrace.serving.domain.scope import Scope
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import ConfigRefused

SCHEMA_VERSION = 1
SCOPES_MAX = 1024
"""Different scopes kept parsed, at about 1 KB each."""

Entity = Organisation | Project | ApiKey

_TABLES = """
CREATE TABLE account_mark (
    only_row {integer} PRIMARY KEY CHECK (only_row = 1),
    schema_version {integer} NOT NULL,
    version {integer} NOT NULL,
    audit_seq {integer} NOT NULL,
    audit_hash {text} NOT NULL
) {strict};
CREATE TABLE organisation (
    tenant_id {text} PRIMARY KEY,
    display_name {text} NOT NULL,
    state {text} NOT NULL,
    created_unix_ms {integer} NOT NULL,
    version {integer} NOT NULL
) {strict};
CREATE TABLE project (
    tenant_id {text} NOT NULL REFERENCES organisation,
    project_id {text} NOT NULL,
    state {text} NOT NULL,
    created_unix_ms {integer} NOT NULL,
    version {integer} NOT NULL,
    PRIMARY KEY (tenant_id, project_id)
) {strict};
CREATE TABLE api_key (
    key_id {text} PRIMARY KEY,
    tenant_id {text} NOT NULL,
    project_id {text} NOT NULL,
    label {text} NOT NULL,
    scope {text} NOT NULL,
    created_unix_ms {integer} NOT NULL,
    expires_unix_ms {integer},
    revoked_unix_ms {integer},
    rotated_from {text} NOT NULL,
    digest {text} NOT NULL,
    pepper_id {text} NOT NULL,
    last_used_unix_ms {integer},
    version {integer} NOT NULL,
    FOREIGN KEY (tenant_id, project_id) REFERENCES project
) {strict};
CREATE TABLE audit (
    seq {integer} PRIMARY KEY,
    unix_ms {integer} NOT NULL,
    actor {text} NOT NULL,
    action {text} NOT NULL,
    tenant_id {text} NOT NULL,
    target {text} NOT NULL,
    changed {text} NOT NULL,
    before_digest {text} NOT NULL,
    after_digest {text} NOT NULL,
    previous_hash {text} NOT NULL,
    hash {text} NOT NULL
) {strict};
CREATE INDEX organisation_by_version ON organisation (version);
CREATE INDEX project_by_version ON project (version);
CREATE INDEX api_key_by_version ON api_key (version);
CREATE INDEX api_key_by_project ON api_key (tenant_id, project_id, key_id);
CREATE INDEX audit_by_tenant ON audit (tenant_id, seq);
INSERT INTO account_mark VALUES (1, {version}, 0, 0, '')
"""

_ORGANISATION = ("tenant_id", "display_name", "state", "created_unix_ms")
_PROJECT = ("tenant_id", "project_id", "state", "created_unix_ms")
_KEY = (
    *("key_id", "tenant_id", "project_id", "label", "scope", "created_unix_ms"),
    *("expires_unix_ms", "revoked_unix_ms", "rotated_from", "digest", "pepper_id"),
)
_AUDIT = (
    *("seq", "unix_ms", "actor", "action", "tenant_id", "target", "changed"),
    *("before_digest", "after_digest", "previous_hash", "hash"),
)


def _select(table: str, columns: Sequence[str]) -> str:
    return f"SELECT {', '.join(columns)} FROM {table}"  # noqa: S608 - fixed names


def _insert(table: str, columns: Sequence[str]) -> str:
    marks = ", ".join("?" for _ in columns)
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})"  # noqa: S608 - fixed names


def _upsert(table: str, keys: Sequence[str], columns: Sequence[str]) -> str:
    columns = (*columns, "version")
    sets = ", ".join(f"{name} = excluded.{name}" for name in columns if name not in keys)
    return f"{_insert(table, columns)} ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {sets}"


SELECT_MARK = f"SELECT version, audit_seq, audit_hash FROM {MARK_TABLE}"  # noqa: S608 - a fixed name
UPDATE_MARK = f"UPDATE {MARK_TABLE} SET version = ?, audit_seq = ?, audit_hash = ?"  # noqa: S608
SELECT_ORGANISATION = _select("organisation", _ORGANISATION)
SELECT_PROJECT = _select("project", _PROJECT)
SELECT_KEY = _select("api_key", (*_KEY, "last_used_unix_ms"))
SELECT_AUDIT = _select("audit", _AUDIT)
INSERT_AUDIT = _insert("audit", _AUDIT)
NOTE_USED = """
UPDATE api_key SET last_used_unix_ms = ?
WHERE key_id = ? AND (last_used_unix_ms IS NULL OR last_used_unix_ms < ?)
"""
_PUT: Mapping[type[Entity], str] = {
    Organisation: _upsert("organisation", ("tenant_id",), _ORGANISATION),
    Project: _upsert("project", ("tenant_id", "project_id"), _PROJECT),
    # Not when it was used last: that is noted beside all this, by frontends.
    ApiKey: _upsert("api_key", ("key_id",), _KEY),
}


def ensure_tables(database: Database) -> None:
    """Make the tables where there are none; refuse those of another version.

    Raises:
        ConfigRefused: another version of Headrace made them.
        AccountsUnavailable: the database does not answer.
    """
    with database.reading() as execute:
        is_there = bool(execute(database.find_mark))
    if not is_there:
        names = {name: getattr(database, name) for name in ("integer", "text", "strict")}
        tables = _TABLES.format(version=SCHEMA_VERSION, **names).split(";\n")
        with database.changing() as execute:
            for statement in database.first_statements:
                execute(statement)
            # Another process may have been first, and this one waited for it.
            if not execute(database.find_mark):
                for statement in (*tables, *database.last_statements):
                    execute(statement)
    with database.reading() as execute:
        ((found,),) = execute(f"SELECT schema_version FROM {MARK_TABLE}")  # noqa: S608 - a fixed name
    if found != SCHEMA_VERSION:
        raise ConfigRefused(
            f"The accounts in {database!r} have format {found}, and ours is {SCHEMA_VERSION}.",
            why="Writing to newer tables could lose what their format added.",
            fix="Upgrade Headrace, or keep its accounts elsewhere.",
        )


def put(execute: Execute, entity: Entity, version: int) -> None:
    """Write one row, made or changed."""
    values: tuple[Value, ...]
    if isinstance(entity, Organisation):
        values = (entity.tenant_id, entity.display_name, entity.state.value, entity.created_unix_ms)
    elif isinstance(entity, Project):
        values = (entity.tenant_id, entity.project_id, entity.state.value, entity.created_unix_ms)
    else:
        assert entity.digest
        assert entity.pepper_id
        values = (
            entity.key_id,
            entity.tenant_id,
            entity.project_id,
            entity.label,
            canonical(scope_as_json(entity.scope)),
            entity.created_unix_ms,
            entity.expires_unix_ms,
            entity.revoked_unix_ms,
            entity.rotated_from,
            entity.digest,
            entity.pepper_id,
        )
    execute(_PUT[type(entity)], (*values, version))


def organisation(row: Row) -> Organisation:
    tenant_id, display_name, state, created = row
    return Organisation(
        tenant_id=tenant_id,
        display_name=display_name,
        state=AccountState(state),
        created_unix_ms=created,
    )


def project(row: Row) -> Project:
    tenant_id, project_id, state, created = row
    return Project(
        tenant_id=tenant_id,
        project_id=project_id,
        state=AccountState(state),
        created_unix_ms=created,
    )


def api_key(row: Row) -> ApiKey:
    key_id, tenant_id, project_id, label, scope, created, *rest = row
    expires, revoked, rotated_from, digest, pepper_id, last_used = rest
    return ApiKey(
        key_id=key_id,
        tenant_id=tenant_id,
        project_id=project_id,
        label=label,
        scope=_scope(scope),
        created_unix_ms=created,
        expires_unix_ms=expires,
        revoked_unix_ms=revoked,
        rotated_from=rotated_from,
        last_used_unix_ms=last_used,
        digest=digest,
        pepper_id=pepper_id,
    )


def audit_record(row: Row) -> AuditRecord:
    seq, unix_ms, actor, action, tenant_id, target, changed, *hashes = row
    before, after, previous_hash, own_hash = hashes
    return AuditRecord(
        seq=seq,
        unix_ms=unix_ms,
        actor=actor,
        action=action,
        tenant_id=tenant_id,
        target=target,
        changed=changed,
        before=before,
        after=after,
        previous_hash=previous_hash,
        hash=own_hash,
    )


def public_state(entity: Entity) -> Mapping[str, Any]:
    """What the audit log digests, and scripts read: everything but the digest and the pepper."""
    if isinstance(entity, Organisation):
        return {
            "tenant_id": entity.tenant_id,
            "display_name": entity.display_name,
            "state": entity.state.value,
            "created_unix_ms": entity.created_unix_ms,
        }
    if isinstance(entity, Project):
        return {
            "tenant_id": entity.tenant_id,
            "project_id": entity.project_id,
            "state": entity.state.value,
            "created_unix_ms": entity.created_unix_ms,
        }
    return {
        "key_id": entity.key_id,
        "tenant_id": entity.tenant_id,
        "project_id": entity.project_id,
        "label": entity.label,
        "scope": scope_as_json(entity.scope),
        "created_unix_ms": entity.created_unix_ms,
        "expires_unix_ms": entity.expires_unix_ms,
        "revoked_unix_ms": entity.revoked_unix_ms,
        "rotated_from": entity.rotated_from,
    }


def scope_as_json(scope: Scope) -> Mapping[str, Any]:
    return {
        "models": list(scope.models),
        "tiers": [tier.value for tier in scope.tiers],
        "methods": list(scope.methods),
        "addresses": list(scope.addresses),
        "default_tier": scope.default_tier.value,
        "max_tier": scope.max_tier.value,
    }


@lru_cache(SCOPES_MAX)
def _scope(text: str) -> Scope:
    """Of what `scope_as_json` made. Most keys have one of a few scopes, and share them here."""
    raw = json.loads(text)
    return Scope(
        models=tuple(raw["models"]),
        tiers=tuple(Tier(each) for each in raw["tiers"]),
        methods=tuple(raw["methods"]),
        addresses=tuple(raw["addresses"]),
        default_tier=Tier(raw["default_tier"]),
        max_tier=Tier(raw["max_tier"]),
    )


def canonical(value: object) -> str:
    """One text for one value, whoever writes it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
