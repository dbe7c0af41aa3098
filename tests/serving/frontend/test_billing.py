"""The Billing service over a real connection: who may write what is owed, and that it is once."""

import asyncio
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

from headrace.deploy import ledgers
from headrace.serving.admission.accounts import open_accounts
from headrace.serving.clock import SystemClock
from headrace.serving.domain.permission import METHODS
from headrace.serving.domain.scope import Scope
from headrace.serving.frontend.status import DETAILS_KEY
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.reconcile import reconcile
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.testing.platform import Platform
from headrace.v1 import billing_pb2 as pb

pytestmark = pytest.mark.filterwarnings(f"ignore::{SecurityWarning.__module__}.SecurityWarning")

SIGNING = jwk.OKPKey.generate_key("Ed25519", {"kid": "ed"})
NANO_MAX = 9_223_372_036_854
"""The most nano that are 64 bits of femto."""


class World:
    """A platform with two organisations, and whoever calls it."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        self.store = open_accounts(platform.config)

    def token(self, role: str, tenant: str = "acme") -> str:
        now = SystemClock().unix_ms() // 1000
        content = {"iss": "https://i", "aud": "headrace", "sub": role, "exp": now + 60}
        content |= {"roles": [role], "tenant": tenant}
        header = {"alg": "EdDSA", "kid": "ed"}
        return jwt.encode(header, content, SIGNING, algorithms=["EdDSA"])

    async def grants(self, credential: str, **fields) -> pb.CorrectionRecorded:
        request = {"tenant_id": "acme", "grant_id": "g1", "amount_nano": 12_500_000_000}
        request |= {"currency": "USD", "reason": "sorry for Monday"} | fields
        return await self.platform.billing.Grant(
            pb.GrantRequest(**request), metadata=(("authorization", f"Bearer {credential}"),)
        )

    async def adjusts(self, credential: str, **fields) -> pb.CorrectionRecorded:
        request = {"tenant_id": "acme", "adjustment_id": "a1", "amount_nano": -3_200_000_000}
        request |= {"currency": "USD", "reason": "was charged twice"} | fields
        return await self.platform.billing.Adjust(
            pb.AdjustRequest(**request), metadata=(("authorization", f"Bearer {credential}"),)
        )

    def balances(self) -> dict[str, tuple[int, int]]:
        """By project, in femto: what was added to what is owed, and what was given."""
        with ledgers.local(self.platform.config) as ledger:
            found = LedgerReader(ledger).balances(tenant_id="acme")
        return {each.project_id: (each.adjusted_femto, each.credit_femto) for each in found}

    def events(self, kind: str) -> list:
        records = LogReader(self.platform.config.meterlog_dir).after(0)
        return [getattr(each.event, kind) for each in records if each.event.HasField(kind)]


async def refusal_of(call: Awaitable[object]) -> str:
    """The machine's name of the refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    trailers = failure.value.trailing_metadata()
    assert trailers is not None
    info = ErrorInfo()
    assert Status.FromString(trailers[DETAILS_KEY]).details[0].Unpack(info)
    assert info.metadata["why"]
    assert info.metadata["fix"]
    return info.reason


def play(home: Path, story: Callable[[World], Awaitable[None]]) -> None:
    jwks = home / "jwks.json"
    jwks.write_text(json.dumps({"keys": [SIGNING.as_dict(private=False)]}))
    names = ("owner", "admin", "developer", "viewer")
    roles: list[dict[str, str]] = [{"name": name, "role": name} for name in names]
    roles.append({"name": "billing", "role": "billing", "tenant": "*"})
    roles.append({"name": "their billing", "role": "billing"})
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
        platform = Platform(home, num_replicas=0, overrides={"operators": operators})
        async with asyncio.timeout(60), platform:
            world = World(platform)
            for tenant_id in ("acme", "apex"):
                world.store.create_organisation(tenant_id=tenant_id)
            await story(world)

    asyncio.run(run())


def test_a_billing_operator_credits_and_corrects_to_the_femto(tmp_path):
    async def story(world: World) -> None:
        billing = world.token("billing")
        credit = await world.grants(billing)
        correction = await world.adjusts(billing, request_id="r1", amount_nano=-1)

        assert correction.seq > credit.seq > 0
        assert correction.log_id == credit.log_id
        assert world.balances() == {"": (0, 12_500_000 * 10**9), "default": (-(10**6), 0)}
        (granted,) = world.events("grant")
        (adjusted,) = world.events("adjust")
        assert granted.actor == adjusted.actor == "oidc:corp:billing"
        assert (granted.reason, adjusted.request_id) == ("sorry for Monday", "r1")

    play(tmp_path, story)


def test_twice_is_once_whoever_asks_and_something_else_under_the_id_is_refused(tmp_path):
    async def story(world: World) -> None:
        billing, platform = world.token("billing"), world.token("platform", "")
        first = await world.grants(billing)
        again = await asyncio.gather(*(world.grants(platform) for _ in range(5)))
        corrected = await world.adjusts(billing)

        assert all(each == first for each in again)
        assert await world.adjusts(platform) == corrected
        for other in ({"amount_nano": 1}, {"reason": "other"}, {"project_id": "default"}):
            assert await refusal_of(world.grants(billing, **other)) == "CORRECTION_EXISTS", other
        assert await refusal_of(world.adjusts(billing, request_id="r9")) == "CORRECTION_EXISTS"
        assert len(world.events("grant")) == len(world.events("adjust")) == 1
        # An id is unique within its organisation, not across them.
        other = await world.grants(platform, tenant_id="apex")
        assert other.seq != first.seq
        with ledgers.local(world.platform.config) as ledger:
            assert reconcile(ledgers.sources(world.platform.config), ledger).agree

    play(tmp_path, story)


def test_who_may_not_write_what_is_owed_is_refused_and_nothing_is_written(tmp_path):
    async def story(world: World) -> None:
        every = world.store.create_key(tenant_id="acme", scope=Scope(methods=("admin",))).key
        plain = world.store.create_key(tenant_id="acme").key
        await world.platform.sees_accounts()
        theirs = ("developer", "admin", "viewer", "owner", "their billing")
        tokens = [world.token(role) for role in theirs]

        for credential in (*tokens, every, plain):
            for call in (world.grants, world.adjusts):
                assert await refusal_of(call(credential)) == "PERMISSION_DENIED"
        assert await refusal_of(world.grants("hr_none_none")) == "UNAUTHENTICATED"
        assert world.events("grant") == world.events("adjust") == []

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"amount_nano": -1}, "INVALID_REQUEST"),
        ({"amount_nano": 0}, "INVALID_REQUEST"),
        ({"amount_nano": NANO_MAX + 1}, "AMOUNT_OUT_OF_RANGE"),
        ({"amount_nano": (1 << 63) - 1}, "AMOUNT_OUT_OF_RANGE"),
        ({"currency": "EUR"}, "INVALID_REQUEST"),
        ({"currency": ""}, "INVALID_REQUEST"),
        ({"reason": ""}, "INVALID_REQUEST"),
        ({"reason": "x" * 201}, "INVALID_REQUEST"),
        ({"reason": "a\nb"}, "INVALID_REQUEST"),
        ({"grant_id": ""}, "INVALID_REQUEST"),
        ({"grant_id": "x" * 201}, "INVALID_REQUEST"),
        ({"expires_unix_ms": 1}, "INVALID_REQUEST"),
        ({"expires_unix_ms": -1}, "INVALID_REQUEST"),
        ({"tenant_id": "nobody"}, "ACCOUNT_NOT_FOUND"),
        ({"project_id": "nowhere"}, "ACCOUNT_NOT_FOUND"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_credit_that_cannot_be_is_refused_and_not_recorded(tmp_path, fields, reason):
    async def story(world: World) -> None:
        assert await refusal_of(world.grants(world.token("platform", ""), **fields)) == reason
        assert world.events("grant") == []

    play(tmp_path, story)


def test_an_adjustment_goes_both_ways_as_far_as_the_log_can_hold(tmp_path):
    async def story(world: World) -> None:
        billing = world.token("billing")
        for amount in (NANO_MAX + 1, -NANO_MAX - 1, -(1 << 63)):
            refused = world.adjusts(billing, amount_nano=amount)
            assert await refusal_of(refused) == "AMOUNT_OUT_OF_RANGE"
        assert await refusal_of(world.adjusts(billing, amount_nano=0)) == "INVALID_REQUEST"

        await world.adjusts(billing, adjustment_id="up", amount_nano=NANO_MAX)
        await world.adjusts(billing, adjustment_id="down", amount_nano=-NANO_MAX)
        await world.adjusts(billing, adjustment_id="more", amount_nano=NANO_MAX)
        await world.adjusts(billing, adjustment_id="most", amount_nano=NANO_MAX)

        assert world.balances() == {"default": (2 * NANO_MAX * 10**6, 0)}

    play(tmp_path, story)


def test_every_method_has_its_row_and_names_its_organisation():
    methods = pb.DESCRIPTOR.services_by_name["Billing"].methods

    assert {f"Billing/{method.name}" for method in methods} <= set(METHODS)
    assert all("tenant_id" in method.input_type.fields_by_name for method in methods)
