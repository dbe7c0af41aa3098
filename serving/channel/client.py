"""The frontend's side of one step channel: every sequence this frontend runs on one replica.

One stream carries them all. What the frontend has to say in one turn of its event loop travels as
one message; what a step produced arrives as one message and goes to the inboxes without a task
switch. A replica is lost when its stream ends or falls silent; then every open sequence's inbox
hears so, and the client connects again in the background for as long as it is wanted.
"""

import asyncio
import random
from collections.abc import Callable, Sequence

import grpc
import grpc.aio

from headrace.serving import log
from headrace.serving.channel.convert import delta_from_wire, load_from_wire, submit_to_wire
from headrace.serving.channel.credentials import token_metadata
from headrace.serving.channel.replica_server import MESSAGE_BYTES_MAX
from headrace.serving.clock import Clock
from headrace.serving.domain.request import SequenceSpec
from headrace.serving.inbox import Inbox
from headrace.serving.observe import Metrics
from headrace.serving.router.endpoint import Endpoint
from headrace.v1 import step_pb2, step_pb2_grpc

LISTEN_S = 1.0
SILENT_LISTENS_MAX = 3
"""Three missed heartbeats: the host is gone, or hangs so badly that it might as well be. Counted in
looks, not in seconds: when it is this process that hangs, the looks are late too, and what came
meanwhile is read before the next one."""

HELLO_S = 5.0
"""A replica that listens but does not say hello within this is not serving."""

RETRY_S_MIN, RETRY_S_MAX = 0.05, 2.0
"""Pauses between tries to connect; doubling, with jitter."""

SUBMIT_BYTES_MAX = 1 << 20
"""What one message may carry; more goes into the next one."""

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Each try is a fresh one: a shared subchannel would remember another client's backoff.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
)

_Stream = grpc.aio.StreamStreamCall[step_pb2.ToReplica, step_pb2.FromReplica]


class ReplicaClient:
    """One replica, as this frontend talks to it. Owned by one event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        cluster_token: str,
        clock: Clock,
        metrics: Metrics,
        on_change: Callable[[], None],
    ) -> None:
        """Prepare; `start` connects.

        Args:
            endpoint: kept up to date with connection and load.
            cluster_token: what the replica demands.
            clock: of the requests' deadlines.
            metrics: of this frontend.
            on_change: called when the replica can take requests, or no longer.
        """
        self.endpoint = endpoint
        self._token = cluster_token
        self._clock = clock
        self._metrics = metrics
        self._model_metrics = metrics.model(endpoint.facts.model)
        self._on_change = on_change
        self._open: dict[int, tuple[Inbox, int]] = {}
        self._last_sequence = 0
        self._submits: list[step_pb2.Submit] = []
        self._aborts: list[int] = []
        self._wake = asyncio.Event()
        self._heard = False
        self._task: asyncio.Task[None] | None = None

    @property
    def replica_id(self) -> str:
        return self.endpoint.facts.replica_id

    @property
    def version(self) -> str:
        return self.endpoint.facts.version

    @property
    def num_open(self) -> int:
        return len(self._open)

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(
            self._keep_connected(), name=f"step channel to {self.replica_id}"
        )

    async def close(self) -> None:
        """Disconnect for good; open sequences are lost. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._lose("the channel was closed")

    def submit(self, spec: SequenceSpec, *, inbox: Inbox, index: int) -> int:
        """See ports.Replica.submit."""
        self._last_sequence += 1
        sequence = self._last_sequence
        if not self.endpoint.is_connected:
            inbox.lose("its channel is down")
            return sequence
        now_ms = self._clock.monotonic_ms()
        self._submits.append(submit_to_wire(spec, sequence=sequence, now_ms=now_ms))
        self._open[sequence] = (inbox, index)
        self._wake.set()
        return sequence

    def abort(self, sequence: int) -> None:
        """See ports.Replica.abort."""
        if self._open.pop(sequence, None) is not None:
            self._aborts.append(sequence)
            self._wake.set()

    async def _keep_connected(self) -> None:
        pause_s = RETRY_S_MIN
        while True:
            why = "the stream ended"
            try:
                await self._serve_once()
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name}: {(error.details() or '')[:200]}"
            except TimeoutError:
                why = f"silent for over {LISTEN_S * SILENT_LISTENS_MAX:g} s"
            except _WrongReplicaError as error:
                why = str(error)
            except asyncio.CancelledError:
                why = "the channel was closed"
                raise
            except Exception as error:  # The task's root: a defect must not end the channel.
                log.crashed(during="reading a step channel", error=error)
                why = "a defect of this frontend"
            finally:
                was_connected = self.endpoint.is_connected
                self._lose(why)
            pause_s = RETRY_S_MIN if was_connected else min(pause_s * 2, RETRY_S_MAX)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - jitter

    async def _serve_once(self) -> None:
        """One connection, from hello to its end.

        Raises:
            AioRpcError: the stream broke.
            TimeoutError: it fell silent, or never said hello.
        """
        address = self.endpoint.facts.address
        async with grpc.aio.insecure_channel(address, options=list(CHANNEL_OPTIONS)) as channel:
            stub = step_pb2_grpc.StepChannelStub(channel)
            call: _Stream = stub.Connect(metadata=token_metadata(self._token))
            async with asyncio.timeout(HELLO_S):
                hello = await call.read()
            self._check(hello)
            tasks = [
                asyncio.get_running_loop().create_task(work)
                for work in (self._read(call), self._listen(), self._write(call))
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
            for end in ends:
                if isinstance(end, Exception):
                    raise end

    def _check(self, hello: object) -> None:
        """An address may be another replica's by the time we get there."""
        facts = self.endpoint.facts
        if not isinstance(hello, step_pb2.FromReplica) or not hello.HasField("hello"):
            raise _WrongReplicaError("it did not say hello")
        if hello.hello.replica_id != facts.replica_id or hello.hello.version != facts.version:
            raise _WrongReplicaError("another replica answers at its address")

    async def _read(self, call: _Stream) -> None:
        while isinstance(message := await call.read(), step_pb2.FromReplica):
            self._heard = True
            self._take(message.step)

    async def _listen(self) -> None:
        """Watch over the reader.

        Raises:
            TimeoutError: the replica fell silent.
        """
        silent = 0
        while silent < SILENT_LISTENS_MAX:
            self._heard = False
            await asyncio.sleep(LISTEN_S)
            silent = 0 if self._heard else silent + 1
        raise TimeoutError

    def _take(self, step: step_pb2.StepResult) -> None:
        """One step of the replica: to the inboxes, and into what the router knows."""
        endpoint, load = self.endpoint, step.load
        for message in step.deltas:
            target = self._open.get(message.sequence)
            if target is None:
                continue  # Aborted here while the step ran there.
            inbox, index = target
            delta = delta_from_wire(message)
            if delta.finish is not None:
                del self._open[message.sequence]
            if message.queue_wait_ms:
                self._model_metrics.queued(message.queue_wait_ms / 1000)
            inbox.put(index, delta)
        was_draining = endpoint.load.draining
        endpoint.heard(load_from_wire(load), now_ms=self._clock.monotonic_ms())
        if step.deltas:
            self._model_metrics.step(self.replica_id, load)
        else:
            self._model_metrics.heartbeat(self.replica_id, load)
        if not endpoint.is_connected:
            endpoint.is_connected = True
            facts = endpoint.facts
            log.replica_joined(
                replica_id=facts.replica_id,
                model=facts.model,
                version=facts.version,
                address=facts.address,
            )
            self._on_change()
        elif load.draining != was_draining:
            self._on_change()

    async def _write(self, call: _Stream) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._submits or self._aborts:
                message = step_pb2.ToReplica(abort=self._aborts)
                self._aborts = []
                size = 0
                while self._submits and size < SUBMIT_BYTES_MAX:
                    submit = self._submits.pop(0)
                    size += submit.ByteSize()
                    message.submit.append(submit)
                await call.write(message)

    def _lose(self, why: str) -> None:
        """The connection is gone: so is everything that ran on it."""
        was_connected = self.endpoint.is_connected
        self.endpoint.is_connected = False
        lost, self._open = self._open, {}
        self._submits.clear()
        self._aborts.clear()
        for inbox, _ in lost.values():
            inbox.lose(why)
        if was_connected:
            facts = self.endpoint.facts
            log.replica_left(
                replica_id=facts.replica_id, model=facts.model, why=why, sequences_lost=len(lost)
            )
            self._metrics.replica_left(facts.replica_id)
            self._on_change()


class _WrongReplicaError(Exception):
    """Whoever answered is not the replica of the directory."""
