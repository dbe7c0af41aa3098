"""The quota authority on the wire: its service, and what a frontend elsewhere calls."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import grpc
import grpc.aio

from headrace.serving.admission.lease import Ask, Claim, Grant, OpenLease
from headrace.serving.admission.lease_keeper import unavailable
from headrace.serving.admission.quota_authority import Standing
from headrace.serving.admission.quota_thread import AuthorityThread
from headrace.serving.channel.credentials import require_token, token_metadata
from headrace.serving.domain.limit import Limit, Metric, check_limit
from headrace.serving.errors import AmountOutOfRange, ServingError
from headrace.v1 import quota_pb2 as pb
from headrace.v1 import quota_pb2_grpc

DIGITS_MAX = 40
"""Of an amount: 10^25 units of currency in femto."""
_NAME = re.compile(r"[0-9A-Za-z_.:-]{1,128}")
"""Of a holder and an epoch. No slash: it separates them in a lease's name."""
CALL_S = 2.0
_OPTIONS: Sequence[tuple[str, int]] = (
    # A bound on a set of limits: 10,000 at 400 bytes.
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.use_local_subchannel_pool", 1),
)


class QuotaService(quota_pb2_grpc.QuotaServicer):
    """See quota.proto. Every call needs the cluster token."""

    def __init__(
        self,
        authority: AuthorityThread,
        *,
        cluster_token: str,
        left_here: Callable[[], Mapping[str, int]] = dict,
    ) -> None:
        """`left_here` knows of limits that this process counts without leasing them."""
        self._authority = authority
        self._token = cluster_token
        self._left_here = left_here

    async def Lease(
        self, request: pb.LeaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.LeaseReply:
        await require_token(context, self._token)
        try:
            grants = await self._authority.lease(_ask_from_wire(request))
        except ServingError as error:
            await _abort(context, error)
            raise
        return pb.LeaseReply(grants=[_grant_to_wire(grant) for grant in grants])

    async def ListLimits(
        self, request: pb.ListLimitsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListLimitsReply:
        await require_token(context, self._token)
        limits = await self._authority.limits()
        return pb.ListLimitsReply(limits=[_limit_to_wire(limit) for limit in limits])

    async def ListStandings(
        self, request: pb.ListStandingsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListStandingsReply:
        await require_token(context, self._token)
        try:
            standings = await self._authority.standings()
        except ServingError as error:
            await _abort(context, error)
            raise
        left_here = self._left_here()
        standings = [
            replace(each, left=left, held=each.total - left)
            if (left := left_here.get(each.limit.name)) is not None
            else each
            for each in standings
        ]
        return pb.ListStandingsReply(
            standings=[
                pb.QuotaStanding(
                    limit=_limit_to_wire(each.limit),
                    period=each.period,
                    total=str(each.total),
                    spent=str(each.spent),
                    held=str(each.held),
                    left=str(each.left),
                )
                for each in standings
            ]
        )

    async def ListOpenLeases(
        self, request: pb.ListOpenLeasesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListOpenLeasesReply:
        await require_token(context, self._token)
        leases = await self._authority.open_leases(request.holder, epoch=request.epoch)
        return pb.ListOpenLeasesReply(
            leases=[
                pb.OpenLease(
                    lease_id=lease.lease_id,
                    limit_name=lease.limit_name,
                    period=lease.period,
                    epoch=lease.epoch,
                    granted=str(lease.granted),
                    spent=str(lease.spent),
                )
                for lease in leases
            ]
        )

    async def Resolve(
        self, request: pb.ResolveRequest, context: grpc.aio.ServicerContext
    ) -> pb.ResolveReply:
        await require_token(context, self._token)
        try:
            await self._authority.resolve(request.lease_id, spent=_amount(request.spent))
        except ServingError as error:
            await _abort(context, error)
            raise
        return pb.ResolveReply()


class RemoteAuthority:
    """Implements `Authority` over gRPC. `close` it."""

    def __init__(self, address: str, *, cluster_token: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = quota_pb2_grpc.QuotaStub(self._channel)
        self._metadata = token_metadata(cluster_token)

    async def lease(self, ask: Ask) -> Sequence[Grant]:
        """See `Authority.lease`."""
        try:
            reply = await self._stub.Lease(
                _ask_to_wire(ask), metadata=self._metadata, timeout=CALL_S
            )
        except grpc.aio.AioRpcError as error:
            raise unavailable(_why(error)) from error
        return [_grant_from_wire(grant) for grant in reply.grants]

    async def limits(self) -> Sequence[Limit]:
        """The limits in force there.

        Raises:
            QuotaUnavailable: it does not answer.
        """
        try:
            reply = await self._stub.ListLimits(
                pb.ListLimitsRequest(), metadata=self._metadata, timeout=CALL_S
            )
        except grpc.aio.AioRpcError as error:
            raise unavailable(_why(error)) from error
        return [_limit_from_wire(limit) for limit in reply.limits]

    async def standings(self) -> Sequence[Standing]:
        """The limits with their use.

        Raises:
            QuotaUnavailable: it does not answer.
        """
        try:
            reply = await self._stub.ListStandings(
                pb.ListStandingsRequest(), metadata=self._metadata, timeout=CALL_S
            )
        except grpc.aio.AioRpcError as error:
            raise unavailable(_why(error)) from error
        return [
            Standing(
                limit=_limit_from_wire(each.limit),
                period=each.period,
                total=_amount(each.total),
                spent=_amount(each.spent),
                held=_amount(each.held),
                left=_signed(each.left),
            )
            for each in reply.standings
        ]

    async def open_leases(self, holder: str, *, epoch: str) -> Sequence[OpenLease]:
        """See `QuotaAuthority.open_leases`.

        Raises:
            QuotaUnavailable: it does not answer.
        """
        request = pb.ListOpenLeasesRequest(holder=holder, epoch=epoch)
        try:
            reply = await self._stub.ListOpenLeases(
                request, metadata=self._metadata, timeout=CALL_S
            )
        except grpc.aio.AioRpcError as error:
            raise unavailable(_why(error)) from error
        return [
            OpenLease(
                lease_id=each.lease_id,
                limit_name=each.limit_name,
                period=each.period,
                epoch=each.epoch,
                granted=_amount(each.granted),
                spent=_amount(each.spent),
            )
            for each in reply.leases
        ]

    async def resolve(self, lease_id: str, *, spent: int) -> None:
        """See `QuotaAuthority.resolve`.

        Raises:
            QuotaUnavailable: it does not answer, or refuses.
        """
        request = pb.ResolveRequest(lease_id=lease_id, spent=str(spent))
        try:
            await self._stub.Resolve(request, metadata=self._metadata, timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            raise unavailable(_why(error)) from error

    async def close(self) -> None:
        await self._channel.close()


def _ask_to_wire(ask: Ask) -> pb.LeaseRequest:
    return pb.LeaseRequest(
        holder=ask.holder,
        epoch=ask.epoch,
        seq=ask.seq,
        claims=[
            pb.QuotaClaim(
                limit_name=claim.limit_name,
                lease_id=claim.lease_id,
                returned=str(claim.returned),
                spent=str(claim.spent),
                need=str(claim.need),
                desired=str(claim.desired),
                closes=claim.closes,
            )
            for claim in ask.claims
        ],
    )


def _ask_from_wire(message: pb.LeaseRequest) -> Ask:
    return Ask(
        holder=_name(message.holder),
        epoch=_name(message.epoch),
        seq=message.seq,
        claims=tuple(
            Claim(
                limit_name=claim.limit_name,
                lease_id=claim.lease_id,
                returned=_amount(claim.returned),
                spent=_amount(claim.spent),
                need=_amount(claim.need),
                desired=_amount(claim.desired),
                closes=claim.closes,
            )
            for claim in message.claims
        ),
    )


def _grant_to_wire(grant: Grant) -> pb.QuotaGrant:
    return pb.QuotaGrant(
        limit_name=grant.limit_name,
        lease_id=grant.lease_id,
        granted=str(grant.granted),
        expires_in_ms=grant.expires_in_ms,
        left=str(grant.left),
        wait_ms=grant.wait_ms,
        is_closed=grant.is_closed,
    )


def _grant_from_wire(message: pb.QuotaGrant) -> Grant:
    return Grant(
        limit_name=message.limit_name,
        lease_id=message.lease_id,
        granted=_amount(message.granted),
        expires_in_ms=message.expires_in_ms,
        left=_signed(message.left),
        wait_ms=message.wait_ms if message.HasField("wait_ms") else None,
        is_closed=message.is_closed,
    )


def _limit_to_wire(limit: Limit) -> pb.QuotaLimit:
    return pb.QuotaLimit(
        subject=limit.subject,
        metric=limit.metric.value,
        limit=limit.limit,
        model=limit.model,
        burst=limit.burst,
        hard=limit.hard,
        currency=limit.currency,
    )


def _limit_from_wire(message: pb.QuotaLimit) -> Limit:
    return check_limit(
        Limit(
            subject=message.subject,
            metric=Metric(message.metric),
            limit=message.limit,
            model=message.model if message.HasField("model") else None,
            burst=message.burst if message.HasField("burst") else None,
            hard=message.hard,
            currency=message.currency,
        )
    )


def _amount(text: str) -> int:
    """Digits to a number; strict, because Python reads more than digits as one."""
    if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS_MAX):
        raise AmountOutOfRange(
            f"The amount {text[:60]!r} cannot be read.",
            why=f"Amounts are 1 to {DIGITS_MAX} digits.",
            fix="Run the same version of Headrace on all frontends.",
        )
    return int(text)


def _signed(text: str) -> int:
    return -_amount(text[1:]) if text.startswith("-") else _amount(text)


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise AmountOutOfRange(
            f"A holder or its epoch is called {text[:140]!r}.",
            why="It has 1 to 128 letters, digits or _ . : - in it.",
            fix="Set `quota.holder` to such a name.",
        )
    return text


async def _abort(context: grpc.aio.ServicerContext, error: ServingError) -> None:
    await context.abort(grpc.StatusCode[error.code], f"{error.what} {error.why}")


def _why(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name.lower().replace('_', ' ')}: {(error.details() or '')[:200]}"
