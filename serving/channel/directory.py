"""Which replicas exist: a small service in memory, its announcers and its watchers.

Nothing here is durable and nothing has to be. A replica repeats itself every second, so a
restarted directory knows everyone within two. While it is away, replicas go on serving and
frontends keep the last set they heard.
"""

import asyncio
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from headrace.serving import log
from headrace.serving.channel.convert import facts_from_wire, facts_to_wire
from headrace.serving.channel.credentials import require_token, token_metadata
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.v1 import directory_pb2, directory_pb2_grpc, quota_pb2_grpc

ANNOUNCE_S = 1.0
SILENCE_S = 5.0
"""Five missed announcements."""

REPLICAS_MAX = 1024
WATCHERS_MAX = 64
MESSAGE_BYTES_MAX = 1 << 20
"""A set of 1,024 replicas at 500 bytes is half of it."""

RETRY_S_MIN, RETRY_S_MAX = 0.1, 5.0

_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.so_reuseport", 0),
)


@dataclass(slots=True, eq=False)
class _Entry:
    replica: directory_pb2.Replica
    announcer: object
    """The stream that spoke last: a replica that reconnects is not ended by its old stream."""


class Directory(directory_pb2_grpc.DirectoryServicer):
    """The set of replicas. Owned by one event loop."""

    def __init__(self, *, cluster_token: str) -> None:
        self._token = cluster_token
        self._entries: dict[str, _Entry] = {}
        self._changed = asyncio.Event()
        self._watchers = 0

    @property
    def replicas(self) -> Sequence[ReplicaFacts]:
        return [facts_from_wire(entry.replica) for entry in self._entries.values()]

    async def Announce(
        self,
        request_iterator: AsyncIterable[directory_pb2.Replica],
        context: grpc.aio.ServicerContext,
    ) -> directory_pb2.AnnounceEnd:
        await require_token(context, self._token)
        stream = object()
        messages = aiter(request_iterator)
        announced: set[str] = set()
        try:
            while True:
                async with asyncio.timeout(SILENCE_S):
                    replica = await anext(messages)
                if not replica.replica_id or not replica.address:
                    await context.abort(
                        grpc.StatusCode.INVALID_ARGUMENT, "A replica has an id and an address."
                    )
                if len(announced | {replica.replica_id}) > 1:
                    await context.abort(
                        grpc.StatusCode.INVALID_ARGUMENT, "A stream announces one replica."
                    )
                if not self._put(replica, stream):
                    await context.abort(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"The directory holds {REPLICAS_MAX} replicas, which is its bound.",
                    )
                announced.add(replica.replica_id)
        except StopAsyncIteration:
            return directory_pb2.AnnounceEnd()
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, f"Silent for over {SILENCE_S:.0f} s."
            )
            raise
        finally:
            for replica_id in announced:
                self._drop(replica_id, stream)

    async def Watch(
        self, request: directory_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> None:
        await require_token(context, self._token)
        if self._watchers >= WATCHERS_MAX:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"The directory has {WATCHERS_MAX} watchers, which is its bound.",
            )
        self._watchers += 1
        try:
            while True:
                # A slow watcher skips sets, never queues them: only the newest matters.
                changed = self._changed
                replicas = [entry.replica for entry in self._entries.values()]
                await context.write(directory_pb2.ReplicaSet(replicas=replicas))
                await changed.wait()
        finally:
            self._watchers -= 1

    def _put(self, replica: directory_pb2.Replica, stream: object) -> bool:
        known = self._entries.get(replica.replica_id)
        if known is None and len(self._entries) >= REPLICAS_MAX:
            return False
        self._entries[replica.replica_id] = _Entry(replica, stream)
        if known is None or known.replica != replica:
            self._notify()
        return True

    def _drop(self, replica_id: str, stream: object) -> None:
        known = self._entries.get(replica_id)
        if known is not None and known.announcer is stream:
            del self._entries[replica_id]
            self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class DirectoryServer:
    """The directory on a port of its own; in the frontend's process on one machine."""

    def __init__(
        self,
        *,
        cluster_token: str,
        address: str,
        quota: quota_pb2_grpc.QuotaServicer | None = None,
    ) -> None:
        """`quota` is served there too: what frontends share has one address."""
        self._quota = quota
        self.directory = Directory(cluster_token=cluster_token)
        self._bind = address
        self._server = grpc.aio.server(options=list(_OPTIONS))

    async def start(self) -> str:
        """Returns the address; its port was chosen if 0 was given.

        Raises:
            RuntimeError: the address is taken.
        """
        directory_pb2_grpc.add_DirectoryServicer_to_server(self.directory, self._server)
        if self._quota is not None:
            quota_pb2_grpc.add_QuotaServicer_to_server(self._quota, self._server)
        port = self._server.add_insecure_port(self._bind)
        await self._server.start()
        return f"{self._bind.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        await self._server.stop(None)


class Announcer:
    """Keeps one replica in the directory for as long as it runs. The directory may come and go."""

    def __init__(
        self, address: str, *, cluster_token: str, facts: Callable[[], ReplicaFacts]
    ) -> None:
        """`facts` is asked at every announcement, so that readiness follows by itself."""
        self._address = address
        self._token = cluster_token
        self._facts = facts
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="announcer")

    async def stop(self) -> None:
        """End the stream, which takes the replica out of the directory at once. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        retry = _Retry()
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
                    stub = directory_pb2_grpc.DirectoryStub(channel)
                    await stub.Announce(
                        self._announcements(retry), metadata=token_metadata(self._token)
                    )
            except grpc.aio.AioRpcError:
                # Serving does not depend on it; the next try is all there is to do.
                pass
            except Exception as error:  # The task's root: a defect must not end announcements.
                log.crashed(during="announcing a replica", error=error)
            await retry.pause()

    async def _announcements(self, retry: "_Retry") -> AsyncIterator[directory_pb2.Replica]:
        while True:
            yield facts_to_wire(self._facts())
            retry.succeeded()
            await asyncio.sleep(ANNOUNCE_S)


class Watcher:
    """Follows the directory and hands every set to `on_set`; keeps trying while it is away."""

    def __init__(
        self,
        address: str,
        *,
        cluster_token: str,
        on_set: Callable[[Sequence[ReplicaFacts]], None],
    ) -> None:
        self._address = address
        self._token = cluster_token
        self._on_set = on_set
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="directory watcher")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        retry = _Retry()
        while True:
            try:
                async with grpc.aio.insecure_channel(self._address, options=_OPTIONS) as channel:
                    stub = directory_pb2_grpc.DirectoryStub(channel)
                    call = stub.Watch(
                        directory_pb2.WatchRequest(), metadata=token_metadata(self._token)
                    )
                    async for message in call:
                        retry.succeeded()
                        self._on_set([facts_from_wire(replica) for replica in message.replicas])
            except grpc.aio.AioRpcError:
                # The last known set stays in force; a dead replica is noticed by its channel.
                pass
            except Exception as error:  # The task's root: a defect must not end the watch.
                log.crashed(during="taking a set of replicas", error=error)
            await retry.pause()


class _Retry:
    """Pauses between tries: doubling up to a bound, with jitter, short again after a success."""

    def __init__(self) -> None:
        self._pause_s = RETRY_S_MIN

    def succeeded(self) -> None:
        self._pause_s = RETRY_S_MIN

    async def pause(self) -> None:
        pause_s, self._pause_s = self._pause_s, min(self._pause_s * 2, RETRY_S_MAX)
        await asyncio.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311 - jitter
