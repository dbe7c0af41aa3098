"""The Batch service: take lines in, tell how far they are, hand results out."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc.aio

from headrace.serving import log
from headrace.serving.channel.fleet import ReplicaFleet, model_not_found
from headrace.serving.clock import Clock
from headrace.serving.config_jobs import BatchConfig
from headrace.serving.domain.batch import Batch, BatchState
from headrace.serving.domain.record import Caller
from headrace.serving.errors import DeadlineExceeded, Draining, InvalidRequest, Overloaded
from headrace.serving.frontend import convert
from headrace.serving.frontend.batch_lines import at_line
from headrace.serving.frontend.batch_runner import BatchRunner
from headrace.serving.frontend.batch_upload import Upload
from headrace.serving.frontend.interceptors import caller
from headrace.serving.jobs import batch_files
from headrace.serving.jobs.batch_store import BatchStore, not_found
from headrace.v1 import batch_pb2 as pb
from headrace.v1 import batch_pb2_grpc
from headrace.v1.usage_pb2 import Charge

UPLOADS_MAX = 8
"""At once on one frontend: each holds up to 10 MB and a thread's time."""
PART_S = 60.0
"""How long the next part of an upload may take: a stalled one gives its place away."""
LIST_MAX = 1_000
RESULTS_PART_BYTES = 256 << 10
RETRY_AFTER_MS = 1_000


class BatchService(batch_pb2_grpc.BatchServicer):
    """See batch.proto for what each method promises."""

    def __init__(
        self,
        store: BatchStore,
        *,
        runner: BatchRunner,
        fleet: ReplicaFleet,
        config: BatchConfig,
        clock: Clock,
        is_draining: Callable[[], bool],
    ) -> None:
        self._store = store
        self._runner = runner
        self._fleet = fleet
        self._config = config
        self._clock = clock
        self._is_draining = is_draining
        self._num_uploads = 0

    async def Create(
        self,
        request_iterator: AsyncIterator[pb.CreateBatchRequest],
        context: grpc.aio.ServicerContext,
    ) -> pb.BatchInfo:
        if self._is_draining():
            raise Draining(
                "This frontend is shutting down.",
                why="It takes no new work.",
                fix="Connect again: another frontend, or its successor, takes the batch.",
                retry_after_ms=RETRY_AFTER_MS,
            )
        if self._num_uploads >= UPLOADS_MAX:
            raise Overloaded(
                f"{self._num_uploads} batches are being uploaded to this frontend.",
                why="That is its bound.",
                fix="Retry after the time given, with jitter.",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self._num_uploads += 1
        try:
            return await self._upload(request_iterator, caller())
        finally:
            self._num_uploads -= 1

    async def Get(
        self, request: pb.GetBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.BatchInfo:
        return self._to_wire(await self._mine(request.batch_id))

    async def List(
        self, request: pb.ListBatchesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListBatchesResponse:
        limit = request.limit or 100
        if not 1 <= limit <= LIST_MAX:
            raise InvalidRequest(
                f"limit is {limit}.",
                why=f"It lies between 1 and {LIST_MAX:,}.",
                fix="Correct it, or leave it unset.",
                field="limit",
            )
        by = caller()
        found = await asyncio.to_thread(
            self._store.list, tenant_id=by.tenant_id, project_id=by.project_id, limit=limit
        )
        return pb.ListBatchesResponse(batches=[self._to_wire(batch) for batch in found])

    async def Cancel(
        self, request: pb.CancelBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.BatchInfo:
        batch = await self._mine(request.batch_id)
        batch = await asyncio.to_thread(self._store.cancel, batch.batch_id)
        self._runner.poke(batch.batch_id)
        return self._to_wire(batch)

    async def Results(
        self, request: pb.BatchResultsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        batch = await self._mine(request.batch_id)
        offset, end = request.offset, batch.results_bytes
        if not 0 <= offset <= end:
            raise InvalidRequest(
                f"offset is {offset:,}.",
                why=f"The results have {end:,} bytes.",
                fix="Go on at the next_offset of the last part received.",
                field="offset",
            )
        folder = self._store.folder_of(batch.batch_id)
        while offset < end:
            size = min(RESULTS_PART_BYTES, end - offset)
            part = await asyncio.to_thread(_read, folder, offset=offset, size=size)
            if not part:
                raise not_found(batch.batch_id)  # It was deleted meanwhile.
            offset += len(part)
            await context.write(pb.BatchResultsChunk(jsonl=part, next_offset=offset))

    async def Delete(
        self, request: pb.DeleteBatchRequest, context: grpc.aio.ServicerContext
    ) -> pb.DeleteBatchResponse:
        batch = await self._mine(request.batch_id)
        if not batch.state.is_final:
            raise InvalidRequest(
                f"The batch {batch.batch_id} is {batch.state}.",
                why="Only a batch that has ended is deleted.",
                fix="Cancel it first, and wait until it is cancelled.",
                field="batch_id",
            )
        await asyncio.to_thread(self._store.forget, batch.batch_id)
        return pb.DeleteBatchResponse()

    async def _mine(self, batch_id: str) -> Batch:
        by = caller()
        return await asyncio.to_thread(
            self._store.get, batch_id, tenant_id=by.tenant_id, project_id=by.project_id
        )

    async def _upload(
        self, parts: AsyncIterator[pb.CreateBatchRequest], by: Caller
    ) -> pb.BatchInfo:
        now_unix_ms = self._clock.unix_ms()
        batch = Batch(
            batch_id=f"batch_{uuid.uuid4().hex}",
            tenant_id=by.tenant_id,
            project_id=by.project_id,
            key_id=by.key_id,
            state=BatchState.VALIDATING,
            created_unix_ms=now_unix_ms,
            expires_unix_ms=now_unix_ms + self._config.window_h * 3_600_000,
        )
        await asyncio.to_thread(
            self._store.create,
            batch,
            now_unix_ms=now_unix_ms,
            open_max=self._config.open_max,
            bytes_max=self._config.stored_mb_max * 1_000_000,
        )
        upload = Upload(self._store.folder_of(batch.batch_id))
        try:
            await self._take_all(upload, parts)
            size = await asyncio.to_thread(upload.finish)
            self._check_models(upload)
        except BaseException:
            await asyncio.shield(asyncio.to_thread(self._forget, upload, batch.batch_id))
            raise
        queued = await asyncio.to_thread(
            self._store.enqueue, batch.batch_id, lines=upload.lines, input_bytes=size
        )
        log.batch_moved(
            batch_id=queued.batch_id,
            tenant_id=queued.tenant_id,
            state=queued.state.value,
            lines=queued.counts.lines,
            done=0,
        )
        self._runner.poke()
        return self._to_wire(queued)

    def _forget(self, upload: Upload, batch_id: str) -> None:
        upload.close()
        self._store.forget(batch_id)

    async def _take_all(self, upload: Upload, parts: AsyncIterator[pb.CreateBatchRequest]) -> None:
        while True:
            try:
                async with asyncio.timeout(PART_S):
                    part = await anext(parts)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise DeadlineExceeded(
                    f"No part of the upload came for {PART_S:g} s.",
                    why="An upload that stalls gives its place away.",
                    fix="Upload the file again.",
                ) from error
            await asyncio.to_thread(upload.take, part)

    def _check_models(self, upload: Upload) -> None:
        """Each model is known here, though it may have no replica at the moment.

        Raises:
            InvalidRequest: one is not; names the first line that asks for it.
        """
        known = {served.name for served in self._fleet.models()} | self._fleet.expected
        for model, line in upload.models.items():
            if model not in known:
                raise at_line(model_not_found(model, sorted(known)), number=line)

    def _to_wire(self, batch: Batch) -> pb.BatchInfo:
        counts = batch.counts
        return pb.BatchInfo(
            batch_id=batch.batch_id,
            state=f"BATCH_STATE_{batch.state.name}",
            counts=pb.BatchCounts(
                lines=counts.lines,
                succeeded=counts.succeeded,
                failed=counts.failed,
                cancelled=counts.cancelled,
                expired=counts.expired,
            ),
            usage=convert.usage_to_wire(batch.usage),
            charge=Charge(nano=batch.charge_nano, currency=batch.currency),
            created_unix_ms=batch.created_unix_ms,
            started_unix_ms=batch.started_unix_ms or 0,
            finished_unix_ms=batch.finished_unix_ms or 0,
            expires_unix_ms=batch.expires_unix_ms,
            eta_unix_ms=batch.eta_unix_ms(self._clock.unix_ms()) or 0,
            results_bytes=batch.results_bytes,
            why=batch.why,
        )


def _read(folder: Path, *, offset: int, size: int) -> bytes:
    try:
        return batch_files.read_results(folder, offset=offset, size=size)
    except FileNotFoundError:
        return b""
