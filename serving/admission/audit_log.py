"""The audit log: who changed what, in a chain that shows where it was tampered with.

Each record's hash covers its content and the hash before it, so a record that was changed, removed
or moved breaks the chain at its place, and the check names it. The newest hash also stands in the
mark that every change writes, so a tail that was cut off is missed too. Whoever can rewrite all of
that can make another chain; a hash that was kept elsewhere (`headrace audit verify --head`) shows
even this.
"""

import hashlib
from dataclasses import asdict, replace

from headrace.serving.admission.account_schema import (
    INSERT_AUDIT,
    SELECT_AUDIT,
    SELECT_MARK,
    Entity,
    audit_record,
    canonical,
    public_state,
)
from headrace.serving.admission.database import Database, Execute, Value
from headrace.serving.domain.account import (
    ApiKey,
    AuditRecord,
    AuditVerdict,
    Organisation,
    Page,
)

VERIFY_ROWS = 5_000
"""Records checked by one transaction: 3 MB, and 20 ms."""


def state_digest(entity: Entity | None) -> str:
    """SHA-256 of what is public of it; empty for nothing."""
    if entity is None:
        return ""
    return hashlib.sha256(canonical(public_state(entity)).encode()).hexdigest()


def differences(before: Entity | None, after: Entity) -> str:
    """Names of the fields that differ; empty for what is new."""
    if before is None:
        return ""
    old, new = public_state(before), public_state(after)
    return ",".join(name for name in new if new[name] != old[name])


def target_of(entity: Entity) -> str:
    if isinstance(entity, ApiKey):
        return f"key:{entity.key_id}"
    if isinstance(entity, Organisation):
        return f"organisation:{entity.tenant_id}"
    return f"project:{entity.tenant_id}/{entity.project_id}"


def chained(record: AuditRecord) -> AuditRecord:
    """The record with its hash, over everything else in it."""
    content = {name: value for name, value in asdict(record).items() if name != "hash"}
    return replace(record, hash=hashlib.sha256(canonical(content).encode()).hexdigest())


def append(execute: Execute, record: AuditRecord) -> None:
    execute(
        INSERT_AUDIT,
        (
            record.seq,
            record.unix_ms,
            record.actor,
            record.action,
            record.tenant_id,
            record.target,
            record.changed,
            record.before,
            record.after,
            record.previous_hash,
            record.hash,
        ),
    )


def newest(
    database: Database, *, tenant_id: str | None, before_seq: int | None, limit: int
) -> Page[AuditRecord]:
    """The newest records first, from below `before_seq`; of one organisation, or of all."""
    conditions: dict[str, Value] = {"tenant_id = ?": tenant_id, "seq < ?": before_seq}
    chosen = {text: value for text, value in conditions.items() if value is not None}
    where = f"WHERE {' AND '.join(chosen)}" if chosen else ""
    statement = f"{SELECT_AUDIT} {where} ORDER BY seq DESC LIMIT ?"
    with database.reading() as execute:
        rows = execute(statement, (*chosen.values(), limit + 1))
    records = [audit_record(row) for row in rows[:limit]]
    return Page(records, str(records[-1].seq) if len(rows) > limit else "")


def verify(database: Database, *, head: str = "") -> AuditVerdict:
    """Check every record from the first on, and that the last is the one that was written last.

    `head` is the hash of any record that was noted before: it must still be in the chain.
    """
    with database.reading() as execute:
        ((_, noted_seq, noted_hash),) = execute(SELECT_MARK)
    seq, previous = 0, ""
    head_was_seen = not head
    while True:
        with database.reading() as execute:
            rows = execute(f"{SELECT_AUDIT} WHERE seq > ? ORDER BY seq LIMIT ?", (seq, VERIFY_ROWS))
        for row in rows:
            record = audit_record(row)
            if problem := _problem(record, seq + 1, previous):
                return AuditVerdict(records=seq, head=previous, problem=problem)
            seq, previous = record.seq, record.hash
            head_was_seen = head_was_seen or previous == head
            if seq == noted_seq and previous != noted_hash:
                problem = f"Record {seq} is not the one that was written: the chain was made anew."
                return AuditVerdict(records=seq, head=previous, problem=problem)
        if len(rows) < VERIFY_ROWS:
            break
    problem = ""
    if seq < noted_seq:
        problem = f"Record {seq + 1} is missing, and all up to {noted_seq}: the end was cut off."
    elif not head_was_seen:
        problem = f"No record has the hash {head}: the chain that had it was replaced."
    return AuditVerdict(records=seq, head=previous, problem=problem)


def _problem(record: AuditRecord, seq: int, previous: str) -> str:
    if record.seq != seq:
        return f"Record {seq} is missing: the next one is {record.seq}."
    if chained(record).hash != record.hash:
        return f"Record {seq} was changed: its content does not have its hash."
    if record.previous_hash != previous:
        return f"Record {seq} does not follow record {seq - 1}: one of them was moved or replaced."
    return ""
