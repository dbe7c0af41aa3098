"""Two frontends and one authority, over real connections."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from headrace.serving.admission import quota_thread
from headrace.serving.admission.lease_keeper import LeaseKeeper
from headrace.serving.admission.quota import Quota
from headrace.serving.admission.quota_thread import AuthorityThread
from headrace.serving.channel.credentials import token_metadata
from headrace.serving.channel.directory import DirectoryServer
from headrace.serving.channel.quota_service import QuotaService, RemoteAuthority
from headrace.serving.clock import SystemClock
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import Sampling
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import (
    BudgetExhausted,
    ConcurrencyExceeded,
    ConfigRefused,
    QuotaUnavailable,
)
from headrace.v1 import quota_pb2, quota_pb2_grpc

TOKEN = "a token of at least sixteen bytes"
PRICE = Price.text(
    version="p1",
    prompt_nano_per_mtok=10**9,
    cached_nano_per_mtok=10**8,
    completion_nano_per_mtok=2 * 10**9,
)
REQUEST = Generate(
    caller=Caller("acme", "k1"),
    request_id="r1",
    model="m",
    version="v1",
    prompt_ids=(1, 2, 3),
    sampling=Sampling(max_tokens=4),
    price=PRICE,
    accepted_unix_ms=0,
    accepted_ms=0,
)
"""May cost 11,000 nano; with one token 5,000."""

BUDGET = Limit(subject="organisation:acme", metric=Metric.BUDGET_TOTAL, limit=1_000_000, hard=True)
PLACES = Limit(subject="organisation:acme", metric=Metric.CONCURRENCY, limit=3)


class Cluster:
    """An authority and frontends that lease everything from it."""

    def __init__(self, home: Path, *limits: Limit) -> None:
        self.home = home
        self.limits = limits
        self.frontends: list[tuple[Quota, LeaseKeeper, RemoteAuthority]] = []
        self.address = "127.0.0.1:0"

    async def authority_starts(self) -> None:
        self.authority = AuthorityThread(self.home / "quota.db", clock=SystemClock())
        await self.authority.open(self.limits)
        self.server = DirectoryServer(
            cluster_token=TOKEN,
            address=self.address,
            quota=QuotaService(self.authority, cluster_token=TOKEN),
        )
        self.address = await self.server.start()

    async def authority_stops(self) -> None:
        await self.server.stop()
        await self.authority.close()

    async def frontend(self, name: str) -> Quota:
        remote = RemoteAuthority(self.address, cluster_token=TOKEN)
        leases = LeaseKeeper(remote, holder=name, epoch="1", clock=SystemClock())
        leases.start()
        quota = Quota(clock=SystemClock(), leases=leases, leases_all=True)
        quota.use(await remote.limits())
        self.frontends.append((quota, leases, remote))
        return quota

    async def frontends_stop(self) -> None:
        for _, leases, remote in self.frontends:
            await leases.close()
            await remote.close()


def play(home: Path, story: Callable[[Cluster], Awaitable[None]], *limits: Limit) -> None:
    async def run() -> None:
        cluster = Cluster(home, *limits)
        async with asyncio.timeout(60):
            await cluster.authority_starts()
            await story(cluster)
            await cluster.authority_stops()

    asyncio.run(run())


def test_two_frontends_spend_one_budget_to_the_end_and_no_further(tmp_path: Path):
    async def spends(quota: Quota) -> int:
        charged = 0
        while True:
            try:
                hold = await quota.admit(REQUEST)
            except BudgetExhausted:
                return charged
            usage = Usage(prompt_tokens=3, completion_tokens=4)
            if not (hold.covers(usage) or await hold.extend(usage)):
                usage = Usage(prompt_tokens=3, completion_tokens=1)
                assert hold.covers(usage)
            charge = PRICE.charge_femto(usage)
            hold.settle(usage=usage, outcome=Outcome.OK, charge_femto=charge)
            charged += charge
            await asyncio.sleep(0)

    async def story(cluster: Cluster) -> None:
        frontends = [await cluster.frontend(name) for name in ("f", "g")]
        charged = await asyncio.gather(*(spends(quota) for quota in frontends))
        await cluster.frontends_stop()

        (standing,) = await cluster.authority.standings()
        assert standing.spent == sum(charged) <= 10**12
        assert all(charged), "one of them had everything"
        # Each may have kept a slice that the other would have needed; all of it came back.
        assert standing.held == 0

    play(tmp_path, story, BUDGET)


def test_places_are_shared(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        first, second = [await cluster.frontend(name) for name in ("f", "g")]
        holds = [
            await first.admit(REQUEST),
            await first.admit(REQUEST),
            await second.admit(REQUEST),
        ]
        for quota in (first, second):
            with pytest.raises(ConcurrencyExceeded):
                await quota.admit(REQUEST)

        holds[0].release()
        await first.admit(REQUEST)
        await cluster.frontends_stop()

    play(tmp_path, story, PLACES)


def test_while_the_authority_is_away_a_slice_is_served_and_spending_is_not_lost(tmp_path: Path):
    async def story(cluster: Cluster) -> None:
        quota = await cluster.frontend("f")
        hold = await quota.admit(REQUEST)
        await cluster.authority_stops()

        usage = Usage(prompt_tokens=3, completion_tokens=4)
        assert hold.covers(usage)
        charge = PRICE.charge_femto(usage)
        hold.settle(usage=usage, outcome=Outcome.OK, charge_femto=charge)
        with pytest.raises(QuotaUnavailable):
            await asyncio.gather(*(quota.admit(REQUEST) for _ in range(1_000)))

        await cluster.authority_starts()
        while True:
            try:
                (await quota.admit(REQUEST)).release()
                break
            except QuotaUnavailable:
                pass
        await cluster.frontends_stop()
        (standing,) = await cluster.authority.standings()
        assert standing.spent == charge

    play(tmp_path, story, BUDGET)


def test_a_book_has_one_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quota_thread, "LOCK_TRIES", 1)
    monkeypatch.setattr(quota_thread, "LOCK_PAUSE_S", 0)

    async def story(cluster: Cluster) -> None:
        second = AuthorityThread(tmp_path / "quota.db", clock=SystemClock())
        with pytest.raises(ConfigRefused, match="Another process"):
            await second.open([BUDGET])
        await cluster.authority_stops()
        await second.open([BUDGET])
        await second.close()
        await cluster.authority_starts()

    play(tmp_path, story, BUDGET)


def test_strangers_and_nonsense_are_refused(tmp_path: Path):
    async def refusal(call: Awaitable[object]) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await call
        return failure.value.code()

    async def story(cluster: Cluster) -> None:
        async with grpc.aio.insecure_channel(cluster.address) as channel:
            stub = quota_pb2_grpc.QuotaStub(channel)
            stranger, ours = token_metadata("wrong"), token_metadata(TOKEN)
            for call, message in (
                (stub.Lease, quota_pb2.LeaseRequest()),
                (stub.ListLimits, quota_pb2.ListLimitsRequest()),
                (stub.ListStandings, quota_pb2.ListStandingsRequest()),
                (stub.Resolve, quota_pb2.ResolveRequest()),
            ):
                code = await refusal(call(message, metadata=stranger))
                assert code is grpc.StatusCode.UNAUTHENTICATED
            for amount in ("", "-1", "1e9", "١٢", "9" * 41, "0x10", "1_000"):
                claim = quota_pb2.QuotaClaim(
                    limit_name="x", returned="0", spent=amount, need="0", desired="0"
                )
                request = quota_pb2.LeaseRequest(holder="f", epoch="1", claims=[claim])
                code = await refusal(stub.Lease(request, metadata=ours))
                assert code is grpc.StatusCode.INVALID_ARGUMENT, amount
            request = quota_pb2.LeaseRequest(holder="f/g", epoch="1")
            assert await refusal(stub.Lease(request, metadata=ours)) is (
                grpc.StatusCode.INVALID_ARGUMENT
            )
            request = quota_pb2.ResolveRequest(lease_id="none", spent="5")
            assert await refusal(stub.Resolve(request, metadata=ours)) is grpc.StatusCode.NOT_FOUND

    play(tmp_path, story, BUDGET)
