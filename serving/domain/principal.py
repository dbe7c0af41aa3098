"""Who calls an administrative method, and what they may do where."""

from dataclasses import dataclass

from headrace.serving.domain.permission import ADMIN_GROUP, OF_THE_PLATFORM, ROLES, Permission, Role
from headrace.serving.domain.record import Caller


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A role, in one organisation or in all."""

    role: Role
    tenant_id: str | None
    """None: every organisation, and what belongs to none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """An operator with a token, or an API key whose scope has administrative methods."""

    actor: str
    """As the audit log names them."""
    grants: tuple[Grant, ...]
    caller: Caller | None = None
    """The key; None for an operator."""

    @classmethod
    def of_key(cls, caller: Caller) -> "Principal":
        """A key administers its own organisation, as far as its methods reach."""
        grant = Grant(role=Role.ADMIN, tenant_id=caller.tenant_id)
        return cls(actor=f"key:{caller.key_id}", grants=(grant,), caller=caller)

    def may(self, permission: Permission, tenant_id: str | None) -> bool:
        """Whether a grant holds in `tenant_id`; None asks about the platform as a whole."""
        if permission is Permission.KEYS_GRANT_ADMIN and not self._has_all_methods:
            return False
        if permission in OF_THE_PLATFORM:
            tenant_id = None
        return any(
            permission in ROLES[grant.role] and grant.tenant_id in (None, tenant_id)
            for grant in self.grants
        )

    @property
    def _has_all_methods(self) -> bool:
        """Else a key with a few of the methods could make one with all of them."""
        return self.caller is None or ADMIN_GROUP in self.caller.scope.methods

    @property
    def only_tenant_id(self) -> str | None:
        """The organisation that is meant when a request names none; None if that is not clear."""
        tenants = {grant.tenant_id for grant in self.grants}
        return next(iter(tenants)) if len(tenants) == 1 else None
