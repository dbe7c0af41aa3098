"""A blocking client of the Admin service, for the command line; see `deploy.accounts.Accounts`."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from headrace.deploy.client import open_channel, refusals
from headrace.serving.domain.account import (
    AccountState,
    ApiKey,
    AuditRecord,
    AuditVerdict,
    NewKey,
    Organisation,
    Page,
    Project,
)
from headrace.serving.domain.scope import Scope
from headrace.serving.frontend import admin_wire as wire
from headrace.v1 import admin_pb2 as pb
from headrace.v1 import admin_pb2_grpc

CALL_S_MAX = 30.0
"""A change takes milliseconds, and a check of a million audit records some seconds."""
PAGE = 1_000

Answer = TypeVar("Answer")


class RemoteAccounts:
    """One channel to one frontend, with one token or key. Each method may raise RemoteRefusal."""

    def __init__(self, address: str, token: str, root_certificates: Path | None) -> None:
        self._address = address
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._channel = open_channel(address, root_certificates)
        self._stub = admin_pb2_grpc.AdminStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def who_am_i(self) -> pb.WhoAmIResponse:
        return self._call(self._stub.WhoAmI, pb.WhoAmIRequest())

    def create_organisation(self, *, tenant_id: str, display_name: str = "") -> Organisation:
        request = pb.CreateOrganisationRequest(tenant_id=tenant_id, display_name=display_name)
        return wire.organisation_from_wire(self._call(self._stub.CreateOrganisation, request))

    def set_organisation_state(self, *, tenant_id: str, state: AccountState) -> Organisation:
        request = pb.SetOrganisationStateRequest(
            tenant_id=tenant_id, state=wire.state_to_wire(state)
        )
        return wire.organisation_from_wire(self._call(self._stub.SetOrganisationState, request))

    def organisations(self, *, after: str = "") -> Page[Organisation]:
        request = pb.ListOrganisationsRequest(page_size=PAGE, page_token=after)
        page = self._call(self._stub.ListOrganisations, request)
        found = [wire.organisation_from_wire(each) for each in page.organisations]
        return Page(found, page.next_page_token)

    def create_project(self, *, tenant_id: str, project_id: str) -> Project:
        request = pb.CreateProjectRequest(tenant_id=tenant_id, project_id=project_id)
        return wire.project_from_wire(self._call(self._stub.CreateProject, request))

    def set_project_state(self, *, tenant_id: str, project_id: str, state: AccountState) -> Project:
        request = pb.SetProjectStateRequest(
            tenant_id=tenant_id, project_id=project_id, state=wire.state_to_wire(state)
        )
        return wire.project_from_wire(self._call(self._stub.SetProjectState, request))

    def projects(self, *, tenant_id: str, after: str = "") -> Page[Project]:
        request = pb.ListProjectsRequest(tenant_id=tenant_id, page_size=PAGE, page_token=after)
        page = self._call(self._stub.ListProjects, request)
        return Page([wire.project_from_wire(each) for each in page.projects], page.next_page_token)

    def create_key(
        self,
        *,
        tenant_id: str,
        project_id: str,
        label: str,
        scope: Scope,
        expires_unix_ms: int | None,
        key_id: str,
    ) -> NewKey:
        request = pb.CreateKeyRequest(
            tenant_id=tenant_id,
            project_id=project_id,
            key_id=key_id,
            label=label,
            scope=wire.scope_to_wire(scope),
            expires_unix_ms=expires_unix_ms or 0,
        )
        return wire.new_key_from_wire(self._call(self._stub.CreateKey, request))

    def update_key(
        self,
        *,
        key_id: str,
        tenant_id: str | None,
        label: str | None,
        scope: Scope | None,
        expires_unix_ms: int | None,
        never_expires: bool,
    ) -> ApiKey:
        request = pb.UpdateKeyRequest(
            tenant_id=tenant_id or "",
            key_id=key_id,
            label=label,
            scope=None if scope is None else wire.scope_to_wire(scope),
            expires_unix_ms=0 if never_expires else expires_unix_ms,
        )
        return wire.key_from_wire(self._call(self._stub.UpdateKey, request))

    def rotate_key(
        self, *, key_id: str, tenant_id: str | None, overlap_ms: int, new_key_id: str
    ) -> NewKey:
        request = pb.RotateKeyRequest(
            tenant_id=tenant_id or "", key_id=key_id, overlap_ms=overlap_ms, new_key_id=new_key_id
        )
        return wire.new_key_from_wire(self._call(self._stub.RotateKey, request))

    def revoke_key(self, *, key_id: str, tenant_id: str | None) -> ApiKey:
        request = pb.RevokeKeyRequest(tenant_id=tenant_id or "", key_id=key_id)
        return wire.key_from_wire(self._call(self._stub.RevokeKey, request))

    def key(self, *, key_id: str, tenant_id: str | None) -> ApiKey:
        request = pb.GetKeyRequest(tenant_id=tenant_id or "", key_id=key_id)
        return wire.key_from_wire(self._call(self._stub.GetKey, request))

    def keys(
        self, *, tenant_id: str | None, project_id: str | None, after: str = ""
    ) -> Page[ApiKey]:
        request = pb.ListKeysRequest(
            tenant_id=tenant_id or "",
            project_id=project_id or "",
            page_size=PAGE,
            page_token=after,
        )
        page = self._call(self._stub.ListKeys, request)
        return Page([wire.key_from_wire(each) for each in page.keys], page.next_page_token)

    def audit(
        self, *, tenant_id: str | None, before_seq: int | None = None, limit: int
    ) -> Page[AuditRecord]:
        request = pb.ListAuditRequest(
            tenant_id=tenant_id or "",
            page_size=limit,
            page_token="" if before_seq is None else str(before_seq),
        )
        page = self._call(self._stub.ListAudit, request)
        return Page([wire.audit_from_wire(each) for each in page.records], page.next_page_token)

    def verify_audit(self, *, head: str) -> AuditVerdict:
        found = self._call(self._stub.VerifyAudit, pb.VerifyAuditRequest(head=head))
        return AuditVerdict(records=found.records, head=found.head, problem=found.problem)

    def _call(self, method: Callable[..., Answer], request: object) -> Answer:
        with refusals(self._address):
            return method(request, metadata=self._metadata, timeout=CALL_S_MAX)
