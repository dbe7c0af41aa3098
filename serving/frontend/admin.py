"""The Admin service: organisations, projects, keys and the audit log over the wire.

By the time a method here runs, `interceptors.py` has checked that the caller may do this in the
organisation that the request names. What is left is the one rule that hangs on the content: a key
that administers is made, changed and rotated only by whoever may grant that.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import grpc.aio

from headrace.serving.admission import account_rules as rules
from headrace.serving.admission.account_store import AccountStore, Guard
from headrace.serving.clock import Clock
from headrace.serving.domain.account import ApiKey
from headrace.serving.domain.permission import Permission
from headrace.serving.domain.principal import Principal
from headrace.serving.domain.record import DEFAULT_PROJECT
from headrace.serving.errors import InvalidRequest, Overloaded, PermissionDenied
from headrace.serving.frontend import admin_wire as wire
from headrace.serving.frontend.interceptors import principal
from headrace.v1 import admin_pb2 as pb
from headrace.v1 import admin_pb2_grpc

THREADS = 2
"""The store has one writer at a time; the second thread reads beside it."""
CALLS_MAX = 64
"""That wait for a thread or have one; at a few milliseconds each, a quarter of a second."""
PAGE_DEFAULT = 100

T = TypeVar("T")


class AdminService(admin_pb2_grpc.AdminServicer):
    """See admin.proto for what each method promises. `close` it after the server has stopped."""

    def __init__(self, store: AccountStore, *, clock: Clock) -> None:
        """`store` is somebody else's to close."""
        self._store = store
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="admin")
        self._num_calls = 0

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def WhoAmI(
        self, request: pb.WhoAmIRequest, context: grpc.aio.ServicerContext
    ) -> pb.WhoAmIResponse:
        return wire.who_to_wire(principal())

    async def CreateOrganisation(
        self, request: pb.CreateOrganisationRequest, context: grpc.aio.ServicerContext
    ) -> pb.Organisation:
        made = await self._run(
            lambda store: store.create_organisation(
                tenant_id=request.tenant_id, display_name=request.display_name
            )
        )
        return wire.organisation_to_wire(made)

    async def GetOrganisation(
        self, request: pb.GetOrganisationRequest, context: grpc.aio.ServicerContext
    ) -> pb.Organisation:
        found = await self._run(lambda store: store.organisation(tenant_id=request.tenant_id))
        return wire.organisation_to_wire(found)

    async def ListOrganisations(
        self, request: pb.ListOrganisationsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListOrganisationsResponse:
        page = await self._run(
            lambda store: store.organisations(
                tenant_id=request.tenant_id or None,
                after=request.page_token,
                limit=request.page_size or PAGE_DEFAULT,
            )
        )
        return pb.ListOrganisationsResponse(
            organisations=[wire.organisation_to_wire(each) for each in page.items],
            next_page_token=page.next_token,
        )

    async def SetOrganisationState(
        self, request: pb.SetOrganisationStateRequest, context: grpc.aio.ServicerContext
    ) -> pb.Organisation:
        state = wire.state_from_wire(request.state)
        after = await self._run(
            lambda store: store.set_organisation_state(tenant_id=request.tenant_id, state=state)
        )
        return wire.organisation_to_wire(after)

    async def CreateProject(
        self, request: pb.CreateProjectRequest, context: grpc.aio.ServicerContext
    ) -> pb.Project:
        made = await self._run(
            lambda store: store.create_project(
                tenant_id=request.tenant_id, project_id=request.project_id
            )
        )
        return wire.project_to_wire(made)

    async def ListProjects(
        self, request: pb.ListProjectsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListProjectsResponse:
        page = await self._run(
            lambda store: store.projects(
                tenant_id=request.tenant_id,
                after=request.page_token,
                limit=request.page_size or PAGE_DEFAULT,
            )
        )
        return pb.ListProjectsResponse(
            projects=[wire.project_to_wire(each) for each in page.items],
            next_page_token=page.next_token,
        )

    async def SetProjectState(
        self, request: pb.SetProjectStateRequest, context: grpc.aio.ServicerContext
    ) -> pb.Project:
        state = wire.state_from_wire(request.state)
        after = await self._run(
            lambda store: store.set_project_state(
                tenant_id=request.tenant_id, project_id=request.project_id, state=state
            )
        )
        return wire.project_to_wire(after)

    async def CreateKey(
        self, request: pb.CreateKeyRequest, context: grpc.aio.ServicerContext
    ) -> pb.NewKey:
        scope = wire.scope_from_wire(request.scope)
        guard = _granting(principal())
        expires = self._clock.unix_ms() + rules.EXPIRY_MS_DEFAULT
        if request.HasField("expires_unix_ms"):
            expires = request.expires_unix_ms or None
        new = await self._run(
            lambda store: store.create_key(
                tenant_id=request.tenant_id,
                project_id=request.project_id or DEFAULT_PROJECT,
                label=request.label,
                scope=scope,
                expires_unix_ms=expires,
                key_id=request.key_id,
                guard=guard,
            )
        )
        return wire.new_key_to_wire(new)

    async def GetKey(self, request: pb.GetKeyRequest, context: grpc.aio.ServicerContext) -> pb.Key:
        found = await self._run(
            lambda store: store.key(key_id=request.key_id, tenant_id=request.tenant_id or None)
        )
        return wire.key_to_wire(found)

    async def ListKeys(
        self, request: pb.ListKeysRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListKeysResponse:
        page = await self._run(
            lambda store: store.keys(
                tenant_id=request.tenant_id or None,
                project_id=request.project_id or None,
                after=request.page_token,
                limit=request.page_size or PAGE_DEFAULT,
            )
        )
        return pb.ListKeysResponse(
            keys=[wire.key_to_wire(each) for each in page.items], next_page_token=page.next_token
        )

    async def UpdateKey(
        self, request: pb.UpdateKeyRequest, context: grpc.aio.ServicerContext
    ) -> pb.Key:
        scope = wire.scope_from_wire(request.scope) if request.HasField("scope") else None
        never_expires = request.HasField("expires_unix_ms") and not request.expires_unix_ms
        guard = _granting(principal())
        after = await self._run(
            lambda store: store.update_key(
                key_id=request.key_id,
                tenant_id=request.tenant_id or None,
                label=request.label if request.HasField("label") else None,
                scope=scope,
                expires_unix_ms=request.expires_unix_ms or None,
                never_expires=never_expires,
                guard=guard,
            )
        )
        return wire.key_to_wire(after)

    async def RotateKey(
        self, request: pb.RotateKeyRequest, context: grpc.aio.ServicerContext
    ) -> pb.NewKey:
        guard = _granting(principal())
        new = await self._run(
            lambda store: store.rotate_key(
                key_id=request.key_id,
                tenant_id=request.tenant_id or None,
                overlap_ms=request.overlap_ms,
                new_key_id=request.new_key_id,
                guard=guard,
            )
        )
        return wire.new_key_to_wire(new)

    async def RevokeKey(
        self, request: pb.RevokeKeyRequest, context: grpc.aio.ServicerContext
    ) -> pb.Key:
        after = await self._run(
            lambda store: store.revoke_key(
                key_id=request.key_id, tenant_id=request.tenant_id or None
            )
        )
        return wire.key_to_wire(after)

    async def ListAudit(
        self, request: pb.ListAuditRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAuditResponse:
        before_seq = _sequence_number(request.page_token)
        page = await self._run(
            lambda store: store.audit(
                tenant_id=request.tenant_id or None,
                before_seq=before_seq,
                limit=request.page_size or PAGE_DEFAULT,
            )
        )
        return pb.ListAuditResponse(
            records=[wire.audit_to_wire(each) for each in page.items],
            next_page_token=page.next_token,
        )

    async def VerifyAudit(
        self, request: pb.VerifyAuditRequest, context: grpc.aio.ServicerContext
    ) -> pb.VerifyAuditResponse:
        found = await self._run(lambda store: store.verify_audit(head=request.head))
        return pb.VerifyAuditResponse(records=found.records, head=found.head, problem=found.problem)

    async def _run(self, work: Callable[[AccountStore], T]) -> T:
        """In a thread, as whoever makes the call: the store blocks."""
        if self._num_calls >= CALLS_MAX:
            raise Overloaded(
                f"{self._num_calls} administrative calls are waiting.",
                why="That is this frontend's bound.",
                fix="Retry after the time given, with jitter.",
                retry_after_ms=1_000,
            )
        store = self._store.acting_as(principal().actor)
        self._num_calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, store)
        finally:
            self._num_calls -= 1


def _granting(by: Principal) -> Guard:
    """Refuses a key that administers, unless the caller may grant that. For another thread."""

    def guard(key: ApiKey) -> None:
        if key.scope.administers and not by.may(Permission.KEYS_GRANT_ADMIN, key.tenant_id):
            raise PermissionDenied(
                "The key has administrative methods, and the caller may not grant those.",
                why="Whoever holds such a key may do what its methods allow; that needs the "
                f"permission {Permission.KEYS_GRANT_ADMIN}.",
                fix="Ask an owner or an administrator of the organisation.",
            )

    return guard


def _sequence_number(token: str) -> int | None:
    if not token:
        return None
    if not (token.isascii() and token.isdecimal() and len(token) <= 18):
        raise InvalidRequest(
            "page_token is none of ours.",
            why="It is the next_page_token of the page before.",
            fix="Send that, or leave it empty for the first page.",
            field="page_token",
        )
    return int(token)
