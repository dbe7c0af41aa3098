"""The Admin service over a real connection: who may do what, where, and what others see of it."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from joserfc import jwk, jwt
from joserfc.errors import SecurityWarning

from headrace.serving.admission.accounts import open_accounts
from headrace.serving.clock import SystemClock
from headrace.serving.domain.permission import METHODS
from headrace.serving.domain.scope import Scope
from headrace.serving.domain.tier import Tier
from headrace.serving.frontend.status import DETAILS_KEY
from headrace.serving.testing.platform import MODEL, Platform
from headrace.v1 import admin_pb2 as pb
from headrace.v1 import inference_pb2, usage_pb2

pytestmark = pytest.mark.filterwarnings(f"ignore::{SecurityWarning.__module__}.SecurityWarning")

SIGNING = jwk.OKPKey.generate_key("Ed25519", {"kid": "ed"})
DAY_MS = 86_400_000


class Bearer:
    """Somebody with a key or a token, and the calls they make."""

    def __init__(self, platform: Platform, credential: str) -> None:
        self._platform = platform
        self.metadata = (("authorization", f"Bearer {credential}"),)

    async def asks(self, method: str, request, *extra: tuple[str, str]):
        return await getattr(self._platform.admin, method)(
            request, metadata=(*self.metadata, *extra)
        )

    async def is_refused(self, method: str, request) -> str:
        """The machine's name of the refusal."""
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await self.asks(method, request)
        return reason_of(failure.value)

    async def generates(self, **fields) -> str:
        """The answer's end, or the machine's name of the refusal."""
        request = inference_pb2.GenerateRequest(
            **({"model": MODEL, "prompt": "hi", "max_tokens": 2} | fields)
        )
        try:
            answer = await self._platform.stub.GenerateUnary(request, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            return reason_of(error)
        return inference_pb2.FinishReason.Name(answer.choices[0].finish_reason)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    trailers = error.trailing_metadata()
    assert trailers is not None
    info = ErrorInfo()
    assert Status.FromString(trailers[DETAILS_KEY]).details[0].Unpack(info)
    assert info.metadata["why"]
    assert info.metadata["fix"]
    return info.reason


class World:
    """A platform with two organisations, and operators of every kind."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.store = open_accounts(platform.config, actor="local:ada")

    def key(self, tenant_id: str = "acme", **fields) -> tuple[str, Bearer]:
        """Its id and its holder."""
        new = self.store.create_key(tenant_id=tenant_id, **fields)
        return new.stored.key_id, Bearer(self.platform, new.key)

    def operator(self, role: str = "platform", tenant: str = "", **claims) -> Bearer:
        now = SystemClock().unix_ms() // 1000
        content = {"iss": "https://i", "aud": "headrace", "sub": role, "exp": now + 60}
        content |= {"roles": [role], "tenant": tenant} | claims
        header = {"alg": "EdDSA", "kid": "ed"}
        return Bearer(self.platform, jwt.encode(header, content, SIGNING, algorithms=["EdDSA"]))


def play(home: Path, story: Callable[[World], Awaitable[None]], **overrides: object) -> None:
    jwks = home / "jwks.json"
    jwks.write_text(json.dumps({"keys": [SIGNING.as_dict(private=False)]}))
    roles = [{"name": name, "role": name} for name in ("owner", "admin", "developer", "viewer")]
    operators = [
        {
            "name": "corp",
            "issuer": "https://i",
            "audience": "headrace",
            "jwks": str(jwks),
            "roles": [*roles, {"name": "platform", "role": "operator", "tenant": "*"}],
        }
    ]

    async def run() -> None:
        platform = Platform(home, overrides={"operators": operators, **overrides})
        async with asyncio.timeout(60), platform:
            world = World(platform)
            for tenant_id in ("acme", "apex"):
                world.store.create_organisation(tenant_id=tenant_id)
            await story(world)

    asyncio.run(run())


def test_an_operator_makes_an_organisation_a_project_and_a_key_that_answers(tmp_path):
    async def story(world: World) -> None:
        operator = world.operator()
        made = await operator.asks(
            "CreateOrganisation", pb.CreateOrganisationRequest(tenant_id="new", display_name="New")
        )
        await operator.asks(
            "CreateProject", pb.CreateProjectRequest(tenant_id="new", project_id="search")
        )
        request = pb.CreateKeyRequest(tenant_id="new", project_id="search", label="the crawler's")
        key = await operator.asks("CreateKey", request)
        holder = Bearer(world.platform, key.key)
        await world.platform.sees_accounts()

        assert made.state == pb.ACCOUNT_STATE_ACTIVE
        assert await holder.generates() == "FINISH_REASON_LENGTH"
        ends_in = key.stored.expires_unix_ms - key.stored.created_unix_ms
        assert abs(ends_in - 90 * DAY_MS) < 60_000
        assert world.store.audit(tenant_id="new").items[0].actor == "oidc:corp:platform"
        (record, *_) = world.platform.records
        assert (record.tenant_id, record.key_id) == ("new", key.stored.key_id)

    play(tmp_path, story)


def test_a_creation_that_is_tried_again_answers_what_is_there(tmp_path):
    async def story(world: World) -> None:
        operator = world.operator()
        organisation = pb.CreateOrganisationRequest(tenant_id="new")
        project = pb.CreateProjectRequest(tenant_id="new", project_id="p")
        key = pb.CreateKeyRequest(tenant_id="new", key_id="mine")

        for method, request in (
            ("CreateOrganisation", organisation),
            ("CreateProject", project),
        ):
            assert await operator.asks(method, request) == await operator.asks(method, request)
        await operator.asks("CreateKey", key)

        assert await operator.is_refused("CreateKey", key) == "ACCOUNT_EXISTS"

    play(tmp_path, story)


def test_lists_come_in_pages_that_join_to_the_whole(tmp_path):
    async def story(world: World) -> None:
        made = {world.key()[0] for _ in range(5)}
        operator = world.operator()

        seen, token = [], ""
        while True:
            request = pb.ListKeysRequest(tenant_id="acme", page_size=2, page_token=token)
            page = await operator.asks("ListKeys", request)
            seen += [key.key_id for key in page.keys]
            if not (token := page.next_page_token):
                break

        assert seen == sorted(made)
        assert not any("hr_" in str(key) for key in page.keys)
        for size in (-1, 1001):
            request = pb.ListKeysRequest(tenant_id="acme", page_size=size)
            assert await operator.is_refused("ListKeys", request) == "INVALID_REQUEST"
        request = pb.ListAuditRequest(page_token="first")
        assert await operator.is_refused("ListAudit", request) == "INVALID_REQUEST"

    play(tmp_path, story)


REQUESTS = {
    "WhoAmI": pb.WhoAmIRequest(),
    "CreateOrganisation": pb.CreateOrganisationRequest(tenant_id="apex"),
    "GetOrganisation": pb.GetOrganisationRequest(tenant_id="apex"),
    "ListOrganisations": pb.ListOrganisationsRequest(tenant_id="apex"),
    "SetOrganisationState": pb.SetOrganisationStateRequest(tenant_id="apex", state=1),
    "CreateProject": pb.CreateProjectRequest(tenant_id="apex", project_id="p"),
    "ListProjects": pb.ListProjectsRequest(tenant_id="apex"),
    "SetProjectState": pb.SetProjectStateRequest(tenant_id="apex", project_id="default", state=1),
    "CreateKey": pb.CreateKeyRequest(tenant_id="apex"),
    "GetKey": pb.GetKeyRequest(tenant_id="apex", key_id="theirs"),
    "ListKeys": pb.ListKeysRequest(tenant_id="apex"),
    "UpdateKey": pb.UpdateKeyRequest(tenant_id="apex", key_id="theirs", label="mine"),
    "RotateKey": pb.RotateKeyRequest(tenant_id="apex", key_id="theirs"),
    "RevokeKey": pb.RevokeKeyRequest(tenant_id="apex", key_id="theirs"),
    "ListAudit": pb.ListAuditRequest(tenant_id="apex"),
    "VerifyAudit": pb.VerifyAuditRequest(),
}


def test_every_method_has_its_row_and_every_request_names_its_organisation():
    """The interceptor reads `tenant_id`: a request without one is about the platform as a whole."""
    methods = pb.DESCRIPTOR.services_by_name["Admin"].methods
    without = {m.name for m in methods if "tenant_id" not in m.input_type.fields_by_name}

    assert {f"Admin/{m.name}" for m in methods} <= set(METHODS)
    assert {m.name for m in methods} == set(REQUESTS)
    assert without == {"WhoAmI", "VerifyAudit"}


def test_nobody_reaches_into_another_organisation(tmp_path):
    """An owner, and a key with every method there is, of acme, against everything of apex."""

    async def story(world: World) -> None:
        world.store.create_key(tenant_id="apex", key_id="theirs")
        before = world.store.audit().items
        _, keyholder = world.key(scope=Scope(methods=("admin", "inference")))
        await world.platform.sees_accounts()
        of_acme = world.store.audit(tenant_id="acme").items

        for bearer in (world.operator("owner", "acme"), keyholder):
            for method, request in REQUESTS.items():
                if method != "WhoAmI":
                    assert await bearer.is_refused(method, request) == "PERMISSION_DENIED", method
        own = pb.RevokeKeyRequest(tenant_id="acme", key_id="theirs")
        assert await keyholder.is_refused("RevokeKey", own) == "KEY_NOT_FOUND"
        unnamed = pb.GetKeyRequest(key_id="theirs")
        assert await keyholder.is_refused("GetKey", unnamed) == "KEY_NOT_FOUND"

        assert world.store.audit(tenant_id="acme").items == of_acme
        assert world.store.audit(tenant_id="apex").items == [
            record for record in before if record.tenant_id == "apex"
        ]

    play(tmp_path, story)


def test_a_role_allows_what_it_says_and_no_more(tmp_path):
    async def story(world: World) -> None:
        viewer, developer = world.operator("viewer", "acme"), world.operator("developer", "acme")
        nobody = world.operator("janitor", "acme")

        # No organisation is named: theirs is meant.
        listed = await viewer.asks("ListOrganisations", pb.ListOrganisationsRequest())
        assert [each.tenant_id for each in listed.organisations] == ["acme"]
        assert await viewer.is_refused("CreateKey", pb.CreateKeyRequest()) == "PERMISSION_DENIED"
        assert await developer.asks("CreateKey", pb.CreateKeyRequest())
        suspend = pb.SetOrganisationStateRequest(state=pb.ACCOUNT_STATE_SUSPENDED)
        for bearer in (viewer, developer, world.operator("owner", "acme")):
            assert await bearer.is_refused("SetOrganisationState", suspend) == "PERMISSION_DENIED"

        assert (await nobody.asks("WhoAmI", pb.WhoAmIRequest())).actor == "oidc:corp:janitor"
        assert await nobody.is_refused("ListKeys", pb.ListKeysRequest()) == "PERMISSION_DENIED"

    play(tmp_path, story)


def test_whoever_makes_keys_cannot_make_one_that_may_do_more_than_they_may(tmp_path):
    async def story(world: World) -> None:
        developer = world.operator("developer", "acme")
        admin_key, _ = world.key(scope=Scope(methods=("admin",)))
        plain_key, _ = world.key()
        admin = pb.Scope(methods=["admin"])

        for method, request in (
            ("CreateKey", pb.CreateKeyRequest(scope=admin)),
            ("CreateKey", pb.CreateKeyRequest(scope=pb.Scope(methods=["*"]))),
            ("UpdateKey", pb.UpdateKeyRequest(key_id=plain_key, scope=admin)),
            ("UpdateKey", pb.UpdateKeyRequest(key_id=admin_key, label="x")),
            ("RotateKey", pb.RotateKeyRequest(key_id=admin_key)),
        ):
            assert await developer.is_refused(method, request) == "PERMISSION_DENIED", request

        owner = world.operator("owner", "acme")
        assert await owner.asks("CreateKey", pb.CreateKeyRequest(scope=admin))
        assert await developer.asks("RevokeKey", pb.RevokeKeyRequest(key_id=admin_key))

    play(tmp_path, story)


def test_a_key_is_held_to_its_models_methods_and_networks(tmp_path):
    async def story(world: World) -> None:
        _, good = world.key(scope=Scope(models=("ti*",), addresses=("127.0.0.0/8",)))
        _, model = world.key(scope=Scope(models=("qwen-*",)))
        _, method = world.key(scope=Scope(methods=("Inference/CountTokens",)))
        _, network = world.key(scope=Scope(addresses=("10.0.0.0/8",)))
        await world.platform.sees_accounts()

        assert await good.generates() == "FINISH_REASON_LENGTH"
        for refused in (model, method, network):
            assert await refused.generates() == "PERMISSION_DENIED"
        request = inference_pb2.ListModelsRequest()
        seen = await world.platform.stub.ListModels(request, metadata=model.metadata)
        assert list(seen.models) == []
        for bearer in (good, model):
            assert await bearer.is_refused("WhoAmI", pb.WhoAmIRequest()) == "PERMISSION_DENIED"

    play(tmp_path, story)


def test_a_proxy_is_believed_only_when_it_is_listed(tmp_path):
    """Anybody can write the header; here only the loopback may."""
    ours, theirs = ("x-forwarded-for", "10.1.2.3"), ("x-forwarded-for", "10.1.2.3, 8.8.8.8")
    scope = Scope(addresses=("10.0.0.0/8",), methods=("admin", "inference"))

    async def believes(world: World) -> None:
        _, holder = world.key(scope=scope)
        await world.platform.sees_accounts()

        assert await holder.asks("WhoAmI", pb.WhoAmIRequest(), ours)
        for headers in ((), (theirs,), (("x-forwarded-for", "nonsense"),)):
            with pytest.raises(grpc.aio.AioRpcError) as failure:
                await holder.asks("WhoAmI", pb.WhoAmIRequest(), *headers)
            assert reason_of(failure.value) == "PERMISSION_DENIED"

    async def does_not(world: World) -> None:
        _, holder = world.key(scope=scope)
        await world.platform.sees_accounts()

        with pytest.raises(grpc.aio.AioRpcError):
            await holder.asks("WhoAmI", pb.WhoAmIRequest(), ours)

    play(tmp_path, believes, **{"frontend.trusted_proxies": ["127.0.0.0/8"]})
    (tmp_path / "other").mkdir()
    play(tmp_path / "other", does_not)


def test_what_an_operator_changes_holds_from_the_frontends_next_poll_on(tmp_path):
    async def story(world: World) -> None:
        key_id, holder = world.key()
        await world.platform.sees_accounts()
        operator = world.operator()

        for state, then in (
            (pb.ACCOUNT_STATE_SUSPENDED, "ACCOUNT_SUSPENDED"),
            (pb.ACCOUNT_STATE_ACTIVE, "FINISH_REASON_LENGTH"),
        ):
            request = pb.SetOrganisationStateRequest(tenant_id="acme", state=state)
            await operator.asks("SetOrganisationState", request)
            await world.platform.sees_accounts()
            assert await holder.generates() == then
        await operator.asks("RevokeKey", pb.RevokeKeyRequest(tenant_id="acme", key_id=key_id))
        await world.platform.sees_accounts()
        assert await holder.generates() == "UNAUTHENTICATED"

    play(tmp_path, story)


def test_a_scope_travels_both_ways_unchanged(tmp_path):
    async def story(world: World) -> None:
        scope = pb.Scope(
            models=["qwen-*", "tiny"],
            tiers=[usage_pb2.TIER_FLEX, usage_pb2.TIER_BATCH],
            methods=["inference"],
            addresses=["10.0.0.0/8", "2001:db8::/32"],
            default_tier=usage_pb2.TIER_FLEX,
            max_tier=usage_pb2.TIER_STANDARD,
        )
        operator = world.operator()
        request = pb.CreateKeyRequest(tenant_id="acme", scope=scope, expires_unix_ms=0)
        made = await operator.asks("CreateKey", request)
        kept = world.store.key(key_id=made.stored.key_id)

        assert made.stored.scope == scope
        assert not made.stored.HasField("expires_unix_ms")
        assert kept.scope.default_tier is Tier.FLEX
        again = await operator.asks("GetKey", pb.GetKeyRequest(key_id=kept.key_id))
        assert again == made.stored
        unknown = pb.CreateKeyRequest(tenant_id="acme", scope=pb.Scope(default_tier=99))  # pyright: ignore
        assert await operator.is_refused("CreateKey", unknown) == "INVALID_REQUEST"

    play(tmp_path, story)


def test_a_rotation_over_the_wire_keeps_both_keys_for_the_overlap(tmp_path):
    async def story(world: World) -> None:
        key_id, old = world.key()
        operator = world.operator()
        request = pb.RotateKeyRequest(tenant_id="acme", key_id=key_id, overlap_ms=DAY_MS)
        new = Bearer(world.platform, (await operator.asks("RotateKey", request)).key)
        await world.platform.sees_accounts()

        assert await old.generates() == await new.generates() == "FINISH_REASON_LENGTH"
        kept = world.store.key(key_id=key_id)
        assert abs((kept.expires_unix_ms or 0) - SystemClock().unix_ms() - DAY_MS) < 60_000

    play(tmp_path, story)


def test_the_audit_log_is_read_and_verified_over_the_wire(tmp_path):
    async def story(world: World) -> None:
        operator = world.operator()
        await operator.asks(
            "CreateProject", pb.CreateProjectRequest(tenant_id="acme", project_id="p")
        )

        log = await operator.asks("ListAudit", pb.ListAuditRequest(page_size=1))
        verdict = await operator.asks("VerifyAudit", pb.VerifyAuditRequest())

        assert [(r.actor, r.target) for r in log.records] == [
            ("oidc:corp:platform", "project:acme/p")
        ]
        assert (verdict.head, verdict.problem) == (log.records[0].hash, "")
        assert verdict.records == log.records[0].seq

    play(tmp_path, story)


@pytest.mark.parametrize("credential", ["", "hr_demo0001_" + "a" * 32, "a.b.c"])
def test_a_stranger_learns_nothing(tmp_path, credential):
    async def story(world: World) -> None:
        stranger = Bearer(world.platform, credential)

        for method, request in REQUESTS.items():
            assert await stranger.is_refused(method, request) == "UNAUTHENTICATED"

    play(tmp_path, story)


def test_an_operators_token_opens_no_method_of_the_data_plane(tmp_path):
    async def story(world: World) -> None:
        assert await world.operator().generates() == "UNAUTHENTICATED"

    play(tmp_path, story)


def test_without_the_store_changes_are_unavailable_and_answers_go_on(tmp_path):
    async def story(world: World) -> None:
        _, holder = world.key()
        await world.platform.sees_accounts()
        path = world.platform.config.accounts_path
        path.rename(path.with_name("away.db"))

        request = pb.CreateProjectRequest(tenant_id="acme", project_id="p")
        assert await world.operator().is_refused("CreateProject", request) == "ACCOUNTS_UNAVAILABLE"
        assert await holder.generates() == "FINISH_REASON_LENGTH"
        with contextlib.suppress(FileNotFoundError):
            path.with_name("away.db").rename(path)

        assert await world.operator().asks("CreateProject", request)

    play(tmp_path, story)
