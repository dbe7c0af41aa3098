"""The Billing service: corrections and credits over the wire.

By the time a method here runs, `interceptors.py` has checked that the caller may write what is owed
in the organisation that the request names. What may be written is `metering/corrections.py`'s.
"""

import asyncio

import grpc.aio

from headrace.serving.admission.account_store import AccountStore
from headrace.serving.domain import record
from headrace.serving.domain.usage import FEMTO_PER_NANO
from headrace.serving.frontend.interceptors import principal
from headrace.serving.metering.corrections import Corrections
from headrace.v1 import billing_pb2 as pb
from headrace.v1 import billing_pb2_grpc


class BillingService(billing_pb2_grpc.BillingServicer):
    """See billing.proto for what each method promises."""

    def __init__(self, corrections: Corrections, accounts: AccountStore) -> None:
        """Both are somebody else's to close."""
        self._corrections = corrections
        self._accounts = accounts

    async def Adjust(
        self, request: pb.AdjustRequest, context: grpc.aio.ServicerContext
    ) -> pb.CorrectionRecorded:
        return await self._write(
            record.Adjustment(
                adjustment_id=request.adjustment_id,
                tenant_id=request.tenant_id,
                project_id=request.project_id or record.DEFAULT_PROJECT,
                request_id=request.request_id,
                amount_femto=request.amount_nano * FEMTO_PER_NANO,
                currency=request.currency,
                reason=request.reason,
                actor=principal().actor,
            )
        )

    async def Grant(
        self, request: pb.GrantRequest, context: grpc.aio.ServicerContext
    ) -> pb.CorrectionRecorded:
        return await self._write(
            record.Grant(
                grant_id=request.grant_id,
                tenant_id=request.tenant_id,
                project_id=request.project_id,
                amount_femto=request.amount_nano * FEMTO_PER_NANO,
                currency=request.currency,
                reason=request.reason,
                expires_unix_ms=request.expires_unix_ms,
                actor=principal().actor,
            )
        )

    async def _write(self, correction: record.Adjustment | record.Grant) -> pb.CorrectionRecorded:
        """Nothing is owed by, or given to, an organisation that is not there."""
        await asyncio.to_thread(
            self._accounts.check_exists,
            tenant_id=correction.tenant_id,
            project_id=correction.project_id,
        )
        booked = await self._corrections.write(correction)
        return pb.CorrectionRecorded(log_id=booked.log_id, seq=booked.seq)
