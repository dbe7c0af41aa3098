"""Calls with a key and batches as a whole: their stores, what runs them, and whose they are.

Both are work that outlives a call. It belongs to one life of one frontend, which holds a lock for
as long as it lives; a later one takes over what a dead one left.
"""

import asyncio
import contextlib
from collections.abc import Callable

from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.channel.fleet import ReplicaFleet
from headrace.serving.clock import Clock
from headrace.serving.config import Config
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.record import Caller
from headrace.serving.domain.tier import Tier
from headrace.serving.epochs import EpochLock, is_alive
from headrace.serving.frontend.batch import BatchService
from headrace.serving.frontend.batch_run import Prepare
from headrace.serving.frontend.batch_runner import BatchRunner
from headrace.serving.frontend.idempotency import HOUSEKEEPING_S, Idempotency
from headrace.serving.frontend.idempotency_key import Secrets
from headrace.serving.idempotency.opening import open_claims
from headrace.serving.jobs.batch_store import BatchStore
from headrace.serving.metering.give_back import GiveBack
from headrace.serving.pipeline import Pipeline
from headrace.v1 import inference_pb2 as pb


class JobParts:
    """`open_calls`, then `open_batches`, then `close`. Owned by the frontend's event loop."""

    def __init__(
        self, config: Config, *, epoch: str, log_id: str, clock: Clock, give_back: GiveBack
    ) -> None:
        """Nothing is opened yet.

        Args:
            config: of this frontend.
            epoch: names this life of it.
            log_id: of its meter log.
            clock: of expiries.
            give_back: reverses what was charged for a result that nobody has.
        """
        self._config = config
        self._epoch = epoch
        self._log_id = log_id
        self._clock = clock
        self._give_back = give_back
        self._stack = contextlib.AsyncExitStack()
        self.idempotency: Idempotency
        self.batches: BatchRunner

    async def open_calls(self, derive: Callable[[str], bytes]) -> Idempotency:
        """Take this life's lock and open the store of keys; `derive` makes its secrets.

        Raises:
            ConfigRefused: the store is configured wrongly.
            IdempotencyUnavailable: it does not answer.
        """
        config = self._config
        lock = await asyncio.to_thread(EpochLock, config.epochs_dir, self._epoch)
        self._stack.callback(lock.close)
        claims = await asyncio.to_thread(
            open_claims,
            config,
            owner=self._epoch,
            log_id=self._log_id,
            is_alive=self._is_alive,
        )
        self._stack.push_async_callback(asyncio.to_thread, claims.close)
        self.idempotency = Idempotency(
            claims,
            secrets=Secrets.derived(derive),
            clock=self._clock,
            keep_answers=config.idempotency.keep_answers,
            keep_ms=config.idempotency.keep_h * 3_600_000,
            give_back=self._give_back,
        )
        self._stack.push_async_callback(self.idempotency.close)
        keeping = asyncio.get_running_loop().create_task(self._keep_keys())
        self._stack.push_async_callback(_ended, keeping)
        return self.idempotency

    async def open_batches(
        self,
        prepare: Prepare,
        *,
        pipeline: Pipeline,
        fleet: ReplicaFleet,
        door: Authenticator,
        is_draining: Callable[[], bool],
    ) -> BatchService:
        """Open the batches of the home and begin to run those that nobody runs.

        A line may do what its batch's key may at that moment: nothing, once it is revoked.

        Raises:
            ConfigRefused: the folder cannot be used.
        """
        config = self._config

        async def prepare_as_of_now(
            message: pb.GenerateRequest,
            by: Caller,
            *,
            request_id: str,
            deadline_ms: float | None,
            tier: Tier,
        ) -> Generate:
            by = door.still_admits(by.key_id)
            return await prepare(
                message, by, request_id=request_id, deadline_ms=deadline_ms, tier=tier
            )

        store = await asyncio.to_thread(
            BatchStore, config.batches_dir, owner=self._epoch, is_alive=self._is_alive
        )
        self._stack.push_async_callback(asyncio.to_thread, store.close)
        self.batches = BatchRunner(
            store,
            pipeline=pipeline,
            prepare=prepare_as_of_now,
            endpoints=lambda: fleet.endpoints,
            give_back=self._give_back,
            clock=self._clock,
            lines_max=config.batch.lines_running_max,
            keep_ms=config.batch.keep_days * 86_400_000,
        )
        self.batches.start()
        self._stack.push_async_callback(self.batches.stop)
        return BatchService(
            store,
            runner=self.batches,
            fleet=fleet,
            config=config.batch,
            clock=self._clock,
            is_draining=is_draining,
        )

    async def close(self) -> None:
        """Stop what runs, then close the stores. Idempotent."""
        await self._stack.aclose()

    def _is_alive(self, owner: str) -> bool:
        return is_alive(self._config.epochs_dir, owner)

    async def _keep_keys(self) -> None:
        while True:
            await self.idempotency.keep_house()
            await asyncio.sleep(HOUSEKEEPING_S)


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
