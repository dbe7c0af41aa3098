"""The frontend as a whole: start, ready, drain, stop.

One event loop owns everything here but the usage store's writer thread and a small pool for
tokenising long texts. Measured at 64 streams of 45 tokens/s, CPU for each message: 60 us with
uvloop, 65 us with asyncio's own loop.
"""

import asyncio
import contextlib
import ssl
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from headrace.serving import log
from headrace.serving.admission.account_store import AccountStore
from headrace.serving.admission.account_view import AccountView
from headrace.serving.admission.accounts import open_accounts
from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.admission.key_store import cluster_token
from headrace.serving.admission.lease import OpenLease
from headrace.serving.admission.operator_token import OperatorTokens
from headrace.serving.admission.tiers import TierDesk
from headrace.serving.channel.directory import DirectoryServer, Watcher
from headrace.serving.channel.fleet import ReplicaFleet
from headrace.serving.clock import Clock, SystemClock
from headrace.serving.config import Config
from headrace.serving.frontend.admin import AdminService
from headrace.serving.frontend.batch import BatchService
from headrace.serving.frontend.billing import BillingService
from headrace.serving.frontend.gate import Gate
from headrace.serving.frontend.health import SERVICES, Readiness
from headrace.serving.frontend.http import HttpServer
from headrace.serving.frontend.inference import InferenceService
from headrace.serving.frontend.interceptors import Edge
from headrace.serving.frontend.job_parts import JobParts
from headrace.serving.frontend.listening import bad_certificate, port_taken, server_credentials
from headrace.serving.frontend.model_shelf import Load, ModelShelf, load_from_artifact
from headrace.serving.frontend.peer import Peers
from headrace.serving.frontend.quota_parts import QuotaParts
from headrace.serving.metering.books import Books
from headrace.serving.metering.give_back import Adjust, ChargeReversal
from headrace.serving.observe import Metrics
from headrace.serving.observe_quota import QuotaMetrics
from headrace.serving.pipeline import Pipeline
from headrace.serving.tracing import Tracer, tracer
from headrace.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    batch_pb2_grpc,
    billing_pb2,
    billing_pb2_grpc,
    inference_pb2_grpc,
)

HOUSEKEEPING_S = 1.0
CUT_S = 10.0
"""For answers that were cut off to settle. That takes one write of the meter log; a disk that needs
longer has failed, and then the next start recovers them."""
TOKENISER_THREADS = 2
_OF_OPERATORS = (
    admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name,
    billing_pb2.DESCRIPTOR.services_by_name["Billing"].full_name,
)
ANSWER_BYTES_MAX = 64 << 20
"""A unary answer: 16 choices of 8 Ki tokens with 20 logprobs each are about 40 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a frontend listens, as host:port."""

    grpc: str
    http: str
    directory: str


class Frontend:
    """What clients talk to. `start`, then `drain` and `stop`; each once."""

    def __init__(
        self,
        config: Config,
        *,
        version: str = "",
        on_change: Callable[[], None] = lambda: None,
        on_meter_failed: Callable[[str], None] = lambda _: None,
        clock: Clock | None = None,
        load: Load | None = None,
        adjust: Adjust | None = None,
    ) -> None:
        """Prepare; nothing is opened before `start`.

        Args:
            config: ports of 0 are chosen by the system.
            version: of this build, for metrics.
            on_change: called when a model may have become servable, or no longer.
            on_meter_failed: called on another thread once nothing can be recorded any more: the
                process should end, and its successor recovers what the disk has.
            clock: of deadlines and records.
            load: where tokenizers come from; None takes artifacts that this home trusts.
            adjust: writes corrections of charges; None is the meter log.
        """
        self._config = config
        self._clock = clock or SystemClock()
        self._version = version
        self.metrics = Metrics(version=version)
        self._executor = ThreadPoolExecutor(TOKENISER_THREADS, thread_name_prefix="tokenise")
        load = load or partial(load_from_artifact, trust=config.trust_dir)
        self._shelf = ModelShelf(self._executor, load=load)
        self.gate = Gate(config.frontend.streams_max)
        self._adjust = adjust
        self._on_change = on_change
        self._on_meter_failed = on_meter_failed
        self._has_changed = asyncio.Event()
        self._stack = contextlib.AsyncExitStack()
        self._epoch = uuid.uuid4().hex
        self.accounts: AccountView
        self.books: Books
        self.quota: QuotaParts
        self.jobs: JobParts
        self.fleet: ReplicaFleet
        self.pipeline: Pipeline
        self.readiness: Readiness
        self._tracer: Tracer
        self._server: grpc.aio.Server

    async def start(self) -> Addresses:
        """Open the usage store, listen, and look for replicas. Undone if any of it fails.

        Raises:
            ConfigRefused: a port is taken, or keys, certificate or store cannot be used.
            MeterUnavailable: usage cannot be recorded.
            AccountsUnavailable: organisations and keys cannot be read.
        """
        try:
            return await self._start()
        except BaseException:
            await self._stack.aclose()
            raise

    async def _start(self) -> Addresses:
        config, stack = self._config, self._stack
        stack.callback(self._executor.shutdown, wait=False, cancel_futures=True)
        token = cluster_token(config.cluster_token_file)
        accounts, self.accounts = await asyncio.to_thread(self._open_accounts)
        authenticator = Authenticator(self.accounts, clock=self._clock)
        edge = self._edge(authenticator)
        admin = AdminService(accounts, clock=self._clock)
        stack.push_async_callback(asyncio.to_thread, admin.close)
        self.books = await asyncio.to_thread(self._open_books)
        stack.push_async_callback(asyncio.to_thread, self.books.close)
        await self._open_quota(token)
        tiers = TierDesk(config.tiers, price_for=self.books.price)
        await self._open_pipeline(token, tiers)
        self.readiness = Readiness(
            fleet=self.fleet, gate=self.gate, meter_healthy=lambda: self.books.meter.healthy
        )
        service = await self._open_inference(authenticator, tiers)
        batches = await self.jobs.open_batches(
            service.prepare,
            pipeline=self.pipeline,
            fleet=self.fleet,
            door=authenticator,
            is_draining=lambda: self.gate.is_draining,
        )
        directory = await self._start_directory(token)
        http = await self._start_http()
        billing = BillingService(self.books.corrections, accounts)
        public = await self._start_grpc(service, admin, billing, batches, edge)
        housekeeping = asyncio.get_running_loop().create_task(self._keep_house())
        stack.push_async_callback(_ended, housekeeping)
        addresses = Addresses(grpc=public, http=http, directory=directory)
        log.started(
            role="frontend",
            version=self._version,
            addresses={"grpc": public, "http": http, "directory": directory},
        )
        return addresses

    async def _open_quota(self, token: str) -> None:
        self.quota = QuotaParts(
            self._config,
            epoch=self._epoch,
            cluster_token=token,
            clock=self._clock,
            metrics=QuotaMetrics(self.metrics.registry),
        )
        self._stack.push_async_callback(self.quota.close)
        await self.quota.open()

        def spent_of(lease: OpenLease) -> int | None:
            return self.books.spent_femto(
                epoch=lease.epoch, limit_name=lease.limit_name, period=lease.period
            )

        await self.quota.begin_to_resolve(spent_of)

    async def _open_pipeline(self, token: str, tiers: TierDesk) -> None:
        config, stack = self._config, self._stack
        self._tracer = tracer(config.telemetry, version=self._version)
        # Closed once nothing runs or settles any more: until then spans end.
        stack.push_async_callback(asyncio.to_thread, self._tracer.close)
        self.fleet = ReplicaFleet(
            cluster_token=token,
            clock=self._clock,
            metrics=self.metrics,
            expected=[model.name for model in config.models if model.replicas],
            on_change=self._fleet_changed,
        )
        self.pipeline = Pipeline(
            fleet=self.fleet,
            meter=self.books.meter,
            metrics=self.metrics,
            clock=self._clock,
            tiers=tiers,
            quota=self.quota.quota,
        )
        stack.push_async_callback(self.pipeline.wait_settled)
        stack.push_async_callback(self.fleet.close)
        give_back = ChargeReversal(self.books.find, self._adjust or self.books.adjust)
        self.jobs = JobParts(
            config,
            epoch=self._epoch,
            log_id=self.books.meter.log_id,
            clock=self._clock,
            give_back=give_back,
        )
        stack.push_async_callback(self.jobs.close)

    async def _open_inference(
        self, authenticator: Authenticator, tiers: TierDesk
    ) -> InferenceService:
        return InferenceService(
            pipeline=self.pipeline,
            quota=self.quota.quota,
            fleet=self.fleet,
            shelf=self._shelf,
            authenticator=authenticator,
            price_for=self.books.price,
            tiers=tiers,
            executor=self._executor,
            gate=self.gate,
            idempotency=await self.jobs.open_calls(self.accounts.pepper.derive),
            metrics=self.metrics,
            tracer=self._tracer,
            clock=self._clock,
        )

    async def drain(self, grace_s: float) -> bool:
        """Refuse new calls, start no line of a batch, and let finish what is open.

        Args:
            grace_s: the longest that it may take.

        Returns:
            False when answers or lines were still open then; `stop` ends them.
        """
        self.gate.is_draining = True
        self.jobs.batches.is_draining = True
        log.draining(role="frontend", streams_open=self.gate.num_open, drain_s=grace_s)
        await self.readiness.publish()
        try:
            async with asyncio.timeout(grace_s):
                await self.gate.wait_empty()
                await self.jobs.batches.wait_empty()
                await self.pipeline.wait_settled()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """Close everything, in the reverse order of `start`. Idempotent."""
        self.gate.is_draining = True
        await self._stack.aclose()
        log.stopped(role="frontend")

    async def _wait_cut(self) -> None:
        try:
            async with asyncio.timeout(CUT_S):
                await self.gate.wait_empty()
        except TimeoutError:
            log.cut_unfinished(streams_open=self.gate.num_open, waited_s=CUT_S)

    def _open_accounts(self) -> tuple[AccountStore, AccountView]:
        """The store, and the view that follows it in a thread until `stop`."""
        accounts = open_accounts(self._config, clock=self._clock)
        self._stack.push_async_callback(asyncio.to_thread, accounts.close)
        stale_s = self._config.accounts.stale_s
        view = AccountView(accounts, clock=self._clock, stale_s=stale_s)
        self._stack.push_async_callback(asyncio.to_thread, view.close)
        view.start()
        return accounts, view

    def _edge(self, authenticator: Authenticator) -> Edge:
        settings = self._config.frontend
        return Edge(
            authenticator=authenticator,
            tokens=OperatorTokens(self._config.operators, clock=self._clock),
            peers=Peers(settings.trusted_proxies, header=settings.proxy_header),
            metrics=self.metrics,
        )

    def _open_books(self) -> Books:
        return Books(
            self._config,
            clock=self._clock,
            metrics=self.metrics,
            epoch=self._epoch,
            version=self._version,
            on_failed=self._on_meter_failed,
        )

    async def _start_directory(self, token: str) -> str:
        address = self._config.directory.address
        if self._config.directory.hosted:
            server = DirectoryServer(cluster_token=token, address=address, quota=self.quota.service)
            try:
                address = await server.start()
            except RuntimeError as error:
                raise port_taken("directory.address", address) from error
            self._stack.push_async_callback(server.stop)
        watcher = Watcher(address, cluster_token=token, on_set=self.fleet.update)
        watcher.start()
        self._stack.push_async_callback(watcher.stop)
        return address

    async def _start_http(self) -> str:
        settings = self._config.frontend
        tls: ssl.SSLContext | None = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            try:
                tls.load_cert_chain(settings.tls_cert, settings.tls_key)
            except (OSError, ssl.SSLError) as error:
                raise bad_certificate(str(error)) from error
        server = HttpServer(
            host=settings.host,
            port=settings.http_port,
            readiness=self.readiness,
            metrics=self.metrics,
            tls=tls,
        )
        self._stack.push_async_callback(server.stop)
        try:
            return await server.start()
        except OSError as error:
            where = f"{settings.host}:{settings.http_port}"
            raise port_taken("frontend.http_port", where) from error

    async def _start_grpc(
        self,
        service: InferenceService,
        admin: AdminService,
        billing: BillingService,
        batches: BatchService,
        edge: Edge,
    ) -> str:
        settings = self._config.frontend
        server = self._server = grpc.aio.server(
            interceptors=[edge], options=self._grpc_options(), compression=None
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
        admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
        billing_pb2_grpc.add_BillingServicer_to_server(billing, server)
        batch_pb2_grpc.add_BatchServicer_to_server(batches, server)
        self.readiness.add_to(server)
        await self.readiness.publish()
        names = [*SERVICES[1:], *_OF_OPERATORS, "grpc.health.v1.Health", reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        where = f"{settings.host}:{settings.grpc_port}"
        try:
            if settings.tls_cert is not None and settings.tls_key is not None:
                credentials = server_credentials(settings.tls_cert, settings.tls_key)
                port = server.add_secure_port(where, credentials)
            else:
                port = server.add_insecure_port(where)
        except RuntimeError as error:
            raise port_taken("frontend.grpc_port", where) from error
        await server.start()
        # Answers that outlive the drain are cut off here, and settled as cancelled. The server does
        # not wait for that; what comes after relies on it, the return of what was leased above all.
        self._stack.push_async_callback(self._wait_cut)
        self._stack.push_async_callback(server.stop, None)
        return f"{settings.host}:{port}"

    def _grpc_options(self) -> Sequence[tuple[str, int]]:
        settings = self._config.frontend
        return [
            ("grpc.max_receive_message_length", settings.message_bytes_max),
            ("grpc.max_send_message_length", ANSWER_BYTES_MAX),
            ("grpc.max_metadata_size", settings.metadata_bytes_max),
            ("grpc.max_concurrent_streams", settings.connection_streams_max),
            # A client whose host vanished is noticed by pings, and its answers are cancelled.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            # Two frontends on one port would share its connections unnoticed.
            ("grpc.so_reuseport", 0),
        ]

    def _fleet_changed(self) -> None:
        self._has_changed.set()
        self._on_change()

    async def _keep_house(self) -> None:
        """Publish readiness after every change, and look for what changes without a word."""
        while True:
            self._has_changed.clear()
            try:
                self.fleet.sweep()
                self.books.refresh_prices()
                self.quota.follow()
                for endpoint in self.fleet.endpoints:
                    self._shelf.expect(endpoint.facts)
                await self.readiness.publish()
            except Exception as error:  # The task's root: a defect must not end the rounds.
                log.crashed(during="housekeeping", error=error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOUSEKEEPING_S):
                    await self._has_changed.wait()


async def _ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
