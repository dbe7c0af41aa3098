"""The replica's side of the step channel: sequences in, one message for each step out.

The engine loop steps on its own thread and hands over a report once per step; everything here
runs on the event loop. A report is taken apart by frontend, and each connected frontend gets one
message with the tokens of all its sequences, the replica's load, and by its arrival a heartbeat.

A frontend that reads slowly gets merged messages; one that stops reading is dropped and its
sequences are aborted, as they are whenever a connection ends.
"""

import asyncio
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import grpc
import grpc.aio

from headrace.serving import log
from headrace.serving.channel.connection import Connection
from headrace.serving.channel.convert import (
    LoadReport,
    load_to_wire,
    spec_from_wire,
)
from headrace.serving.channel.credentials import require_token
from headrace.serving.clock import Clock, SystemClock
from headrace.serving.domain.request import Delta, FinishReason, SequenceSpec
from headrace.serving.errors import Draining, EngineFault, Overloaded, ServingError
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.v1 import step_pb2, step_pb2_grpc

HEARTBEAT_S = 1.0
"""A third of the silence after which a frontend gives a replica up."""

CONNECTIONS_MAX = 64
"""Frontends of one replica. Each holds a stream and a queue."""

SEQUENCES_MAX = 4096
"""Running and waiting sequences of one connection; the loop's own bound comes first."""

WRITE_S_MAX = 10.0
"""How long one message may wait for its frontend to read before the connection is dropped."""

REPORTS_AHEAD_MAX = 64
"""Steps the engine may be ahead of this event loop before it waits."""

MESSAGE_BYTES_MAX = 16 << 20
"""A submit holds a prompt of at most a context, 5 bytes a token, and a 64 KiB schema; several
travel together, up to 1 MiB."""

SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_concurrent_streams", CONNECTIONS_MAX),
    ("grpc.max_metadata_size", 16 << 10),
    # A frontend whose host vanished is noticed by pings, not by writes that never fail.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
)


class StepReport(Protocol):
    """What one engine step did, over all sequences."""

    @property
    def step(self) -> int: ...
    @property
    def deltas(self) -> Iterable[tuple[Hashable, Delta, float | None]]:
        """Key, delta, and on a sequence's first delta the milliseconds it had queued."""
        ...

    @property
    def load(self) -> LoadReport: ...


class StepLoop(Protocol):
    """The engine loop, as this server needs it. Any thread may call."""

    @property
    def healthy(self) -> bool: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def submit(self, key: Hashable, spec: SequenceSpec) -> None: ...
    def abort(self, key: Hashable) -> None: ...
    def load(self) -> LoadReport: ...


Sink = Callable[[StepReport], None]


class ReplicaServer(step_pb2_grpc.StepChannelServicer):
    """Serves one engine loop to frontends."""

    def __init__(
        self,
        make_loop: Callable[[Sink], StepLoop],
        facts: ReplicaFacts,
        *,
        cluster_token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Clock | None = None,
    ) -> None:
        """Prepare; nothing runs before `start`.

        Args:
            make_loop: makes the engine loop from the sink for its reports. The server starts and
                stops it.
            facts: what the replica announces; address and readiness are filled in here.
            cluster_token: what frontends must present.
            host: interface of the step channel; 127.0.0.1 unless frontends run elsewhere.
            port: 0 chooses a free one.
            clock: of deadlines and queue waits; the engine loop's own.
        """
        self._facts = replace(facts, ready=False)
        self._token = cluster_token
        self._bind = f"{host}:{port}"
        self._host = host
        self._clock = clock or SystemClock()
        self._loop = make_loop(self._sink)
        self._server = grpc.aio.server(options=list(SERVER_OPTIONS))
        self._connections: set[Connection] = set()
        self._is_draining = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._events: asyncio.AbstractEventLoop | None = None
        self._ahead = threading.BoundedSemaphore(REPORTS_AHEAD_MAX)
        self._heartbeat: asyncio.Task[None] | None = None
        self.failed = asyncio.Event()
        """The engine failed: the process must exit, so that a fresh one takes its place."""

    @property
    def facts(self) -> ReplicaFacts:
        """What an `Announcer` says of this replica, as of now."""
        return self._facts

    @property
    def num_active(self) -> int:
        """Sequences that run or wait, over all frontends."""
        return sum(len(connection.sequences) for connection in self._connections)

    async def start(self) -> str:
        """Start loop and server; returns the address that the server listens on."""
        self._events = asyncio.get_running_loop()
        step_pb2_grpc.add_StepChannelServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self._bind)
        self._loop.start()
        await self._server.start()
        self._heartbeat = self._events.create_task(self._beat())
        address = f"{self._host}:{port}"
        self._facts = replace(self._facts, address=address, ready=True)
        return address

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and wait until every sequence has ended.

        Returns:
            False when `timeout_s` passed first; what still runs goes on until `stop`.
        """
        self._leave()
        log.draining(role="replica", streams_open=self.num_active, drain_s=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
                # What was said last must leave before the connections do.
                for connection in list(self._connections):
                    await connection.is_flushed.wait()
        except TimeoutError:
            return False
        return True

    async def disconnect(self) -> None:
        """End every connection at once, as a dying process does; frontends go elsewhere."""
        await self._server.stop(None)

    async def stop(self) -> None:
        """End connections and loop. Idempotent; `drain` first to lose nothing."""
        self._facts = replace(self._facts, ready=False)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.gather(self._heartbeat, return_exceptions=True)
            self._heartbeat = None
        await self.disconnect()
        self._events = None
        # The engine thread may stand at the back-pressure bound: let it see that we are gone.
        await asyncio.get_running_loop().run_in_executor(None, self._loop.stop)

    async def Connect(self, request_iterator: object, context: grpc.aio.ServicerContext) -> None:
        """One frontend, from its first message to the end of the stream."""
        await require_token(context, self._token)
        if len(self._connections) >= CONNECTIONS_MAX:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"This replica has {CONNECTIONS_MAX} frontends, which is its bound.",
            )
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(task)
        self._connections.add(connection)
        try:
            await self._serve(connection, context)
        except asyncio.CancelledError:
            if not connection.is_dropped:
                raise
            # Cancelled by us, so grpc would leave the stream open without a word.
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"This frontend has not read for {WRITE_S_MAX:g} s.",
            )
        finally:
            self._close(connection)

    async def _serve(self, connection: Connection, context: grpc.aio.ServicerContext) -> None:
        hello = step_pb2.Hello(
            replica_id=self._facts.replica_id,
            model=self._facts.model,
            version=self._facts.version,
        )
        await context.write(step_pb2.FromReplica(hello=hello))
        connection.tell(self._load())
        reader = asyncio.get_running_loop().create_task(self._read(connection, context))
        reader.add_done_callback(lambda _: connection.wake.set())
        try:
            while not reader.done():
                connection.wake.clear()
                await self._write(connection, context)
                await connection.wake.wait()
        finally:
            reader.cancel()
            (end,) = await asyncio.gather(reader, return_exceptions=True)
        if isinstance(end, Exception):
            raise end

    async def _read(self, connection: Connection, context: grpc.aio.ServicerContext) -> None:
        while True:
            message = await context.read()
            if not isinstance(message, step_pb2.ToReplica):
                return
            for submit in message.submit:
                self._submit(connection, submit)
            for sequence in message.abort:
                self._end(connection, sequence)
                self._loop.abort((connection, sequence))

    async def _write(self, connection: Connection, context: grpc.aio.ServicerContext) -> None:
        """Write all there is to say, noting how long each message waits for its reader."""
        clock = asyncio.get_running_loop().time
        while (message := connection.next_message()) is not None:
            connection.writing_since_s = clock()
            await context.write(message)
            connection.writing_since_s = None
        connection.is_flushed.set()

    def _submit(self, connection: Connection, message: step_pb2.Submit) -> None:
        sequence = message.sequence
        try:
            self._check_room(connection, sequence)
            spec = spec_from_wire(message, now_ms=self._clock.monotonic_ms())
            self._loop.submit((connection, sequence), spec)
        except ServingError as refusal:
            self._refuse(connection, sequence, refusal)
            return
        connection.sequences.add(sequence)
        self._is_idle.clear()

    def _check_room(self, connection: Connection, sequence: int) -> None:
        if self._is_draining:
            raise Draining(
                "This replica is draining.",
                why="It is being replaced or stopped.",
                fix="Use another replica.",
            )
        if len(connection.sequences) >= SEQUENCES_MAX:
            raise Overloaded(
                f"This frontend has {SEQUENCES_MAX} sequences here.",
                why="That is the bound for one connection.",
                fix="Use another replica, or wait for one of them to end.",
            )
        if sequence in connection.sequences:
            raise EngineFault(
                f"The sequence number {sequence} is in use.",
                why="A frontend gives each sequence of a channel its own number.",
                fix="Run frontend and replica from the same release.",
            )

    def _refuse(self, connection: Connection, sequence: int, refusal: ServingError) -> None:
        connection.put(sequence, Delta(finish=FinishReason.ERROR, error=refusal), None)
        connection.tell(self._load())

    def _sink(self, report: StepReport) -> None:
        """Take a report from the engine's thread; waits there while this loop is far behind."""
        while not self._ahead.acquire(timeout=HEARTBEAT_S):
            if self._events is None:
                return
        events = self._events
        if events is None:
            self._ahead.release()
            return
        try:
            events.call_soon_threadsafe(self._fan_out, report)
        except RuntimeError:
            # The event loop was closed without `stop`; nobody is left to tell.
            self._ahead.release()

    def _fan_out(self, report: StepReport) -> None:
        """One message for each frontend that the step concerned."""
        self._ahead.release()
        concerned: set[Connection] = set()
        for key, delta, queue_wait_ms in report.deltas:
            connection, sequence = _origin(key)
            if sequence not in connection.sequences:
                continue
            concerned.add(connection)
            connection.put(sequence, delta, queue_wait_ms)
            if delta.finish is not None:
                self._end(connection, sequence)
        self._check_health()
        if concerned:
            load = load_to_wire(report.load, is_draining=self._is_draining)
            for connection in concerned:
                connection.tell(load, step=report.step)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            self._check_health()
            load = self._load()
            now_s = asyncio.get_running_loop().time()
            for connection in list(self._connections):
                since_s = connection.writing_since_s
                if since_s is not None and now_s - since_s > WRITE_S_MAX:
                    self._close(connection)
                    connection.task.cancel()
                elif not connection.has_spoken:
                    connection.tell(load)
                connection.has_spoken = False

    def _check_health(self) -> None:
        if not self._loop.healthy and not self.failed.is_set():
            self.failed.set()
            self._leave()

    def _leave(self) -> None:
        """Tell everyone that nothing new is taken here."""
        self._is_draining = True
        self._facts = replace(self._facts, ready=False)
        load = self._load()
        for connection in list(self._connections):
            connection.tell(load)

    def _load(self) -> step_pb2.Load:
        return load_to_wire(self._loop.load(), is_draining=self._is_draining)

    def _end(self, connection: Connection, sequence: int) -> None:
        connection.sequences.discard(sequence)
        if not self.num_active:
            self._is_idle.set()

    def _close(self, connection: Connection) -> None:
        """The connection ended, for whatever reason: nobody waits for its sequences. Idempotent."""
        self._connections.discard(connection)
        for sequence in connection.sequences:
            self._loop.abort((connection, sequence))
        connection.close()
        if not self.num_active:
            self._is_idle.set()


def _origin(key: Hashable) -> tuple[Connection, int]:
    assert isinstance(key, tuple)
    connection, sequence = key
    assert isinstance(connection, Connection)
    assert isinstance(sequence, int)
    return connection, sequence
