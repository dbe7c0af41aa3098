"""The frontend's limits as a whole: authority, leases, decisions, and following the files.

Alone, a frontend is its own authority, for others too that name it: rates and numbers in use are
counted here, budgets are leased from the book in the home. With `quota.authority` set, everything
is leased from there.
"""

import asyncio
from collections.abc import Callable

from headrace.serving import log
from headrace.serving.admission.lease import OpenLease
from headrace.serving.admission.lease_keeper import LeaseKeeper
from headrace.serving.admission.quota import Quota
from headrace.serving.admission.quota_store import LimitsSource, LimitStore
from headrace.serving.admission.quota_thread import AuthorityThread
from headrace.serving.channel.quota_service import QuotaService, RemoteAuthority
from headrace.serving.clock import Clock
from headrace.serving.config import CONFIG_FILE, Config
from headrace.serving.errors import (
    LedgerUnavailable,
    MeterUnavailable,
    QuotaUnavailable,
    ServingError,
)
from headrace.serving.observe_quota import QuotaMetrics

SpentOf = Callable[[OpenLease], int | None]

RESOLVE_RETRY_S = 5.0
"""Until former lives' leases are tried again. Nothing is lost meanwhile: they stay spent."""
_RESOLVING = "resolving leases of former lives"


class QuotaParts:
    """`open`, then `follow` now and then, then `close`."""

    def __init__(
        self,
        config: Config,
        *,
        epoch: str,
        cluster_token: str,
        clock: Clock,
        metrics: QuotaMetrics,
    ) -> None:
        """Nothing is opened before `open`. `epoch` names this life of this frontend."""
        self._config = config
        self._epoch = epoch
        self._following: asyncio.Task[None] | None = None
        self._resolving: asyncio.Task[None] | None = None
        self._local: AuthorityThread | None = None
        self._remote: RemoteAuthority | None = None
        self.service: QuotaService | None = None
        """To be served beside the directory; None when the authority is elsewhere."""
        address = config.quota.authority
        if address is None:
            self._local = AuthorityThread(config.quota_path, clock=clock)
            self.service = QuotaService(
                self._local,
                cluster_token=cluster_token,
                left_here=lambda: self.quota.left_here(),
            )
        else:
            self._remote = RemoteAuthority(address, cluster_token=cluster_token)
        authority = self._local or self._remote
        assert authority is not None
        self.leases = LeaseKeeper(authority, holder=config.quota.holder, epoch=epoch, clock=clock)
        self.quota = Quota(
            clock=clock,
            leases=self.leases,
            metrics=metrics,
            leases_all=self._remote is not None,
        )
        self._source = LimitsSource(
            LimitStore(config.limits_path, clock=clock),
            config_path=config.home / CONFIG_FILE,
            configured=lambda: Config.load(config.home).limits,
            initial=config.limits,
        )

    async def open(self) -> None:
        """Read the limits and begin to lease.

        Raises:
            ConfigRefused, QuotaUnavailable: a file in the home cannot be used.
        """
        if self._local is not None:
            limits = await asyncio.to_thread(self._source.read)
            await self._local.open(limits)
            self.quota.use(limits)
        else:
            await self._follow_authority()
        self.leases.start()

    async def begin_to_resolve(self, spent_of: SpentOf) -> None:
        """Resolve former lives, now if authority and books answer; else until `close`, again."""
        if not await self._has_resolved(spent_of):
            self._resolving = asyncio.get_running_loop().create_task(self._resolve_later(spent_of))

    async def resolve_former_lives(self, spent_of: SpentOf) -> int:
        """Give back what former lives of this frontend leased and did not spend; how many leases.

        To be called once their meter log is settled. `spent_of` answers from it what requests of
        that limit, period and epoch were charged, in femto-currency; None where it cannot say:
        then all of the lease stays spent. It may block: it is called off the event loop.

        Raises:
            QuotaUnavailable: the authority does not answer; nothing is lost by a later try.
            Exception: whatever `spent_of` raises; likewise.
        """
        authority = self._local or self._remote
        assert authority is not None
        resolved = 0
        for lease in await authority.open_leases(self._config.quota.holder, epoch=self._epoch):
            spent = await asyncio.to_thread(spent_of, lease)
            if spent is not None:
                # A request that outlived its period is charged to the one that began it.
                within = min(max(spent, lease.spent), max(lease.granted, lease.spent))
                await authority.resolve(lease.lease_id, spent=within)
                resolved += 1
        return resolved

    def follow(self) -> None:
        """Begin to look whether limits have changed, unless that is under way. Never waits."""
        self.quota.observe()
        if self._following is None or self._following.done():
            self._following = asyncio.get_running_loop().create_task(self._follow())

    async def close(self) -> None:
        """Return what is leased. Call when no request runs any more."""
        for task in filter(None, (self._following, self._resolving)):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self.leases.close()
        if self._local is not None:
            await self._local.close()
        if self._remote is not None:
            await self._remote.close()

    async def _follow(self) -> None:
        try:
            if self._local is None:
                await self._follow_authority()
                return
            limits = await asyncio.to_thread(self._source.changes)
            if limits is not None:
                await self._local.use(limits)
                self.quota.use(limits)
                log.limits_changed(limits=len(limits))
        except ServingError as error:
            # What was in force stays in force; the file's next change is the next try.
            log.refused(error, during="reading limits")
        except Exception as error:  # The task's root: a defect must not end the rounds.
            log.crashed(during="reading limits", error=error)

    async def _has_resolved(self, spent_of: SpentOf) -> bool:
        try:
            await self.resolve_former_lives(spent_of)
        except (QuotaUnavailable, LedgerUnavailable, MeterUnavailable) as refusal:
            log.refused(refusal, during=_RESOLVING)
            return False
        return True

    async def _resolve_later(self, spent_of: SpentOf) -> None:
        """Apart from all other rounds, since each try may wait for the authority's deadline."""
        has_resolved = False
        while not has_resolved:
            await asyncio.sleep(RESOLVE_RETRY_S)
            try:
                has_resolved = await self._has_resolved(spent_of)
            except Exception as error:  # The task's root: a defect must not end the rounds.
                log.crashed(during=_RESOLVING, error=error)

    async def _follow_authority(self) -> None:
        """Take over the authority's limits; the last known ones hold while it is away.

        A frontend that has never heard them does not know whom to refuse, so it cannot start.
        """
        assert self._remote is not None
        try:
            limits = await self._remote.limits()
        except QuotaUnavailable:
            if self._following is None:
                raise
            return
        self.quota.use(limits)
