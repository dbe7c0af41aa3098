"""Admin messages to values and back; used by the service and by the command line's client."""

from collections.abc import Mapping

from headrace.serving.domain.account import (
    AccountState,
    ApiKey,
    AuditRecord,
    NewKey,
    Organisation,
    Project,
)
from headrace.serving.domain.permission import ROLES
from headrace.serving.domain.principal import Principal
from headrace.serving.domain.scope import UNLIMITED, Scope
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import InvalidRequest
from headrace.v1 import admin_pb2 as pb
from headrace.v1 import usage_pb2

_STATES: Mapping[AccountState, pb.AccountState] = {
    AccountState.ACTIVE: pb.ACCOUNT_STATE_ACTIVE,
    AccountState.SUSPENDED: pb.ACCOUNT_STATE_SUSPENDED,
}
_TIERS: Mapping[Tier, usage_pb2.Tier] = {
    Tier.RESERVED: usage_pb2.TIER_RESERVED,
    Tier.PRIORITY: usage_pb2.TIER_PRIORITY,
    Tier.STANDARD: usage_pb2.TIER_STANDARD,
    Tier.FLEX: usage_pb2.TIER_FLEX,
    Tier.BATCH: usage_pb2.TIER_BATCH,
}


def who_to_wire(principal: Principal) -> pb.WhoAmIResponse:
    grants = [
        pb.RoleGrant(
            role=grant.role.value,
            tenant_id=grant.tenant_id or "",
            permissions=sorted(
                permission
                for permission in ROLES[grant.role]
                if principal.may(permission, grant.tenant_id)
            ),
        )
        for grant in principal.grants
    ]
    return pb.WhoAmIResponse(actor=principal.actor, grants=grants)


def state_to_wire(state: AccountState) -> pb.AccountState:
    return _STATES[state]


def state_from_wire(state: pb.AccountState) -> AccountState:
    """Raises InvalidRequest: it is unset, or none that we know."""
    for ours, theirs in _STATES.items():
        if theirs == state:
            return ours
    raise InvalidRequest(
        f"state is {state}.",
        why="It says whether to suspend or to resume.",
        fix="Send ACCOUNT_STATE_SUSPENDED or ACCOUNT_STATE_ACTIVE.",
        field="state",
    )


def organisation_to_wire(each: Organisation) -> pb.Organisation:
    return pb.Organisation(
        tenant_id=each.tenant_id,
        display_name=each.display_name,
        state=_STATES[each.state],
        created_unix_ms=each.created_unix_ms,
    )


def organisation_from_wire(each: pb.Organisation) -> Organisation:
    return Organisation(
        tenant_id=each.tenant_id,
        display_name=each.display_name,
        state=state_from_wire(each.state),
        created_unix_ms=each.created_unix_ms,
    )


def project_to_wire(each: Project) -> pb.Project:
    return pb.Project(
        tenant_id=each.tenant_id,
        project_id=each.project_id,
        state=_STATES[each.state],
        created_unix_ms=each.created_unix_ms,
    )


def project_from_wire(each: pb.Project) -> Project:
    return Project(
        tenant_id=each.tenant_id,
        project_id=each.project_id,
        state=state_from_wire(each.state),
        created_unix_ms=each.created_unix_ms,
    )


def scope_to_wire(scope: Scope) -> pb.Scope:
    return pb.Scope(
        models=scope.models,
        tiers=[_TIERS[tier] for tier in scope.tiers],
        methods=scope.methods,
        addresses=scope.addresses,
        default_tier=_TIERS[scope.default_tier],
        max_tier=_TIERS[scope.max_tier],
    )


def scope_from_wire(scope: pb.Scope) -> Scope:
    """What is empty takes its default.

    Raises:
        InvalidRequest: a tier that we do not know.
    """
    return Scope(
        models=tuple(scope.models) or UNLIMITED.models,
        tiers=tuple(_tier(each) for each in scope.tiers) or UNLIMITED.tiers,
        methods=tuple(scope.methods) or UNLIMITED.methods,
        addresses=tuple(scope.addresses),
        default_tier=_tier(scope.default_tier or usage_pb2.TIER_STANDARD),
        max_tier=_tier(scope.max_tier or usage_pb2.TIER_RESERVED),
    )


def key_to_wire(key: ApiKey) -> pb.Key:
    return pb.Key(
        key_id=key.key_id,
        tenant_id=key.tenant_id,
        project_id=key.project_id,
        label=key.label,
        scope=scope_to_wire(key.scope),
        created_unix_ms=key.created_unix_ms,
        expires_unix_ms=key.expires_unix_ms,
        revoked_unix_ms=key.revoked_unix_ms,
        rotated_from=key.rotated_from,
        last_used_unix_ms=key.last_used_unix_ms,
    )


def key_from_wire(key: pb.Key) -> ApiKey:
    def given(name: str) -> int | None:
        return getattr(key, name) if key.HasField(name) else None  # pyright: ignore[reportArgumentType]

    return ApiKey(
        key_id=key.key_id,
        tenant_id=key.tenant_id,
        project_id=key.project_id,
        label=key.label,
        scope=scope_from_wire(key.scope),
        created_unix_ms=key.created_unix_ms,
        expires_unix_ms=given("expires_unix_ms"),
        revoked_unix_ms=given("revoked_unix_ms"),
        rotated_from=key.rotated_from,
        last_used_unix_ms=given("last_used_unix_ms"),
    )


def new_key_to_wire(new: NewKey) -> pb.NewKey:
    return pb.NewKey(key=new.key, stored=key_to_wire(new.stored))


def new_key_from_wire(new: pb.NewKey) -> NewKey:
    return NewKey(new.key, key_from_wire(new.stored))


def audit_to_wire(record: AuditRecord) -> pb.AuditRecord:
    return pb.AuditRecord(
        seq=record.seq,
        unix_ms=record.unix_ms,
        actor=record.actor,
        action=record.action,
        tenant_id=record.tenant_id,
        target=record.target,
        changed=record.changed,
        before=record.before,
        after=record.after,
        previous_hash=record.previous_hash,
        hash=record.hash,
    )


def audit_from_wire(record: pb.AuditRecord) -> AuditRecord:
    return AuditRecord(
        seq=record.seq,
        unix_ms=record.unix_ms,
        actor=record.actor,
        action=record.action,
        tenant_id=record.tenant_id,
        target=record.target,
        changed=record.changed,
        before=record.before,
        after=record.after,
        previous_hash=record.previous_hash,
        hash=record.hash,
    )


def _tier(tier: usage_pb2.Tier) -> Tier:
    for ours, theirs in _TIERS.items():
        if theirs == tier:
            return ours
    raise InvalidRequest(
        f"A tier of the scope is {tier}.",
        why="The tiers are those of usage.proto.",
        fix="Send one of them.",
        field="scope",
    )
