"""Ready or not, and why: for load balancers, for probes, and for the operator who wonders."""

from collections.abc import Callable

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from headrace.serving.channel.fleet import ReplicaFleet
from headrace.serving.frontend.inference import Gate
from headrace.v1 import batch_pb2, inference_pb2

SERVICES = (
    "",
    inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name,
    batch_pb2.DESCRIPTOR.services_by_name["Batch"].full_name,
)
"""Names one may ask grpc.health.v1 about; the empty one is the server as a whole."""


class Readiness:
    """Joins what must hold for a request to be served. Owned by the event loop."""

    def __init__(
        self, *, fleet: ReplicaFleet, gate: Gate, meter_healthy: Callable[[], bool]
    ) -> None:
        self._fleet = fleet
        self._gate = gate
        self._meter_healthy = meter_healthy
        # grpc defines `aio` there behind a version check, which hides it from type checkers.
        self.servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]

    def why_not(self) -> str | None:
        """What is missing; None when a request can be served."""
        if self._gate.is_draining:
            return "draining: this frontend is shutting down"
        if not self._meter_healthy():
            return "usage cannot be recorded, so no work is accepted"
        models = self._fleet.models()
        if not any(served.replicas_ready for served in models):
            return "no replica is ready" + (
                f" of {', '.join(served.name for served in models)}" if models else ""
            )
        return None

    async def publish(self) -> None:
        """Let grpc.health.v1 say what holds now; its watchers hear of a change."""
        ready = health_pb2.HealthCheckResponse.SERVING
        not_ready = health_pb2.HealthCheckResponse.NOT_SERVING
        status = ready if self.why_not() is None else not_ready
        for service in SERVICES:
            await self.servicer.set(service, status)

    def add_to(self, server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(self.servicer, server)
