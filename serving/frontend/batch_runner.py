"""Which batches this frontend runs, and how many of their lines at once.

Lines run on what nobody else wants: a replica where anything waits gets none, a row in four stays
free for whoever comes next (`idle_capacity.py`), and a refusal makes its batch wait.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.errors import ServingError
from headrace.serving.frontend.batch_run import BatchRun, Prepare
from headrace.serving.frontend.idle_capacity import idle_rows
from headrace.serving.jobs.batch_store import BatchStore
from headrace.serving.metering.give_back import GiveBack, GivenBack
from headrace.serving.pipeline import Pipeline
from headrace.serving.router.endpoint import Endpoint

RUNS_MAX = 4
"""Batches that one frontend runs at once, so that a short one does not wait behind a long one."""
LOOK_S = 2.0
"""How often a batch is looked for that another frontend left."""
SWEEP_S = 60.0
ROOM_S = 0.05
"""How often a line that waits for room looks again: a few engine steps."""
UNSEEN_MS = 250.0
"""A line is counted on top of what its replica reported until it must be part of that."""
GIVE_BACK_REASON = "batch: the line's result was lost"


class BatchRunner:
    """Runs the batches of this home. Owned by the frontend's event loop."""

    def __init__(
        self,
        store: BatchStore,
        *,
        pipeline: Pipeline,
        prepare: Prepare,
        endpoints: Callable[[], Sequence[Endpoint]],
        give_back: GiveBack | None,
        clock: Clock,
        lines_max: int,
        keep_ms: int,
    ) -> None:
        """Nothing runs before `start`; `store` is closed by its owner, after `stop`.

        Args:
            store: shared with the other frontends of this home.
            pipeline: what runs a line.
            prepare: makes a line what the pipeline runs.
            endpoints: the replicas as this frontend sees them.
            give_back: reverses charges. None leaves them in the store as debts.
            clock: of leases, windows and expiries.
            lines_max: lines of all batches at once.
            keep_ms: how long a batch that has ended is kept.
        """
        self._store = store
        self._pipeline = pipeline
        self._prepare = prepare
        self._endpoints = endpoints
        self._hook = give_back
        self._clock = clock
        self._lines_max = lines_max
        self._keep_ms = keep_ms
        self._runs: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._places: dict[int, tuple[str, float]] = {}
        """Model and time of entry of each running line."""
        self._next_place = 0
        self._changed = asyncio.Event()
        self._has_progressed = asyncio.Condition()
        self.progress = 0
        """Grows when results of a batch became durable, or one entered another state."""
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self.is_draining = False
        """Once it is set no further line starts."""
        self._looking: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._looking = asyncio.get_running_loop().create_task(self._look())

    def poke(self, batch_id: str = "") -> None:
        """Something happened to a batch: it is new, or was cancelled."""
        if running := self._runs.get(batch_id):
            running[0].notice()
        self._changed.set()

    async def wait_empty(self) -> None:
        """Wait until no line runs; those that wait for room, or for better times, do not count."""
        await self._is_empty.wait()

    async def stop(self) -> None:
        """Stop what runs, uncharged, and leave the batches to whoever comes next. Idempotent."""
        self.is_draining = True
        tasks = [task for _, task in self._runs.values()]
        tasks += [self._looking] if self._looking else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def progressed(self, seen: int) -> int:
        """Wait until `progress` is past `seen`; what it is then."""
        async with self._has_progressed:
            await self._has_progressed.wait_for(lambda: self.progress > seen)
        return self.progress

    async def enter(self, model: str) -> int:
        """See `Room`."""
        # Room comes with what a replica says of its load, which it says with every step.
        while self.is_draining or not self._has_room(model):  # noqa: ASYNC110
            await asyncio.sleep(ROOM_S)
        self._next_place += 1
        self._places[self._next_place] = (model, self._clock.monotonic_ms())
        self._is_empty.clear()
        return self._next_place

    def leave(self, place: int) -> None:
        del self._places[place]
        if not self._places:
            self._is_empty.set()

    def _has_room(self, model: str) -> bool:
        if len(self._places) >= self._lines_max:
            return False
        now_ms = self._clock.monotonic_ms()
        unseen = sum(
            name == model and now_ms - entered_ms < UNSEEN_MS
            for name, entered_ms in self._places.values()
        )
        return idle_rows(self._endpoints(), model, now_ms=now_ms) > unseen

    async def _look(self) -> None:
        """Take batches that nobody runs; now and then, put the rest in order."""
        swept_ms = float("-inf")
        while True:
            self._changed.clear()
            try:
                await self._take()
                now_ms = self._clock.monotonic_ms()
                if now_ms - swept_ms >= SWEEP_S * 1000:
                    swept_ms = now_ms
                    await self._sweep()
            except ServingError as error:
                log.refused(error, during="looking for batches")
            except Exception as error:  # The task's root: a defect must not end the rounds.
                log.crashed(during="looking for batches", error=error)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()

    async def _take(self) -> None:
        while len(self._runs) < RUNS_MAX and not self.is_draining:
            lease = await asyncio.to_thread(
                self._store.lease, now_unix_ms=self._clock.unix_ms(), without=list(self._runs)
            )
            if lease is None:
                return
            run = BatchRun(
                lease,
                store=self._store,
                pipeline=self._pipeline,
                prepare=self._prepare,
                room=self,
                give_back=self._give_back,
                on_progress=self._progressed,
                clock=self._clock,
            )
            task = asyncio.get_running_loop().create_task(run.run())
            self._runs[lease.batch.batch_id] = (run, task)
            task.add_done_callback(lambda task, name=lease.batch.batch_id: self._ran(task, name))

    async def _progressed(self) -> None:
        async with self._has_progressed:
            self.progress += 1
            self._has_progressed.notify_all()

    def _ran(self, task: "asyncio.Task[None]", batch_id: str) -> None:
        del self._runs[batch_id]
        self._changed.set()
        if not task.cancelled() and (error := task.exception()):
            # Its lease lapses, and it is tried again from what is committed.
            if isinstance(error, ServingError):
                log.refused(error, during="running a batch")
            else:
                log.crashed(during="running a batch", error=error)

    async def _sweep(self) -> None:
        await asyncio.to_thread(
            self._store.sweep, now_unix_ms=self._clock.unix_ms(), keep_ms=self._keep_ms
        )
        for tenant_id, request_id in await asyncio.to_thread(self._store.debts):
            if await self._give_back(tenant_id, request_id) is not GivenBack.LATER:
                await asyncio.to_thread(
                    self._store.paid, tenant_id=tenant_id, request_id=request_id
                )

    async def _give_back(self, tenant_id: str, request_id: str) -> GivenBack:
        """Reverse a charge; what cannot be reversed now is noted, durably, and tried again."""
        done = GivenBack.LATER
        if self._hook is not None:
            try:
                done = await self._hook(
                    tenant_id=tenant_id, request_id=request_id, reason=GIVE_BACK_REASON
                )
            except ServingError as error:
                log.refused(error, during="giving back")
        if done is GivenBack.LATER:
            await asyncio.to_thread(self._store.owe, tenant_id=tenant_id, request_id=request_id)
        return done
