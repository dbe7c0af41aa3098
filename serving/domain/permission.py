"""Who may call which administrative method: permissions, roles, and the table of methods.

All of it is data. A method that is in no row here is one of the data plane: an API key calls it,
and an operator's token does not.
"""

from collections.abc import Mapping
from enum import StrEnum


class Permission(StrEnum):
    """Reading is named `….read`, so that what only reads can be told by name."""

    ORGANISATIONS_READ = "organisations.read"
    ORGANISATIONS_WRITE = "organisations.write"
    """Make, suspend and resume organisations: the platform's business, no organisation's own."""
    PROJECTS_READ = "projects.read"
    PROJECTS_WRITE = "projects.write"
    KEYS_READ = "keys.read"
    KEYS_WRITE = "keys.write"
    KEYS_GRANT_ADMIN = "keys.grant-admin"
    """Make, change or rotate a key that may itself administer: without it, whoever makes keys
    could make one that may do more than they may."""
    LIMITS_READ = "limits.read"
    LIMITS_WRITE = "limits.write"
    """Quotas, and reserved capacity."""
    USAGE_READ = "usage.read"
    BILLING_READ = "billing.read"
    BILLING_WRITE = "billing.write"
    """Budgets: money that an organisation allows itself."""
    BILLING_CORRECT = "billing.correct"
    """Credits and adjustments: money that the platform gives. Only who has the role for every
    organisation has it: nobody credits the one they are of."""
    AUDIT_READ = "audit.read"

    @property
    def only_reads(self) -> bool:
        return self.value.endswith(".read")


class Role(StrEnum):
    OPERATOR = "operator"
    """Runs the platform."""
    OWNER = "owner"
    ADMIN = "admin"
    BILLING = "billing"
    DEVELOPER = "developer"
    VIEWER = "viewer"


OF_THE_PLATFORM = frozenset({Permission.BILLING_CORRECT})
"""Held by a role for all organisations, or not at all."""
_OF_AN_ORGANISATION = frozenset(Permission) - OF_THE_PLATFORM - {Permission.ORGANISATIONS_WRITE}
_FOR_ANYBODY_INSIDE = frozenset(
    {
        Permission.ORGANISATIONS_READ,
        Permission.PROJECTS_READ,
        Permission.LIMITS_READ,
        Permission.USAGE_READ,
    }
)

ROLES: Mapping[Role, frozenset[Permission]] = {
    Role.OPERATOR: frozenset(Permission),
    Role.OWNER: _OF_AN_ORGANISATION,
    Role.ADMIN: _OF_AN_ORGANISATION - {Permission.BILLING_WRITE},
    Role.BILLING: _FOR_ANYBODY_INSIDE
    | {Permission.BILLING_READ, Permission.BILLING_WRITE, Permission.BILLING_CORRECT},
    Role.DEVELOPER: _FOR_ANYBODY_INSIDE | {Permission.KEYS_READ, Permission.KEYS_WRITE},
    Role.VIEWER: _FOR_ANYBODY_INSIDE | {Permission.KEYS_READ},
}

METHODS: Mapping[str, Permission | None] = {
    "Admin/WhoAmI": None,
    "Admin/CreateOrganisation": Permission.ORGANISATIONS_WRITE,
    "Admin/GetOrganisation": Permission.ORGANISATIONS_READ,
    "Admin/ListOrganisations": Permission.ORGANISATIONS_READ,
    "Admin/SetOrganisationState": Permission.ORGANISATIONS_WRITE,
    "Admin/CreateProject": Permission.PROJECTS_WRITE,
    "Admin/ListProjects": Permission.PROJECTS_READ,
    "Admin/SetProjectState": Permission.PROJECTS_WRITE,
    "Admin/CreateKey": Permission.KEYS_WRITE,
    "Admin/GetKey": Permission.KEYS_READ,
    "Admin/ListKeys": Permission.KEYS_READ,
    "Admin/UpdateKey": Permission.KEYS_WRITE,
    "Admin/RotateKey": Permission.KEYS_WRITE,
    "Admin/RevokeKey": Permission.KEYS_WRITE,
    "Admin/ListAudit": Permission.AUDIT_READ,
    "Admin/VerifyAudit": Permission.AUDIT_READ,
    "Billing/Adjust": Permission.BILLING_CORRECT,
    "Billing/Grant": Permission.BILLING_CORRECT,
}
"""What each administrative method asks of its caller; None asks only to be known. Every service
that administers something has its rows here."""

ADMIN_GROUP = "admin"

GROUPS: Mapping[str, tuple[str, ...]] = {
    "inference": ("Inference/*",),
    "batch": ("Batch/*",),
    "admin-read": tuple(
        name for name, needed in METHODS.items() if not needed or needed.only_reads
    ),
    ADMIN_GROUP: tuple(METHODS),
}
"""Names that a key's scope may give instead of methods, and the patterns they stand for."""
